"""LoReFT: edits of the first tokens in a subspace (Wu et al. 2024, arXiv 2404.03592).

Rank one in every layer: 0.017 % of BERT-base. A model pooled by [CLS] reads one of the tokens that
are edited; the default model reads the mean of all.

    efft train --config=configs/loreft.py:task=rotten_tomatoes --workdir=runs/loreft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'loreft': {'fn': 'intervene.loreft', 'rank': 1, 'first': 3}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 6e-4
  return config
