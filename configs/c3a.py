"""C3A: circulant updates of query and value (Chen et al. 2024, arXiv 2407.19342).

One vector a square block, which may have full rank: 18,432 numbers in BERT-base with one block
a kernel. Smaller blocks (block_size) train more.

    efft train --config=configs/c3a.py:task=rotten_tomatoes --workdir=runs/c3a
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'c3a': {'fn': 'spectral.c3a'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-1
  return config
