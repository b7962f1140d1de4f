"""Threshold masks: which weights a task uses (Zhao et al. 2020, arXiv 2004.12406).

A score for every number of the kernels trains; where it falls below a threshold, the number is
left out of the model. Decay would leave out all of them.

    efft train --config=configs/threshold_mask.py:task=rotten_tomatoes --workdir=runs/masked
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'masking': {'fn': 'diff.threshold_mask', 'tau': 0.01, 'init_sparsity': 0.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'delta': {'lr': 5e-4, 'weight_decay': 0.0}}
  return config
