"""DiReFT: low-rank updates of the first tokens' representations (Wu et al. 2024).

arXiv 2404.03592. LoReFT without the orthonormal rows and without the subtraction: fewer products.

    efft train --config=configs/direft.py:task=rotten_tomatoes --workdir=runs/direft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'direft': {'fn': 'intervene.direft', 'rank': 1, 'first': 3}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 6e-4
  return config
