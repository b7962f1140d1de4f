"""NoReFT: LoReFT without the orthonormal rows (Wu et al. 2024, arXiv 2404.03592).

The paper's ablation of the constraint.

    efft train --config=configs/noreft.py:task=rotten_tomatoes --workdir=runs/noreft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'noreft': {'fn': 'intervene.noreft', 'rank': 1, 'first': 3}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 6e-4
  return config
