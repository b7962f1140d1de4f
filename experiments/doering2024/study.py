"""Doering et al. 2024 (arXiv 2401.04051): BitFit, adapters, full fine-tuning, by data and by time.

    export EFFT_DATA=FOLDER    # mrpc/, cola/ and stsb/, where the hub is out of reach
    efft sweep --study=experiments/doering2024/study.py --workdir=experiments/doering2024

The paper's abstract: BitFit keeps up with full fine-tuning at all amounts of data and time, is
stable from 30 % of the data on and better in the middle; adapters vary. Here: all-MiniLM-L6-v2 on
the paper's three tasks, five seeds that train together. By data: nested subsets, the same number of
steps for all, an epoch of the whole or more. By time: all of the data, as many steps as fit into a
budget by SPEED. `paper.py` asks for a larger encoder and all tenths of the data.
"""

from typing import NamedTuple

from efft.sweep import Run, product, seeds


class Budget(NamedTuple):
  max_length: int
  steps: int
  batch: int
  seconds: tuple[int, ...]


SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
# On cola nothing leaves the majority class before step 400 of 16.
TASKS = {
  'stsb': Budget(48, 720, 8, (10, 20, 40, 80)),
  'mrpc': Budget(64, 460, 8, (10, 20, 40, 80)),
  'cola': Budget(20, 800, 16, (30, 60)),
}
METHODS = {'bitfit': 2e-3, 'pfeiffer': 1e-3, 'full': 1e-4}
# Steps in a second, of a run alone on one core: 1000 / `train.step_ms` of such runs, here of 120
# steps on an EPYC (Zen 5). Measure those of your machine before the runs by time.
SPEED = {
  ('stsb', 'bitfit'): 13.9, ('stsb', 'pfeiffer'): 16.9, ('stsb', 'full'): 8.2,
  ('mrpc', 'bitfit'): 13.1, ('mrpc', 'pfeiffer'): 13.4, ('mrpc', 'full'): 6.9,
  ('cola', 'bitfit'): 23.2, ('cola', 'pfeiffer'): 24.3, ('cola', 'full'): 9.8,
}  # fmt: skip


def runs():
  for task, budget in TASKS.items():
    for method, rate in METHODS.items():
      fixed = {
        'model.max_length': budget.max_length, 'train.batch_size': budget.batch, 'optim.lr': rate,
        'train.save': 'last', 'model.dtype': 'bfloat16', 'train.group_by_length': task == 'cola',
      }  # fmt: skip
      budgets = [
        *((method, budget.steps, share) for share in SHARES),
        *((f'{method}, {s} s', round(s * SPEED[task, method]), 1.0) for s in budget.seconds),
      ]
      for arm, steps, share in budgets:
        more = {'train.steps': steps, 'train.eval_steps': steps, 'task.fraction': share}
        for overrides in product([fixed | more], seeds(5)):
          yield Run(arm, f'configs/{method}.py:task={task}', overrides)
