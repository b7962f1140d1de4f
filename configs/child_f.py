"""Child-Tuning_F: a random child at every step (Xu et al. 2021, arXiv 2109.05687).

Gradients are kept with probability 0.3 and scaled up, in the head too. Regularises: everything
trains in the end.

    efft train --config=configs/child_f.py:task=rotten_tomatoes --workdir=runs/child_f
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  child = {'transform': {'fn': 'masks.child_f', 'density': 0.3}}
  config.optim.groups = {'head': child, 'encoder': child}
  config.optim.lr = 5e-5
  return config
