"""AdapterFusion: attention over adapters (Pfeiffer et al. 2020, arXiv 2005.00247).

Mixes adapters of runs of configs/pfeiffer.py, which stay frozen; without runs, two of its own.
Name the runs behind the colon: --config.model.init_from comes too late to count and freeze them.

    efft train --config=configs/fusion.py:task=rte,'init_from=runs/a|runs/b' --workdir=runs/fusion
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  others = len(config.model.init_from)
  config.method = {'fusion': {'fn': 'hybrid.fusion', 'n': others or 2, 'reduction': 16}}
  config.rules = (
    ('params/head/.*', 'head'),
    *((('delta/.*_fusion/(down|up).*', 'frozen'),) if others else ()),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 5e-5
  return config
