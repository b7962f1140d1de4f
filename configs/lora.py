"""LoRA: low-rank updates of query and value (Hu et al. 2021, arXiv 2106.09685).

The kernels change by (alpha / rank) A B, so the trained model merges into one without adapters.
The rate is that of small encoders: ten to twenty times the one of full fine-tuning.

    efft train --config=configs/lora.py:task=rotten_tomatoes --workdir=runs/lora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
