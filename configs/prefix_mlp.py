"""Prefix tuning, reparametrised: prefixes that a network computes (Li and Liang 2021).

arXiv 2101.00190. The network is for training only: 9.9 million numbers in BERT-base, of which
368,640 act in the end.

    efft train --config=configs/prefix_mlp.py:task=rotten_tomatoes --workdir=runs/prefix_mlp
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'prefix': {'fn': 'prefix.prefix', 'length': 20, 'hidden': 512}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
