"""study.py by data for an encoder of the paper's time, all tenths of the data, GLUE but wnli.

    efft sweep --study=experiments/doering2024/paper.py --workdir=runs/doering2024 [--shard=i/n]

For a machine with an accelerator and the hub; never run here. The paper's abstract names neither
encoder nor epochs: these are what its time would have taken.
"""

import runpy
from pathlib import Path

from efft.sweep import Run, grid, product, seeds

STUDY = runpy.run_path(str(Path(__file__).with_name('study.py')))
MODEL = 'bert-base-uncased'
TASKS = ('mrpc', 'cola', 'stsb', 'rte', 'sst2', 'qnli', 'qqp', 'mnli')
TENTHS = [round(0.1 * n, 1) for n in range(1, 11)]


def runs():
  for task in TASKS:
    for method, rate in STUDY['METHODS'].items():
      fixed = {
        'model.name': MODEL, 'model.max_length': 128, 'model.dtype': 'bfloat16',
        'train.batch_size': 32, 'train.epochs': 5.0,
      }  # fmt: skip
      spaces = grid({'task.fraction': TENTHS}), grid({'optim.lr': [rate / 3, rate]}), seeds(5)
      for overrides in product([fixed], *spaces):
        yield Run(method, f'configs/{method}.py:task={task}', overrides)
