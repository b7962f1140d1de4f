"""ProPETL: one adapter, a mask for each layer (Zeng et al. 2023, arXiv 2305.17682).

All layers share the weights, and each trains which half of them it uses.

    efft train --config=configs/propetl_adapter.py:task=rotten_tomatoes --workdir=runs/out
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'propetl': {'fn': 'wrap.propetl_adapter', 'reduction': 12, 'keep': 0.5}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*_scores', 'scores'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'scores': {'lr': 3e-3}}
  return config
