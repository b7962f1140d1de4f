"""The arms of study.py for an encoder of the paper's size, whole epochs and more topics.

    efft sweep --study=experiments/thomas2025/paper.py --workdir=runs/thomas2025 [--shard=i/n]

For a machine with an accelerator and the hub; never run here. The paper names neither models nor
data beyond "sentiment analysis and topic classification".
"""

import copy
import runpy
from pathlib import Path

from efft.sweep import Run, product, seeds

STUDY = runpy.run_path(str(Path(__file__).with_name('study.py')))
POPULATIONS = False
LATENCY = [(1, 128, 'f32'), (32, 128, 'f32'), (32, 128, 'bf16'), (32, 128, 'int8')]
MODEL = 'bert-base-uncased'
TASKS = ('sst2', 'rotten_tomatoes', 'imdb', 'ag_news', 'r8', '20newsgroups')
EPOCHS, AFTER = 3.0, 1.0  # all arms train as long; those that prune, AFTER of it on what is left


def whole(stages: dict) -> dict:
  """Stages that train again do so for AFTER epochs."""
  stages = copy.deepcopy(stages)
  for stage in stages.values():
    if 'train' in stage:
      stage['train'] = {'epochs': AFTER}
  return stages


def runs():
  for task in TASKS:
    for arm, (config, change, stages) in STUDY['ARMS'].items():
      again = any('train' in stage for stage in stages.values())
      fixed = {
        'model.name': MODEL, 'model.max_length': 128, 'train.batch_size': 32,
        'train.epochs': EPOCHS - AFTER * again, **change,
      }  # fmt: skip
      if stages:
        fixed['stages'] = whole(stages)
      for overrides in product([fixed], seeds(3)):
        yield Run(arm, f'configs/{config}.py:task={task}', overrides)
