"""SparseAdapter: adapters pruned before training (He et al. 2022, arXiv 2210.04284).

Pfeiffer adapters four times wider than their default, of which SNIP keeps a quarter: as many
numbers train, at more places.

    efft train --config=configs/sparse_adapter.py:task=rotten_tomatoes --workdir=runs/sparse_adapter
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'pfeiffer': {'fn': 'adapter.pfeiffer', 'reduction': 4}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.groups = {'delta': {'transform': {'fn': 'masks.snip', 'density': 0.25}}}
  config.optim.lr = 1e-3
  return config
