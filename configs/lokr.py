"""LoKr: Kronecker products with a low-rank factor (Yeh et al. 2023, arXiv 2309.14859).

About an eleventh of the numbers of LoRA at the same rank.

    efft train --config=configs/lokr.py:task=rotten_tomatoes --workdir=runs/lokr
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lokr': {'fn': 'kron.lokr', 'rank': 8, 'alpha': 8.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
