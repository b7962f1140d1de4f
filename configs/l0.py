"""L0 gates of heads and units (Louizos et al. 2018, arXiv 1712.01312).

Full fine-tuning; gates are drawn while training, and those that close for good can be cut out.

    efft train --config=configs/l0.py:task=rotten_tomatoes --workdir=runs/l0
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'l0': {'fn': 'gates.l0', 'heads': 0.02, 'units': 2e-4}}
  config.rules = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('params/.*', 'encoder'))
  config.optim.groups = {'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  config.optim.lr = 3e-5
  config.train.save = 'last'  # an earlier step has pruned less
  return config
