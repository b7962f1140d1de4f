"""CoFi: coarse and fine gates with one target (Xia et al. 2022, arXiv 2204.00408).

Full fine-tuning; 60 % of the heads' and units' numbers are gone at the end and can be cut out.

    efft train --config=configs/cofi.py:task=rotten_tomatoes --workdir=runs/cofi
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'cofi': {'fn': 'gates.cofi'}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/target', 'schedule'), ('delta/.*', 'delta'),
    ('params/.*', 'encoder'),
  )  # fmt: skip
  ramp = {'fn': 'movement.schedule', 'final': 0.6, 'power': 1.0, 'warmup': 0.05, 'cooldown': 0.7}
  config.optim.groups = {
    'schedule': {'transform': ramp}, 'delta': {'lr': 1e-2, 'weight_decay': 0.0},
  }  # fmt: skip
  config.optim.lr = 3e-5
  config.train.save = 'last'  # an earlier step has pruned less
  return config
