"""LT-SFT: train all, keep the movers, train those (Ansell et al. 2022, arXiv 2110.07560).

Takes twice the time of full fine-tuning: the first training only finds the mask.

    efft train --config=configs/lt_sft.py:task=rotten_tomatoes --workdir=runs/lt_sft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.lt_sft', 'density': 0.08}}}
  config.optim.lr = 5e-5
  return config
