"""BitFit with two biases a layer: query and FFN (Ben Zaken et al. 2022, arXiv 2106.10199).

The paper's smaller set, 0.04 % of BERT-base; configs/sbitfit.py lets the data choose.

    efft train --config=configs/bitfit_subset.py:task=rotten_tomatoes --workdir=runs/bitfit_subset
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    (r'params/layer_\d+/(attention/query|mlp/up)/bias', 'bias'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
