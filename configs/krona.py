"""KronA: Kronecker products as updates (Edalati et al. 2022, arXiv 2212.10650).

Full rank from few numbers: a 16 x 16 block pattern times one block.

    efft train --config=configs/krona.py:task=rotten_tomatoes --workdir=runs/krona
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'krona': {'fn': 'kron.krona', 'shape': (16, 16)}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
