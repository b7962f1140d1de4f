"""MAD-X: an invertible adapter of the embeddings (Pfeiffer et al. 2020, arXiv 2005.00052).

With a Pfeiffer adapter a layer: AdapterHub's seq_bn_inv.

    efft train --config=configs/invertible.py:task=rotten_tomatoes --workdir=runs/invertible
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'invertible': {'fn': 'adapter.invertible'},
    'pfeiffer': {'fn': 'adapter.pfeiffer', 'reduction': 16},
  }
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
