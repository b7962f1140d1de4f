"""README.md of this folder, from records.jsonl: by data, by time, and what the paper claims.

    python experiments/doering2024/findings.py

The same records give the same bytes. Plots: `efft report --runs=experiments/doering2024 ...`.
"""

import statistics
from pathlib import Path

import pandas as pd
from absl import app
from study import METHODS, SECONDS, TASKS

from efft import files
from efft.report import claims, records, selection

HERE = Path(__file__).parent
NAMES = {'bitfit': 'BitFit', 'pfeiffer': 'adapters', 'full': 'full fine-tuning'}
MIDDLE = (0.3, 0.4, 0.5, 0.6, 0.7)
MARGIN = 2.0  # points within which a method "keeps up"
INTRODUCTION = """# Doering et al. 2024, by data and by time

all-MiniLM-L6-v2 on the paper's three tasks, five seeds, in bfloat16; the metric x 100 (accuracy,
Matthews correlation, Pearson correlation): mean ± standard deviation, and the worst seed in
brackets. One rate for each method, fixed beforehand; scores are of the half of the validation split
that chooses nothing. By data: nested subsets, 150 steps of 8 for all of them (cola, which is learnt
late: 800 of 16). By time: all of the data, and as many steps as a run alone makes in that time on
the machine that measured SPEED. The paper names neither model nor rates, shares or budgets, so
directions are compared, not numbers.

Made by `efft sweep --study=experiments/doering2024/study.py --workdir=experiments/doering2024` and
`findings.py`.
"""


def cell(rows: pd.DataFrame, key: tuple) -> str:
  if key not in rows.index:
    return '-'
  row = rows.loc[key]
  return f'{100 * row["mean"]:.1f} ± {100 * row["sd"]:.1f} ({100 * row["worst"]:.1f})'


def table(rows: pd.DataFrame, task: str, lines: dict[str, list[tuple]]) -> str:
  """`lines`: {its first cell: the keys of its other cells}."""
  text = [f'| {task} | {" | ".join(NAMES[m] for m in METHODS)} |', '|---|' + '--:|' * len(METHODS)]
  for name, keys in lines.items():
    text.append(f'| {name} | {" | ".join(cell(rows, key) for key in keys)} |')
  return '\n'.join(text) + '\n'


def by_data(task: str, share: float) -> list[tuple]:
  return [(task, share, method) for method in METHODS]


def by_time(task: str, seconds: int) -> list[tuple]:
  return [(task, 1.0, f'{method}, {seconds} s') for method in METHODS]


def differences(rows, places, method: str, other: str, column: str) -> dict[str, list[float]]:
  """Method - other of each task, times 100: averages over its places (shares or budgets).

  Places share data and seeds, so that they are no sample. Of scores there is a value for each seed,
  of a spread over seeds one for the task.

  Args:
    rows: by task, share and arm.
    places: the keys of all methods there.
    column: 'mean' or 'sd'.
  """
  order = list(METHODS)
  found: dict[str, list] = {}
  for keys in places:
    new, old = keys[order.index(method)], keys[order.index(other)]
    if new not in rows.index or old not in rows.index:
      continue
    new, old = rows.loc[new], rows.loc[old]
    if column == 'sd':
      values = {None: new['sd'] - old['sd']}
    else:
      seeds = new['values'].keys() & old['values'].keys()
      values = {seed: new['values'][seed] - old['values'][seed] for seed in seeds}
    found.setdefault(keys[0][0], []).append(values)
  return {
    task: [
      100 * statistics.mean(values[seed] for values in some)
      for seed in sorted(set.intersection(*map(set, some)), key=str)
    ]
    for task, some in found.items()
  }


def judged(rows: pd.DataFrame) -> list[claims.Claim]:
  data = [by_data(task, share) for task in TASKS for share in TASKS[task].shares]
  time = [by_time(task, seconds) for task in TASKS for seconds in SECONDS]
  late = [by_data(task, share) for task in TASKS for share in TASKS[task].shares if share >= 0.3]
  middle = [by_data(task, share) for task in TASKS for share in MIDDLE]

  def claim(text, places, method, column, expected, **more):
    found = differences(rows, places, method, 'full', column)
    return claims.judge(text, found, expected, unit=' points', **more)

  same = {'expected': 'same', 'margin': MARGIN}
  return [
    claim('BitFit keeps up with full fine-tuning at all amounts of data', data, 'bitfit', 'mean',
          **same),
    claim('BitFit keeps up with full fine-tuning at all budgets of time', time, 'bitfit', 'mean',
          **same),
    claim('BitFit is better than full fine-tuning at 30 to 70 % of the data', middle, 'bitfit',
          'mean', 'more'),
    claim('BitFit is stable from 30 % on: its spread over seeds is below full fine-tuning\'s', late,
          'bitfit', 'sd', 'less'),
    claim('Adapters vary more over seeds than full fine-tuning does', data, 'pfeiffer', 'sd',
          'more'),
    claim('Adapters bring no consistent gain over full fine-tuning', data, 'pfeiffer', 'mean',
          **same),
  ]  # fmt: skip


def main(argv):
  del argv
  found = records.read(HERE)
  rows, notes = selection.choose(selection.settings(found), intervals=False)
  rows = rows.set_index(['task', 'fraction', 'arm']).sort_index()
  parts = [INTRODUCTION, '## By data\n']
  parts += [table(rows, t, {f'{s:.0%}': by_data(t, s) for s in b.shares}) for t, b in TASKS.items()]
  parts.append('## By time\n')
  parts += [table(rows, t, {f'{s} s': by_time(t, s) for s in SECONDS}) for t in TASKS]
  about = (
    'Differences are averages over shares or budgets, of scores one for each task and seed, of '
    'standard deviations one for each task; in brackets the 95 % interval of their mean for these '
    "tasks (Welch's t over seeds; of standard deviations Student's over tasks), and in how many "
    f'tasks the mean has the sign of the whole. To keep up is to be within {MARGIN:g} points.'
  )
  text = claims.page(parts, judged(rows), about, notes, len(found.failed))
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
