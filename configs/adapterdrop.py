"""AdapterDrop: none in the first five layers (Rueckle et al. 2021, arXiv 2010.11918).

Nothing flows back below the first adapter, so that training gets cheaper as well. The layers
left out are those of a regex: here of twelve layers.

    efft train --config=configs/adapterdrop.py:task=rotten_tomatoes --workdir=runs/adapterdrop
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'pfeiffer': {'fn': 'adapter.pfeiffer', 'at': r'layer_([5-9]|\d\d)/mlp_out'},
  }
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
