"""RED: scale and shift of the FFN's output (Wu et al. 2024, arXiv 2402.15179).

2 d numbers a layer, which merge into the FFN's second linear layer.

    efft train --config=configs/red.py:task=rotten_tomatoes --workdir=runs/red
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'red': {'fn': 'intervene.red'}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
