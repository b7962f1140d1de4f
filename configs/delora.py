"""DeLoRA: low-rank directions of fixed strength (Bini et al. 2025, arXiv 2503.18225).

The length of LoRA's vectors is taken out and one strength a kernel trains in its place, so that
the update cannot run away.

    efft train --config=configs/delora.py:task=rotten_tomatoes --workdir=runs/delora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'delora': {'fn': 'shards.delora', 'rank': 8, 'delora_lambda': 1.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/w_norm', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
