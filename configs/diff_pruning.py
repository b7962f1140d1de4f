"""Diff pruning: a sparse difference to the kernels (Guo et al. 2021, arXiv 2012.07463).

Difference and gates train, twice the size of the kernels, and a penalty closes gates. After half of
the run only the largest 0.5 % of each kernel's differences are kept, and go on training. Another
share is two fields: method.diff.density and optim.groups.delta.transform.density.

    efft train --config=configs/diff_pruning.py:task=rotten_tomatoes --workdir=runs/diff_pruning
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  density = 0.005
  config.method = {'diff': {'fn': 'diff.diff', 'density': density}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*', 'delta'), ('params/.*', 'frozen'),
  )  # fmt: skip
  cut = {'fn': 'diff.fixed', 'density': density}
  config.optim.groups = {'delta': {'weight_decay': 0.0, 'transform': cut}}
  config.optim.lr = 1e-4
  config.train.save = 'last'  # before the cut the difference is dense
  return config
