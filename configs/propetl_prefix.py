"""ProPETL of prefixes: one, a mask for each layer (Zeng et al. 2023, arXiv 2305.17682).

Half of the numbers of 64 keys and values act in each layer.

    efft train --config=configs/propetl_prefix.py:task=rotten_tomatoes --workdir=runs/out
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'propetl': {'fn': 'wrap.propetl_prefix', 'length': 64, 'keep': 0.5}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*_scores', 'scores'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'scores': {'lr': 3e-3}}
  return config
