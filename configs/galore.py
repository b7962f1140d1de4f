"""GaLore: all weights, optimiser states of low rank (Zhao et al. 2024, arXiv 2403.03507).

Every weight trains; of the layers' kernels adam remembers moments of rank 4 only.

    efft train --config=configs/galore.py:task=rotten_tomatoes --workdir=runs/galore
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    (r'params/layer_\d+/.*/kernel', 'kernel'),
    ('params/.*', 'rest'),
  )
  low = {'fn': 'galore.galore', 'rank': 4, 'update_proj_gap': 500, 'scale': 4.0}
  config.optim.groups = {'kernel': {'transform': low}}
  config.optim.lr = 3e-5
  return config
