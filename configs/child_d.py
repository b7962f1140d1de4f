"""Child-Tuning_D: the task's own child of the network (Xu et al. 2021, arXiv 2109.05687).

The layers' gradients are kept where the Fisher information is largest, 30 % of them; embeddings,
pooler and head train whole.

    efft train --config=configs/child_d.py:task=rotten_tomatoes --workdir=runs/child_d
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/layer_.*', 'encoder'),
    ('params/.*', 'rest'),
  )
  config.optim.groups = {'encoder': {'transform': {'fn': 'masks.child_d', 'density': 0.3}}}
  config.optim.lr = 5e-5
  return config
