"""Adapter+: a learnt scale a channel (Steitz and Roth 2024, arXiv 2406.06820).

One small adapter behind each layer; whole examples skip it at random while training.

    efft train --config=configs/adapter_plus.py:task=rotten_tomatoes --workdir=runs/adapter_plus
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'adapter': {'fn': 'adapter.adapter_plus', 'reduction': 96}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
