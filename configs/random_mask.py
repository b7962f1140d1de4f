"""Random mask: any 0.5 % of the weights (baseline of Sung et al. 2021, arXiv 2111.09839).

What masks that look at the data have to beat.

    efft train --config=configs/random_mask.py:task=rotten_tomatoes --workdir=runs/random_mask
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.random', 'density': 0.005}}}
  config.optim.lr = 5e-4
  return config
