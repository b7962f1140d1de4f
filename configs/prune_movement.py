"""Blocks and units that movement pruning closes while it fine-tunes, cut out, tuned again

    efft train --config=configs/prune_movement.py:task=rotten_tomatoes --workdir=runs/pruned

Lagunas et al. 2021, https://arxiv.org/abs/2109.04838; `penalty` decides how much goes. Another
threshold stands twice in a copy of this file: as the method's, and as the schedule's `final`.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.optim.lr = 1e-4
  cubic = {'fn': 'movement.schedule', 'final': 0.1, 'warmup': 0.1, 'cooldown': 0.2}
  groups = {'schedule': {'transform': cubic}, 'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  learn = {'method': {'block': {'fn': 'movement.block', 'penalty': 10.0}}}
  learn['optim'] = {'lr': 3e-5, 'groups': groups}
  learn['train'] = {'save': 'last'}  # an earlier step has pruned less
  learn['rules'] = (
    ('params/head/.*', 'head'), ('delta/.*/threshold', 'schedule'), ('delta/.*', 'delta'),
    ('params/embed/.*', 'frozen'), ('params/.*', 'encoder'),
  )  # fmt: skip
  config.stages = {'s1_tune': learn, 's2_dead': {'fn': 'prune.dead'}, 's3_tune': {}}
  return config
