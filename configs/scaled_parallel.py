"""Scaled parallel adapters: with a learnt scale (He et al. 2022, arXiv 2110.04366).

As in AdapterHub, the scale of each layer's adapter starts at one and trains.

    efft train --config=configs/scaled_parallel.py:task=rotten_tomatoes --workdir=runs/out
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'parallel': {'fn': 'adapter.parallel', 'scale': 1.0, 'learn_scale': True}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
