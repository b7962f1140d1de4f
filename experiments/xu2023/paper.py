"""The rows of study.py for the survey's own encoders and all eight tasks of its GLUE table.

    efft sweep --study=experiments/xu2023/paper.py --workdir=runs/xu2023 [--shard=i/n]

For a machine with an accelerator and the hub; never run here. Sizes are those that give
the survey's counts of parameters; its rates and epochs are not known to us, so each row tries three
rates.
"""

import runpy
from pathlib import Path

from efft.sweep import Run, product, seeds

STUDY = runpy.run_path(str(Path(__file__).with_name('study.py')))
MODELS = ('roberta-base', 'roberta-large')
TASKS = {'cola': 10, 'sst2': 3, 'mrpc': 10, 'stsb': 10, 'qqp': 3, 'mnli': 3, 'qnli': 3, 'rte': 10}
SIZES = {'houlsby': {'method.houlsby.size': 200}, 'mam': {'method.mam.hidden': 800}}


def runs():
  for model in MODELS:
    for task, epochs in TASKS.items():
      for row, (config, *_) in STUDY['ROWS'].items():
        fixed = {
          **SIZES.get(config, {}), 'model.name': model, 'model.max_length': 128,
          'model.dtype': 'bfloat16',
          'train.batch_size': 32, 'train.epochs': float(epochs),
          'train.group_by_length': True,
        }  # fmt: skip
        rates = [STUDY['rates'](config, factor) for factor in (1 / 3, 1, 3)]
        for overrides in product([fixed], rates, seeds(3)):
          yield Run(f'{row}, {model}', f'configs/{config}.py:task={task}', overrides)
