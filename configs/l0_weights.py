"""L0 gates of single weights (Louizos et al. 2018, arXiv 1712.01312).

Full fine-tuning but for the embeddings; how much is left follows from the penalty.

    efft train --config=configs/l0_weights.py:task=rotten_tomatoes --workdir=runs/l0_weights
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'l0': {'fn': 'gates.l0_weights', 'penalty': 125.0}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*', 'delta'),
    ('params/embed/.*', 'frozen'), ('params/.*', 'encoder'),
  )  # fmt: skip
  config.optim.groups = {'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  config.optim.lr = 3e-5
  config.train.save = 'last'  # an earlier step has pruned less
  return config
