"""LayerNorm tuning: their scales and biases (Qi et al. 2022, arXiv 2211.08682).

All of them, in the embeddings and in every layer: 0.035 % of BERT-base.

    efft train --config=configs/layernorm.py:task=rotten_tomatoes --workdir=runs/layernorm
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.rules = (
    ('params/head/.*', 'head'),
    ('params/.*norm/(scale|bias)', 'norm'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-3
  return config
