"""Intrinsic SAID: a vector moves all kernels (Aghajanyan et al. 2020, arXiv 2012.13255).

Trains next to nothing, but each step costs what full fine-tuning costs: the gradient of every
kernel is computed before it is projected.

    efft train --config=configs/said.py:task=rotten_tomatoes --workdir=runs/said
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'said': {'fn': 'shared_lowrank.said', 'dim': 1000}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
