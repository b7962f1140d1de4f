"""LoHa: the Hadamard product of two LoRAs (Hyeon-Woo et al. 2021, arXiv 2108.06098).

Twice the numbers of LoRA for the square of its rank.

    efft train --config=configs/loha.py:task=rotten_tomatoes --workdir=runs/loha
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'loha': {'fn': 'kron.loha', 'rank': 8, 'alpha': 8.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
