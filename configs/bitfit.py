"""BitFit: the biases alone (Ben Zaken et al. 2022, arXiv 2106.10199).

No new parameters and no cost at inference: 0.1 % of BERT-base trains, the pooler's bias included.

    efft train --config=configs/bitfit.py:task=rotten_tomatoes --workdir=runs/bitfit
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/.*/bias', 'bias'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
