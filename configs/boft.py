"""BOFT: rotations by butterfly factors (Liu et al. 2023, arXiv 2311.06243).

Two block-diagonal factors, shuffled so that they reach across blocks, and a scale for each
output.

    efft train --config=configs/boft.py:task=rotten_tomatoes --workdir=runs/boft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'boft': {'fn': 'orthogonal.boft', 'block_size': 8, 'factors': 2}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
