"""Compacter: Kronecker kernels (Karimi Mahabadi et al. 2021, arXiv 2106.04647).

Two adapters a layer of 2,376 numbers each in BERT-base. As in the paper all LayerNorms train too.

    efft train --config=configs/compacter.py:task=rotten_tomatoes --workdir=runs/compacter
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'compacter': {'fn': 'phm.compacter', 'n': 4, 'reduction': 32}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*norm/.*', 'norm'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 3e-3
  return config
