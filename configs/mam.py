"""MAM adapter: prefixes and parallel adapters (He et al. 2022, arXiv 2110.04366).

Sizes of the paper's GLUE runs, but for the prefixes' network (512, not 800), which most numbers
are of.

    efft train --config=configs/mam.py:task=rotten_tomatoes --workdir=runs/mam
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'mam': {'fn': 'hybrid.mam', 'length': 16, 'hidden': 512, 'size': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-4
  return config
