"""Hadamard adapter: w * F(x) + b after attention (Chen et al. 2023, arXiv 2407.11033).

The LayerNorm behind it trains too: 0.034 % of BERT-base.

    efft train --config=configs/hadamard.py:task=rotten_tomatoes --workdir=runs/hadamard
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'hadamard': {'fn': 'attention_adapter.hadamard'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*attention_norm/.*', 'norm'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
