"""PEG: LoRA beside simulated 8-bit tensors (Bondarenko et al. 2021, arXiv 2109.12948).

Six groups of dimensions share ranges where feed-forward blocks meet the residual. One range each is
--config.method.int8.groups=1; with block_bits=16 as well, these tensors have 16 bits. It tells what
is lost; nothing gets faster.

    efft train --config=configs/peg.py:task=rotten_tomatoes --workdir=runs/peg
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'int8': {'fn': 'activations.w8a8', 'groups': 6},
    'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0},
  }
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*_int8/.*', 'frozen'), ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )  # fmt: skip
  config.optim.lr = 1e-3
  return config
