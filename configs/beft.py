"""BEFT: the biases of the values alone (2025, arXiv 2509.15974).

The bias of the value projections, and no other: 9,216 numbers in BERT-base, a tenth of
BitFit's.

    efft train --config=configs/beft.py:task=rotten_tomatoes --workdir=runs/beft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/layer_.*/attention/value/bias', 'bias'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-3
  return config
