"""Block movement pruning with LoRA inside (Lagunas et al. 2021, arXiv 2109.04838).

In attention LoRA is masked, too; feed-forward kernels have LoRA beside. Threshold: block_movement.

    efft train --config=configs/block_movement_lora.py:task=rotten_tomatoes --workdir=runs/block
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  lora = {'fn': 'lora.lora', 'rank': 8, 'at': r'layer_\d+/mlp/(up|down)/matmul'}
  config.method = {'block': {'fn': 'movement.block', 'rank': 8, 'penalty': 10.0}, 'lora': lora}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/threshold', 'schedule'), ('delta/.*/score', 'score'),
    ('delta/.*', 'delta'), ('params/.*', 'frozen'),
  )  # fmt: skip
  cubic = {'fn': 'movement.schedule', 'final': 0.1, 'warmup': 0.1, 'cooldown': 0.2}
  config.optim.groups = {
    'schedule': {'transform': cubic}, 'score': {'lr': 1e-2, 'weight_decay': 0.0},
  }  # fmt: skip
  config.optim.lr = 1e-3
  config.train.save = 'last'  # an earlier step has pruned less
  return config
