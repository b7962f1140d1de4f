"""Movement pruning: 15 % of each kernel is left (Sanh et al. 2020, arXiv 2005.07683).

Full fine-tuning but for the embeddings; of each kernel 15 % of the weights are left at the end. The
zeros save no time, and space only where files are compressed.

    efft train --config=configs/movement.py:task=rotten_tomatoes --workdir=runs/movement
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'movement': {'fn': 'movement.movement'}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/keep', 'schedule'), ('delta/.*', 'delta'),
    ('params/embed/.*', 'frozen'), ('params/.*', 'encoder'),
  )  # fmt: skip
  cubic = {'fn': 'movement.schedule', 'final': 0.15, 'warmup': 0.1, 'cooldown': 0.2}
  config.optim.groups = {
    'schedule': {'transform': cubic}, 'delta': {'lr': 1e-2, 'weight_decay': 0.0},
  }  # fmt: skip
  config.optim.lr = 3e-5
  config.train.save = 'last'  # an earlier step has pruned less
  return config
