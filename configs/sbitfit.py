"""S-BitFit: whole bias vectors, chosen by the data (Lawton et al. 2023, arXiv 2305.16597).

A third of what BitFit trains: whole bias vectors with the most Fisher information.

    efft train --config=configs/sbitfit.py:task=rotten_tomatoes --workdir=runs/sbitfit
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/.*/bias', 'bias'),
    ('params/.*', 'frozen'),
  )
  chosen = {'fn': 'masks.fish', 'density': 0.33, 'unit': 'leaf'}
  config.optim.groups = {'bias': {'transform': chosen}}
  config.optim.lr = 2e-3
  return config
