"""Prefix tuning: keys and values in every layer (Li and Liang 2021, arXiv 2101.00190).

The prefixes themselves train, as in P-tuning v2; configs/prefix_mlp.py computes them. They start
from a standard normal, and decay would pull them to zero.

    efft train --config=configs/prefix.py:task=rotten_tomatoes --workdir=runs/prefix
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'prefix': {'fn': 'prefix.prefix', 'length': 20}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  return config
