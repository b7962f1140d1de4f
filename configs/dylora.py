"""DyLoRA: one LoRA that serves every rank (Valipour et al. 2022, arXiv 2210.07558).

Each step trains the first r columns, r drawn. The run evaluates, merges and exports all 8, or what
--config.method.dylora.eval_rank=4 says when it is trained; another rank is another run.

    efft train --config=configs/dylora.py:task=rotten_tomatoes --workdir=runs/dylora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'dylora': {'fn': 'lora.dylora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
