"""Ladder side tuning: a small network beside (Sung et al. 2022, arXiv 2206.06522).

Nothing flows back through the encoder, whose activations are not stored.

    efft train --config=configs/ladder.py:task=rotten_tomatoes --workdir=runs/ladder
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'ladder': {'fn': 'ladder.ladder', 'reduction': 8}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
