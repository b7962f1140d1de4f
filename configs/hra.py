"""HRA: chains of Householder reflections (Yuan et al. 2024, arXiv 2405.17484).

Eight reflections of the input of every linear layer, in pairs that cancel at the start: at once
a rotation and a low-rank update.

    efft train --config=configs/hra.py:task=rotten_tomatoes --workdir=runs/hra
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'hra': {'fn': 'orthogonal.hra', 'rank': 8}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
