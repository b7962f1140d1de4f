"""Diff pruning: a sparse difference to the kernels (Guo et al. 2021, arXiv 2012.07463).

Difference and gates train, twice the size of the kernels; a penalty closes gates, and of what is
left only the largest 0.5 % count when evaluating.

    efft train --config=configs/diff_pruning.py:task=rotten_tomatoes --workdir=runs/diff_pruning
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'diff': {'fn': 'diff.diff', 'density': 0.005}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.groups = {'delta': {'weight_decay': 0.0}}
  config.optim.lr = 1e-4
  return config
