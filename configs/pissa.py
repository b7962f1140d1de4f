"""PiSSA: LoRA from the principal singular vectors (Meng et al. 2024, arXiv 2404.02948).

The frozen kernel is what remains of it; the trained model still merges into one.

    efft train --config=configs/pissa.py:task=rotten_tomatoes --workdir=runs/pissa
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'pissa': {'fn': 'spectral_init.pissa', 'rank': 8, 'alpha': 8.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/(a0|b0)', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
