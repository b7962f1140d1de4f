"""ATTEMPT: other tasks' prompts, mixed for each text (Asai et al. 2022, arXiv 2205.11961).

The sources, prompts of runs of configs/prompt.py, stay frozen; without runs they start as rows of
the word table. Name the runs behind the colon: --config.model.init_from comes too late to count.

    efft train --config=configs/attempt.py:task=rte,'init_from=runs/a|runs/b' --workdir=runs/mixed
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  n = len(config.model.init_from) or 2
  config.method = {'attempt': {'fn': 'prompt.attempt', 'n': n, 'length': 20}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*_attempt/prompt', 'frozen'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  config.optim.groups = {'delta': {'lr': 1e-2, 'weight_decay': 0.0}}
  return config
