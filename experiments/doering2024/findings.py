"""README.md of this folder, from records.jsonl: by data, by time, and what the paper claims.

    python experiments/doering2024/findings.py

The same records give the same bytes. Plots: `efft report --runs=experiments/doering2024 ...`.
"""

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


def differences(rows, places, method: str, other: str, column: str) -> list[float]:
  """Of each place (the keys of all methods there) method - other, times 100."""
  order = list(METHODS)
  found = []
  for keys in places:
    new, old = keys[order.index(method)], keys[order.index(other)]
    if new in rows.index and old in rows.index:
      found.append(100 * float(rows.loc[new, column] - rows.loc[old, column]))
  return found


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
    f'Differences are of means (or standard deviations) over five seeds, one for each task and '
    f'share or budget; in brackets the 95 % interval of their mean. To keep up is to be within '
    f'{MARGIN:g} points.'
  )
  text = claims.page(parts, judged(rows), about, notes, len(found.failed))
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
