"""Prompt tuning: learnt words before the text (Lester et al. 2021, arXiv 2104.08691).

The longest text and the prompt share the encoder's positions: 512 - 20 with BERT. Prompts move
slowly, hence their rate; decay would pull them to zero.

    efft train --config=configs/prompt.py:task=rotten_tomatoes --workdir=runs/prompt
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'prompt': {'fn': 'prompt.prompt', 'length': 20, 'init': 'vocabulary'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  return config
