"""VeRA: scales around shared random projections (Kopiczko et al. 2023, arXiv 2310.11454).

rank + d_out numbers a kernel, a seventh of LoRA at rank 8, and a rate of their own.

    efft train --config=configs/vera.py:task=rotten_tomatoes --workdir=runs/vera
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'vera': {'fn': 'shared_lowrank.vera', 'rank': 1024}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/shared_vera/.*', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-2
  config.optim.groups = {'head': {'lr': 4e-3}}
  return config
