"""README.md of this folder, from records.jsonl: by data, by time, and what the paper claims.

    python experiments/doering2024/findings.py

The same records give the same bytes. Plots are those of the folder report/:

    efft report --split=held_out --runs=experiments/doering2024 \\
      --output=experiments/doering2024/report
"""

import math
import statistics
from pathlib import Path

import pandas as pd
from absl import app
from study import METHODS, SHARES, TASKS

from efft import files
from efft.report import claims, records, selection

HERE = Path(__file__).parent
NAMES = {'bitfit': 'BitFit', 'pfeiffer': 'adapters', 'full': 'full fine-tuning'}
MIDDLE = (0.3, 0.5, 0.7)
MARGIN = 2.0  # points within which a method "keeps up"
INTRODUCTION = """# Doering et al. 2024, by data and by time

all-MiniLM-L6-v2 on the paper's three tasks, five seeds, in bfloat16; the metric x 100 (accuracy,
Matthews correlation, Pearson correlation): mean ± standard deviation, and the worst seed in
brackets. One rate for each method, fixed beforehand. Scores are of the test split, of cola, whose
test split has no labels, of the half of the validation split that chooses nothing. By data: nested
subsets, and the same number of steps for all of them: stsb 720 and mrpc 460 of 8 (an epoch of the
whole), cola 800 of 16; texts are cut to 48, 64 and 20 tokens. By time: all of the data, and as many
steps as a run alone makes in that time on one core of the machine that measured SPEED. Where °
stands, all seeds score exactly alike or not above 0: one class for all, nothing was learnt. The
paper names neither model nor rates, shares or budgets, so directions are compared, not numbers.
Cut: five shares in place of ten, cola's shorter budgets of time (a minute is its 590 to 1460
steps); `paper.py` asks for more.

Made by `efft sweep --study=experiments/doering2024/study.py --workdir=experiments/doering2024` and
`findings.py`.
"""


def cell(rows: pd.DataFrame, key: tuple) -> str:
  if key not in rows.index:
    return '-'
  row = rows.loc[key]
  mark = '°' if claims.flat(row) else ''
  return f'{100 * row["mean"]:.1f} ± {100 * row["sd"]:.1f} ({100 * row["worst"]:.1f}){mark}'


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


def pairs(rows, places, method: str, other: str):
  """(task, the method's row, the other's) at each place (a share or a budget)."""
  order = list(METHODS)
  for keys in places:
    new, old = keys[order.index(method)], keys[order.index(other)]
    if new in rows.index and old in rows.index:
      yield keys[0][0], rows.loc[new], rows.loc[old]


def differences(rows, places, method: str, other: str) -> dict[str, list[float]]:
  """Method - other of each task and seed, times 100: averages over the task's places.

  Places share data and seeds, so that they are no sample.
  """
  found: dict[str, list] = {}
  for task, new, old in pairs(rows, places, method, other):
    seeds = new['values'].keys() & old['values'].keys()
    found.setdefault(task, []).append({s: new['values'][s] - old['values'][s] for s in seeds})
  return {
    task: [
      100 * statistics.mean(values[seed] for values in some)
      for seed in sorted(set.intersection(*map(set, some)))
    ]
    for task, some in found.items()
  }


def spreads(rows, places, method: str, other: str) -> dict[str, list[float]]:
  """Of each task how many times as wide the method spreads over seeds: log2 of it, over places.

  One value a task, as places share data and seeds. Those at which one of both has learnt nothing,
  and so does not spread, are left out.
  """
  found: dict[str, list] = {}
  for task, new, old in pairs(rows, places, method, other):
    if not claims.flat(new) and not claims.flat(old):
      found.setdefault(task, []).append(math.log2(new['sd'] / old['sd']))
  return {task: [statistics.mean(values)] for task, values in found.items()}


def everywhere(text: str, rows, places: dict[str, list]) -> claims.Claim:
  """A claim that holds where it holds at each of the places: that at which it holds least."""
  order = (claims.DISAGREES, claims.OPEN, claims.AGREES)
  worst = []
  for name, keys in places.items():
    found = differences(rows, keys, 'bitfit', 'full')
    if found:
      claim = claims.judge(text, found, 'not less', unit=' points', margin=MARGIN)
      mean = statistics.mean(map(statistics.mean, found.values()))
      worst.append(
        (order.index(claim.verdict), mean, claim._replace(found=f'{name}: {claim.found}'))
      )
  if not worst:
    return claims.Claim(text, 'no runs', claims.OPEN)
  return min(worst, key=lambda each: each[:2])[2]


def judged(rows: pd.DataFrame) -> list[claims.Claim]:
  data = [by_data(task, share) for task in TASKS for share in SHARES]
  shares = {f'{share:.0%}': [by_data(task, share) for task in TASKS] for share in SHARES}
  time: dict[str, list] = {}
  for task, budget in TASKS.items():
    for seconds in budget.seconds:
      time.setdefault(f'{seconds} s', []).append(by_time(task, seconds))
  late = [by_data(task, share) for task in TASKS for share in SHARES if share >= 0.3]
  middle = [by_data(task, share) for task in TASKS for share in MIDDLE]

  def score(text, places, method, expected):
    found = differences(rows, places, method, 'full')
    margin = 0.0 if expected == 'more' else MARGIN
    return claims.judge(text, found, expected, unit=' points', margin=margin)

  def spread(text, places, method, expected):
    return claims.judge(text, spreads(rows, places, method, 'full'), expected, unit=' doublings')

  return [
    everywhere('BitFit keeps up with full fine-tuning at all amounts of data', rows, shares),
    everywhere('BitFit keeps up with full fine-tuning at all budgets of time', rows, time),
    score('BitFit is better than full fine-tuning at 30 to 70 % of the data', middle, 'bitfit',
          'more'),
    spread('BitFit is stable from 30 % on: its spread over seeds is below full fine-tuning\'s',
           late, 'bitfit', 'less'),
    spread('Adapters vary more over seeds than full fine-tuning does', data, 'pfeiffer', 'more'),
    score('Adapters bring no consistent gain over full fine-tuning', data, 'pfeiffer', 'not more'),
  ]  # fmt: skip


def main(argv):
  del argv
  found = records.read(HERE)
  rows, notes = selection.choose(selection.settings(found, 'held_out'), intervals=False)
  rows = rows.set_index(['task', 'fraction', 'arm']).sort_index()
  parts = [INTRODUCTION, '## By data\n']
  parts += [table(rows, task, {f'{s:.0%}': by_data(task, s) for s in SHARES}) for task in TASKS]
  parts.append('## By time\n')
  parts += [
    table(rows, task, {f'{s} s': by_time(task, s) for s in budget.seconds})
    for task, budget in TASKS.items()
  ]
  parts.append(claims.pictures(HERE))
  about = (
    'Differences are of each task and seed, averages over shares; what is claimed of all amounts '
    'or budgets is judged at each of them, and shown is the one at which it holds least. Spreads '
    'are standard deviations over seeds, compared at each task and share, in doublings: +1 is '
    "twice as wide. In brackets the 95 % interval of the mean for these tasks (Welch's t over "
    "seeds; of spreads, which have one value a task, Student's over tasks), and in how many tasks "
    f'the mean has the sign of the whole. To keep up is to be no more than {MARGIN:g} points '
    'below; no gain is to be no more than that above. All runs of a '
    'task are scored on the same examples, and what others would change is not in the intervals.'
  )
  text = claims.page(parts, judged(rows), about, notes, len(found.failed))
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
