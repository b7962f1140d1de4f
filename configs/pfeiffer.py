"""Pfeiffer adapters: one bottleneck a layer (Pfeiffer et al. 2020, arXiv 2005.00247).

After the FFN: half of Houlsby's adapters at nearly the score. The LayerNorms stay
frozen.

    efft train --config=configs/pfeiffer.py:task=rotten_tomatoes --workdir=runs/pfeiffer
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'pfeiffer': {'fn': 'adapter.pfeiffer', 'reduction': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
