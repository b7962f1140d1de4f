"""SAM mask: the best weights to second order (Fu et al. 2022, arXiv 2211.15583).

0.5 % of the encoder trains, chosen once from the mean gradient of 1024 training examples.

    efft train --config=configs/sam_mask.py:task=rotten_tomatoes --workdir=runs/sam_mask
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.second_order', 'density': 0.005}}}
  config.optim.lr = 5e-4
  return config
