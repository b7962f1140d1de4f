"""README.md of this folder, from records.jsonl: what an int8 base costs LoRA in accuracy.

    python experiments/lora_int8/findings.py

The same records give the same bytes.
"""

import statistics
from pathlib import Path

from absl import app
from study import ARMS, TASKS

from efft import files
from efft.report import claims, records

HERE = Path(__file__).parent
FLOAT = 'float'
MARGIN = 0.5  # points
INTRODUCTION = """# LoRA beside an int8 base

all-MiniLM-L6-v2, LoRA at configs/lora.py's defaults and 1e-3, the same steps of 16 (mrpc and r8
300, cola 1200) and five seeds for every arm; the metric x 100 (cola: Matthews correlation, else
accuracy), mean and standard deviation. `validation` is the mean of both halves, which have chosen
nothing; cola has no labels to test with. `step` is of the compiled training step, milliseconds at
the median and megabytes asked for; the seeds of an arm train together where they can, and a step is
then of one of them alone.
Made by `efft sweep --study=experiments/lora_int8/study.py --workdir=experiments/lora_int8` and
`findings.py`.
"""
ABOUT = """Differences in points are of each task and seed, of validation and of test where there
is one; in brackets the 95 % interval of their mean for these tasks (Welch's t over seeds), and in
how many tasks the mean has the sign of the whole. The bound is half a point: a claim whose interval
crosses it cannot be told."""


def scores(found: list[dict]) -> dict[tuple, dict[str, float]]:
  """{(task, arm, seed): {'validation': score, 'test': score}}."""
  scored = {}
  for record in found:
    own = {split: 100 * part[record['metric']] for split, part in record['metrics'].items()}
    halves = {'validation': (own['validation'] + own['report']) / 2}
    test = {'test': own['test']} if 'test' in own else {}
    scored[record['task'], record['arm'], record['seed']] = halves | test
  return scored


def table(found: list[dict], scored: dict) -> str:
  head = ('task', 'base', 'validation', 'test', 'step, ms', 'step, MB', 'with base, MB', 'seeds')
  lines = []
  for task in TASKS:
    for arm in ARMS:
      cells = {key[2]: own for key, own in scored.items() if key[:2] == (task, arm)}
      of = [r for r in found if (r['task'], r['arm']) == (task, arm)]

      def median(section, name, of=of, scale=1.0):
        values = [r[section][name] for r in of if r[section].get(name) is not None]
        return f'{scale * statistics.median(values):.1f}' if values else '-'

      parts = [
        claims.spread([own[split] for own in cells.values() if split in own], 2)
        for split in ('validation', 'test')
      ]
      parts += [median('train', 'step_ms'), median('memory_mb', 'step')]
      parts += [median('bytes', 'whole', scale=1e-6), str(len(cells))]
      lines.append((task, arm, *parts))
  return claims.table(head, lines, 2)


def judged(scored: dict) -> list[claims.Claim]:
  found = []
  for arm in ARMS:
    if arm == FLOAT:
      continue
    for split in ('validation', 'test'):
      differences = {
        task: [
          own[split] - scored[task, FLOAT, seed][split]
          for (other, name, seed), own in sorted(scored.items())
          if (other, name) == (task, arm) and split in own and (task, FLOAT, seed) in scored
        ]
        for task in TASKS
      }
      for task, values in differences.items():
        if values:
          text = f'{arm}, {task}, {split}: within half a point of the float base'
          found.append(claims.judge(text, {task: values}, 'same', margin=MARGIN, unit=' points'))
      text = f'{arm}, all tasks, {split}: within half a point of the float base'
      found.append(claims.judge(text, differences, 'same', margin=MARGIN, unit=' points'))
  return found


def main(argv):
  del argv
  read = records.read(HERE)
  # `Runs.table` has the last of several attempts of a run, by its place in `records`.
  found = [read.records[i] for i in read.table.index]
  scored = scores(found)
  parts = [INTRODUCTION, table(found, scored)]
  heading = 'Is it within half a point?'
  text = claims.page(parts, judged(scored), ABOUT, read.notes, len(read.failed), heading=heading)
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
