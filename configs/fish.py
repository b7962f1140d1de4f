"""FISH mask: weights of most Fisher information (Sung et al. 2021, arXiv 2111.09839).

0.5 % of the encoder trains, chosen once from the squared gradients of 1024 training examples.

    efft train --config=configs/fish.py:task=rotten_tomatoes --workdir=runs/fish
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.fish', 'density': 0.005}}}
  config.optim.lr = 5e-4
  return config
