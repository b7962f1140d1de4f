"""Tiny-attention adapters: heads of one channel (Zhao et al. 2022, arXiv 2211.01979).

What is added to a token depends on the other tokens, at 0.14 % of BERT-base.

    efft train --config=configs/tiny_attention.py:task=rotten_tomatoes --workdir=runs/tiny_attention
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'tiny': {'fn': 'attention_adapter.tiny_attention', 'heads': 4, 'head_dim': 1}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
