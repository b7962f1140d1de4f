"""RoAd: outputs turned in pairs (Liao & Monz 2024, arXiv 2409.00119).

One angle and one scale for each pair of outputs of every linear layer: 82,944 numbers in BERT-
base. Element-wise, so it costs next to nothing.

    efft train --config=configs/road.py:task=rotten_tomatoes --workdir=runs/road
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'road': {'fn': 'orthogonal.road', 'variant': 'road_1'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
