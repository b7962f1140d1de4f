"""LoftQ: LoRA that makes up for a quantised kernel (Li et al. 2023, arXiv 2310.08659).

The adapted kernels are rounded to NF4 in blocks of 64, and LoRA starts at what that lost. A
simulation: the rounded values are kept in floating point.

    efft train --config=configs/loftq.py:task=rotten_tomatoes --workdir=runs/loftq
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'loftq': {'fn': 'spectral_init.loftq', 'rank': 8, 'alpha': 8.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/(a0|b0)', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
