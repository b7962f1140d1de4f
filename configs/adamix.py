"""AdaMix: a mixture of adapters, one a step (Wang et al. 2022, arXiv 2205.12410).

Two passes over each batch draw different adapters and are made to agree; their mean is what
evaluates.

    efft train --config=configs/adamix.py:task=rotten_tomatoes --workdir=runs/adamix
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'adamix': {'fn': 'wrap.adamix', 'experts': 4, 'size': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.train.consistency = 1.0
  return config
