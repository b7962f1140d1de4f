"""OLoRA: LoRA from the QR decomposition of the kernel (Buyukakyuz 2024, arXiv 2406.01775).

The rows of B start orthonormal, and the frozen kernel is what remains.

    efft train --config=configs/olora.py:task=rotten_tomatoes --workdir=runs/olora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'olora': {'fn': 'spectral_init.olora', 'rank': 8, 'alpha': 8.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/(a0|b0)', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
