"""VB-LoRA: LoRA put together from a bank of vectors (Li et al. 2024, arXiv 2405.15179).

All kernels choose from one bank, by their logits' two largest; bank and logits train.

    efft train --config=configs/vblora.py:task=rotten_tomatoes --workdir=runs/vblora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'vblora': {'fn': 'shards.vblora', 'rank': 4, 'num_vectors': 96, 'vector_length': 128}
  }
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-2
  return config
