"""MiSS: one matrix for all shards of the input (Kang & Yin 2024, arXiv 2409.15371).

LoRA whose A is fixed: it adds the input's shards up. Starts at zero and merges into the kernel.

    efft train --config=configs/miss.py:task=rotten_tomatoes --workdir=runs/miss
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'miss': {'fn': 'shards.miss', 'rank': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
