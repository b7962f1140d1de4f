"""DoRA: LoRA beside a trained norm of each output (Liu et al. 2024, arXiv 2402.09353).

d_out numbers a kernel more than LoRA, and a norm of the whole kernel each step.

    efft train --config=configs/dora.py:task=rotten_tomatoes --workdir=runs/dora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'dora': {'fn': 'lora.dora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
