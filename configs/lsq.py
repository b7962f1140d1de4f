"""LSQ: 8 bits whose steps train too (Esser et al. 2020, arXiv 1902.08153).

All weights train. --config.method.lsq.bits=4 is W4A8, and embeddings=2 a table of words of 2 bits.

    efft train --config=configs/lsq.py:task=rotten_tomatoes --workdir=runs/lsq
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lsq': {'fn': 'fakequant.lsq', 'bits': 8, 'input_bits': 8}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*_unit', 'frozen'), ('delta/.*', 'delta'),
    ('params/.*', 'encoder'),
  )  # fmt: skip
  config.optim.groups = {'delta': {'lr': 1e-3}}
  config.optim.lr = 2e-5
  return config
