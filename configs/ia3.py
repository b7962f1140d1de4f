"""(IA)3: scales of keys, values and FFN units (Liu et al. 2022, arXiv 2205.05638).

2 d + d_ff numbers a layer, 0.05 % of BERT-base. They start at one; weight decay, which would pull
them to zero, acts on matrices only.

    efft train --config=configs/ia3.py:task=rotten_tomatoes --workdir=runs/ia3
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'ia3': {'fn': 'scale.ia3'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
