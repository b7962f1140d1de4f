"""SHiRA: a few entries of each kernel (Bhardwaj et al. 2024, arXiv 2406.13175).

As many numbers as LoRA of the same rank, at random places: an update of full rank that merges
by adding them.

    efft train --config=configs/shira.py:task=rotten_tomatoes --workdir=runs/shira
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'shira': {'fn': 'shards.shira', 'rank': 8}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
