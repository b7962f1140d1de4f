"""AdaMix of LoRAs: a mixture, one drawn a step (Wang et al. 2022, arXiv 2205.12410).

Two passes over each batch draw different updates and are made to agree; their mean merges.

    efft train --config=configs/adamix_lora.py:task=rotten_tomatoes --workdir=runs/adamix_lora
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'adamix': {'fn': 'wrap.adamix_lora', 'experts': 4, 'rank': 4}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.train.consistency = 1.0
  return config
