"""Parallel adapters: one beside each FFN (He et al. 2022, arXiv 2110.04366).

The adapter reads the FFN's input, not its output, and starts at zero.

    efft train --config=configs/parallel.py:task=rotten_tomatoes --workdir=runs/parallel
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'parallel': {'fn': 'adapter.parallel', 'size': 64, 'scale': 4.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
