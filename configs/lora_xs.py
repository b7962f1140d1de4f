"""LoRA-XS: r x r numbers between singular vectors (Balazy et al. 2024, arXiv 2405.17604).

Everything else is frozen: 256 numbers a kernel at rank 16, whatever the width of the encoder.

    efft train --config=configs/lora_xs.py:task=rotten_tomatoes --workdir=runs/lora_xs
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lora_xs': {'fn': 'spectral_init.lora_xs', 'rank': 16, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/(a|b)', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 4e-3
  return config
