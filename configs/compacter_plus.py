"""Compacter++: one adapter a layer (Karimi Mahabadi et al. 2021, arXiv 2106.04647).

Half of Compacter, after the FFN. As in the paper all LayerNorms train too.

    efft train --config=configs/compacter_plus.py:task=rotten_tomatoes --workdir=runs/compacter_plus
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'compacter': {'fn': 'phm.compacter_plus', 'n': 4, 'reduction': 32}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*norm/.*', 'norm'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 3e-3
  return config
