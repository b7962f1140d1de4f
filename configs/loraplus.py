"""LoRA+: a higher learning rate for B (Hayou et al. 2024, arXiv 2402.12354).

LoRA with 16 times the rate for B, which starts at zero and has to grow, than for A. Another rate
is two fields: optim.lr and optim.groups.b.lr.

    efft train --config=configs/loraplus.py:task=rotten_tomatoes --workdir=runs/loraplus
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*/b', 'b'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 2e-4
  config.optim.groups = {'b': {'lr': 16 * 2e-4}}
  return config
