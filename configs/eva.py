"""EVA: LoRA along the principal activations (Paischer et al. 2024, arXiv 2410.07170).

A starts from the inputs that each linear sees in 64 training examples.

    efft train --config=configs/eva.py:task=rotten_tomatoes --workdir=runs/eva
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'eva': {'fn': 'spectral_init.eva', 'rank': 8, 'alpha': 8.0, 'examples': 64}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
