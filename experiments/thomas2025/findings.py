"""README.md of this folder, from records.jsonl: scores, costs, recommendations, claims.

    python experiments/thomas2025/findings.py

The same records give the same bytes. Plots are those of the folder report/:

    efft report --runs=experiments/thomas2025 --output=experiments/thomas2025/report
"""

import math
from pathlib import Path

import pandas as pd
from absl import app
from study import ARMS, TASKS

from efft import files
from efft.report import claims, recommend, records, selection
from efft.report.records import shape_column

HERE = Path(__file__).parent
COSTS = {
  'trained': ('parameters.trained', 1, ',.0f'),
  'step, ms': ('train.step_ms', 1, '.0f'),
  'step, MB': ('memory_mb.step', 1, '.0f'),
  'training, s': ('train.seconds', 1, '.0f'),
  '1 x 64, ms': (shape_column(1, 64), 1, '.2f'),
  '32 x 64, ms': (shape_column(32, 64), 1, '.1f'),
  'inference, MB': ('memory_mb.inference', 1, '.1f'),
  'whole, MB': ('bytes.whole', 1e-6, '.1f'),
}
MARGIN = 2.0
INTRODUCTION = """# Thomas 2025, each saving alone and all at once

all-MiniLM-L6-v2, two tasks of sentiment (sst2, rotten_tomatoes) and two of topic (r8,
20newsgroups), three seeds, 375 steps of 8 examples in float32, each run alone on one core;
accuracy x 100 on the half of the validation split that chooses nothing. The paper names neither
models nor numbers, so directions are compared. One rate for each arm, fixed beforehand; an arm that
removes layers trains 250 steps before and 125 after, with the unpruned model as its teacher. Texts
are cut to 48 (sentiment), 64 (r8) and 96 tokens. Costs are medians over tasks and seeds;
`whole` is the model standing alone on the disk; of stages, `step, ms` is the mean over all training
steps and `step, MB` that of the stage that needs most. Made by
`efft sweep --study=experiments/thomas2025/study.py --workdir=experiments/thomas2025` and
`findings.py`.
"""


def scores(rows: pd.DataFrame) -> str:
  lines = [f'| | {" | ".join(TASKS)} | average |', '|---|' + '--:|' * (len(TASKS) + 1)]
  for arm in ARMS:
    lines.append(f'| {arm} | {" | ".join(claims.scores(rows, arm, TASKS))} |')
  return '\n'.join(lines) + '\n'


def costs(table: pd.DataFrame) -> str:
  lines = [f'| | {" | ".join(COSTS)} |', '|---|' + '--:|' * len(COSTS)]
  for arm in ARMS:
    own = table[table['arm'] == arm]
    cells = [
      format(scale * own[column].median(), form) if column in own and len(own) else '-'
      for column, scale, form in COSTS.values()
    ]
    lines.append(f'| {arm} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def differences(table: pd.DataFrame, arm: str, other: str, column: str) -> dict[str, list[float]]:
  """Of each task and seed, in percent of the other arm; of 'score' in points."""
  both = [table[table['arm'] == name].set_index(['task', 'seed']) for name in (arm, other)]
  found: dict[str, list[float]] = {}
  for task, seed in sorted(set(both[0].index) & set(both[1].index)):
    new, old = (float(each.loc[(task, seed), column]) for each in both)
    if math.isnan(new) or math.isnan(old):
      continue
    found.setdefault(task, []).append(100 * (new - old if column == 'score' else new / old - 1))
  return found


def judged(table: pd.DataFrame) -> list[claims.Claim]:
  found = []

  def claim(text, arm, other, column, expected='less'):
    unit, margin = (' points', MARGIN) if column == 'score' else (' %', 0.0)
    given = differences(table, arm, other, column)
    found.append(claims.judge(text, given, expected, margin=margin, unit=unit))

  for arm, name in (('lora', 'LoRA'), ('adapter', 'Adapters')):
    claim(
      f'{name}: a training step takes less time than of full fine-tuning',
      arm,
      'full',
      'train.step_ms',
    )
    claim(f'{name}: and less memory', arm, 'full', 'memory_mb.step')
    claim(f'{name}: at the same score, within {MARGIN:g} points', arm, 'full', 'score', 'not less')
  slow, small = shape_column(32, 64), 'bytes.whole'
  for arm, name in (
    ('layers', 'Layers removed'),
    ('int8', 'int8'),
    ('layers + int8 + lora', 'All at once'),
  ):
    claim(f'{name}: inference takes less time than of the full model', arm, 'full', slow)
    claim(f'{name}: and less memory', arm, 'full', 'memory_mb.inference')
    claim(f'{name}: the model is smaller', arm, 'full', small)
    claim(f'{name}: at the same score, within {MARGIN:g} points', arm, 'full', 'score', 'not less')
  for other in ('layers', 'int8'):
    claim(f'All at once is faster than {other} alone', 'layers + int8 + lora', other, slow)
    claim(f'All at once is smaller than {other} alone', 'layers + int8 + lora', other, small)
  return found  # fmt: skip


def recommendations(table: pd.DataFrame) -> str:
  """Of each task what to take: as fast as half of the full model's time, small, nearly as good."""
  lines = ['| task | limits | take | score | if not |', '|---|---|---|--:|---|']
  for task in TASKS:
    full = table[(table['task'] == task) & (table['arm'] == 'full')]
    if full.empty:
      continue
    half = round(float(full[shape_column(32, 64)].median()) / 2, 1)
    for limits in (
      {'max_latency_ms': half, 'latency_batch': 32, 'latency_length': 64},
      {'max_size_mb': 30.0},
      {'max_trained': 200_000, 'min_relative_metric': 0.97},
    ):
      told = recommend.recommend(HERE, task=task, **limits)
      flags = ' '.join(f'--{name}={value}' for name, value in limits.items())
      best, rest = told['choice'], told['runners_up']
      name = best['arm'] if told['fits'] else f'nothing fits; nearest: {best["arm"]}'
      low, high = (100 * best[side] for side in ('low', 'high'))
      score = f'{100 * best["mean"]:.1f} ({low:.1f} to {high:.1f})'
      second = f'{rest[0]["arm"]}: {rest[0]["verdict"]}' if rest else '-'
      lines.append(f'| {task} | `{flags}` | {name} | {score} | {second} |')
  return '\n'.join(lines) + '\n'


def main(argv):
  del argv
  found = records.read(HERE)
  rows, notes = selection.choose(selection.settings(found), intervals=False)
  own = found.table.reset_index(drop=True)
  own['score'] = [
    row[f'metrics.report.{row["metric"]}'] for _, row in own.iterrows()
  ]  # fmt: skip
  parts = [INTRODUCTION, scores(rows), '## Costs\n', costs(own)]
  parts += ['## What to take\n', recommendations(own)]
  about = (
    'Differences are of each task and seed, to the arm that is named; in brackets the 95 % '
    "interval of their mean for these tasks (Welch's t over seeds), and in how many tasks the mean "
    'has the sign of the whole.'
  )
  text = claims.page([*parts, claims.pictures(HERE)], judged(own), about, notes, len(found.failed))
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
