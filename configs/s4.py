"""S4: every group of layers its own methods (Chen et al. 2023, arXiv 2301.01821).

Adapters, prefixes, biases and LoRA in a spindle of six layers; of BERT-base:
--config.method.s4.layers=12.

    efft train --config=configs/s4.py:task=rotten_tomatoes --workdir=runs/s4
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'s4': {'fn': 'hybrid.s4', 'layers': 6}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
