"""rsLoRA: LoRA scaled by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732).

With the root a large rank learns as fast as a small one. The scale here, 16 / sqrt(64), is that
of configs/lora.py.

    efft train --config=configs/rslora.py:task=rotten_tomatoes --workdir=runs/rslora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 64, 'alpha': 16.0, 'use_rslora': True}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
