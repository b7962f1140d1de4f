"""LoRA-FA: LoRA with A frozen at its start (Zhang et al. 2023, arXiv 2308.03303).

Half of the numbers of LoRA, and no activations kept for the gradient of A.

    efft train --config=configs/lora_fa.py:task=rotten_tomatoes --workdir=runs/lora_fa
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/a', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
