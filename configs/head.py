"""Head only: the frozen encoder, probed (Alain and Bengio 2016, arXiv 1610.01644).

The baseline that others must beat. Nothing flows back into the encoder: the
cheapest step of all.

    efft train --config=configs/head.py:task=rotten_tomatoes --workdir=runs/head
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
