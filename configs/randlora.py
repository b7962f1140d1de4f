"""RandLoRA: scaled random bases of full rank (Albert et al. 2025, arXiv 2502.00987).

The bases are frozen and shared by all kernels; only how they are scaled trains.

    efft train --config=configs/randlora.py:task=rotten_tomatoes --workdir=runs/randlora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'randlora': {'fn': 'shards.randlora', 'rank': 32, 'alpha': 640.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/shared_randlora/.*', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
