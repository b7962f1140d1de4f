"""LoRA beside an int8 base: int8 products forward and for the gradient of the input.

Frozen kernels are rounded once, a scale for each output; activations and gradients by token, on the
fly. Embeddings are held in int8 too; LoRA, head, norms and all sums stay in float.

    efft train --config=configs/lora_int8.py:task=rotten_tomatoes --workdir=runs/lora_int8
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.model.quantize = 'int8'
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
