"""Movement pruning with LoRA inside of the masks (Sanh et al. 2020, arXiv 2005.07683).

What is pruned is W + A B: scores, A and B train, W does not; 15 % of each kernel is left.

    efft train --config=configs/movement_lora.py:task=rotten_tomatoes --workdir=runs/movement_lora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'movement': {'fn': 'movement.movement', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/keep', 'schedule'), ('delta/.*/score', 'score'),
    ('delta/.*', 'delta'), ('params/.*', 'frozen'),
  )  # fmt: skip
  cubic = {'fn': 'movement.schedule', 'final': 0.15, 'warmup': 0.1, 'cooldown': 0.2}
  config.optim.groups = {
    'schedule': {'transform': cubic}, 'score': {'lr': 1e-2, 'weight_decay': 0.0},
  }  # fmt: skip
  config.optim.lr = 1e-3
  config.train.save = 'last'  # an earlier step has pruned less
  return config
