"""ProPETL of LoRA: one update, a mask for each layer (Zeng et al. 2023, arXiv 2305.17682).

A tenth of a rank of 32 acts in each layer.

    efft train --config=configs/propetl_lora.py:task=rotten_tomatoes --workdir=runs/propetl_lora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'propetl': {'fn': 'wrap.propetl_lora', 'rank': 32, 'keep': 0.1}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*_scores', 'scores'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'scores': {'lr': 3e-2}}
  return config
