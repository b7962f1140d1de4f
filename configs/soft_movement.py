"""Soft movement pruning, by a threshold (Sanh et al. 2020, arXiv 2005.07683).

A rising threshold and a penalty of the scores decide how much is left, each kernel for itself.
Another threshold is two fields: method.soft.threshold and optim.groups.schedule.transform.final.

    efft train --config=configs/soft_movement.py:task=rotten_tomatoes --workdir=runs/soft_movement
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'soft': {'fn': 'movement.soft', 'threshold': 0.1, 'penalty': 400.0}}
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
