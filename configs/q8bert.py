"""Q8BERT: int8 rounding simulated in training (Zafrir et al. 2019, arXiv 1910.06188).

All weights train. `efft merge` makes the real int8 model, whose integers are those trained with.

    efft train --config=configs/q8bert.py:task=rotten_tomatoes --workdir=runs/q8bert
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'q8bert': {'fn': 'fakequant.q8bert'}}
  config.rules = (
    ('params/head/.*', 'head'), ('delta/.*/(range|seen)', 'range'), ('delta/.*', 'delta'),
    ('params/.*', 'encoder'),
  )  # fmt: skip
  config.optim.groups = {'range': {'transform': {'fn': 'fakequant.average', 'decay': 0.9999}}}
  config.optim.lr = 2e-5
  return config
