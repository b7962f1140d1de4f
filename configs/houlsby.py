"""Houlsby adapters: two bottlenecks a layer (Houlsby et al. 2019, arXiv 1902.00751).

Sequential, before the residual sum of each block. As in the paper all LayerNorms train too, the
one of the embedding included.

    efft train --config=configs/houlsby.py:task=rotten_tomatoes --workdir=runs/houlsby
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'houlsby': {'fn': 'adapter.houlsby', 'size': 64}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*norm/.*', 'norm'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
