"""Full fine-tuning: every weight (Devlin et al. 2019, arXiv 1810.04805).

What the others are measured by. The optimiser keeps two numbers for each weight: the most
memory and the largest run folder.

    efft train --config=configs/full.py:task=rotten_tomatoes --workdir=runs/full
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (('params/head/.*', 'head'), ('params/.*', 'encoder'))
  config.optim.lr = 5e-5
  return config
