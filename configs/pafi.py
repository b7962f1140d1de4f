"""PaFi: the weights of smallest magnitude train (Liao et al. 2023, arXiv 2305.16742).

The mask needs no data: the same 0.5 % of the encoder for every task.

    efft train --config=configs/pafi.py:task=rotten_tomatoes --workdir=runs/pafi
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.magnitude', 'density': 0.005}}}
  config.optim.lr = 5e-4
  return config
