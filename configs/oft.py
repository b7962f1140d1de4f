"""OFT: rotated inputs of query and value (Qiu et al. 2023, arXiv 2306.07280).

Block-diagonal rotations keep the angles between a kernel's columns. They are made by an exact
Cayley transform; use_cayley_neumann takes a few terms of its series instead.

    efft train --config=configs/oft.py:task=rotten_tomatoes --workdir=runs/oft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'oft': {'fn': 'orthogonal.oft', 'block_size': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
