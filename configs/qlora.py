"""QLoRA: LoRA beside kernels of 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

All linears; NF4, a scale for 64 numbers, multiplied as floats: a seventh of the memory, not time.
Deviation: scales stay float32 (no double quantisation; half a bit a number).

    efft train --config=configs/qlora.py:task=rotten_tomatoes --workdir=runs/qlora
"""

from efft.config import default

LINEARS = r'layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))/matmul'


def get_config(arg=''):
  config = default(arg)
  config.model.quantize = 'nf4'
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0, 'at': LINEARS}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
