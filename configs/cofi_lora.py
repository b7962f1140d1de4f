"""CoFi with LoRA in place of full fine-tuning (Xia et al. 2022, arXiv 2204.00408).

Gates and LoRA of all six kernels train; gates act on outputs, so they also close what LoRA adds.

    efft train --config=configs/cofi_lora.py:task=rotten_tomatoes --workdir=runs/cofi_lora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  at = r'layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))/matmul'
  config.method = {'cofi': {'fn': 'gates.cofi'}, 'lora': {'fn': 'lora.lora', 'rank': 8, 'at': at}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/target', 'schedule'), ('delta/.*_lora/.*', 'lora'),
    ('delta/.*', 'delta'), ('params/.*', 'frozen'),
  )  # fmt: skip
  ramp = {'fn': 'movement.schedule', 'final': 0.6, 'power': 1.0, 'warmup': 0.05, 'cooldown': 0.7}
  config.optim.groups = {'schedule': {'transform': ramp}, 'delta': {'lr': 1e-2}}
  config.optim.lr = 1e-3
  config.train.save = 'last'  # an earlier step has pruned less
  return config
