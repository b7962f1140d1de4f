"""UniPELT: gated prefixes, adapters and LoRA (Mao et al. 2022, arXiv 2110.07577).

Each of the three has gates that decide, for every example and site, how much of it acts.

    efft train --config=configs/unipelt.py:task=rotten_tomatoes --workdir=runs/unipelt
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'unipelt': {'fn': 'hybrid.unipelt', 'length': 10, 'hidden': 512}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-4
  return config
