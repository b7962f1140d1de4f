"""Block movement pruning of blocks and units (Lagunas et al. 2021, arXiv 2109.04838).

Blocks of 32 x 32 in attention and whole feed-forward units: the empty ones can be cut out. Another
threshold is two fields: method.block.threshold and optim.groups.schedule.transform.final.

    efft train --config=configs/block_movement.py:task=rotten_tomatoes --workdir=runs/block
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'block': {'fn': 'movement.block', 'threshold': 0.1, 'penalty': 10.0}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/threshold', 'schedule'), ('delta/.*', 'delta'),
    ('params/embed/.*', 'frozen'), ('params/.*', 'encoder'),
  )  # fmt: skip
  cubic = {'fn': 'movement.schedule', 'final': 0.1, 'warmup': 0.1, 'cooldown': 0.2}
  config.optim.groups = {
    'schedule': {'transform': cubic}, 'delta': {'lr': 1e-2, 'weight_decay': 0.0},
  }  # fmt: skip
  config.optim.lr = 3e-5
  config.train.save = 'last'  # an earlier step has pruned less
  return config
