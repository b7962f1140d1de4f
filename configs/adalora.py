"""AdaLoRA: low-rank updates that share a budget (Zhang et al. 2023, arXiv 2303.10512).

Starts with rank 12 at every site; the optimiser keeps the most important 8 a site on average.

    efft train --config=configs/adalora.py:task=rotten_tomatoes --workdir=runs/adalora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'adalora': {'fn': 'lora.adalora', 'rank': 12}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  budget = {'fn': 'budget.adalora', 'target_rank': 8}
  config.optim.groups = {'delta': {'transform': budget}}
  config.optim.lr = 1e-3
  config.train.save = 'last'  # an earlier step has more ranks
  return config
