"""Robust AdapterDrop: random depth while training (Rueckle et al. 2021, arXiv 2010.11918).

Each step leaves the adapters of the first n layers out. All of them act afterwards: no command
drops some of a trained run. configs/adapterdrop.py trains without those of the first layers.

    efft train --config=configs/adapterdrop_robust.py:task=rotten_tomatoes --workdir=runs/out
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'adapterdrop': {'fn': 'wrap.adapterdrop', 'reduction': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
