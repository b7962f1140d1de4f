"""Markdown table of records.jsonl: every config's score on the half that chose nothing.

Speed is that of a config's fastest run, because others may have had to share their core.

python experiments/methods/table.py [--steps=400]
"""

import math
import statistics
from pathlib import Path

from absl import app, flags

from efft import catalogue, files

HERE = Path(__file__).parent
STEPS = flags.DEFINE_integer('steps', 400, 'of the runs to show')
TASKS = ('stsb', 'cola')
SEEDS = (0, 1, 2)


def final(records: list[dict]) -> dict:
  """{(config, task): its records at the learning rate of its family, by seed}.

  Of a config that searched for its family, the factor is what was best on the half that chooses.
  """
  cells: dict = {}
  for record in records:
    cells.setdefault((record['config'], record['task']), []).append(record)

  def rank(record):
    score = record['chosen']
    return (-math.inf, -math.inf) if score is None else (score, -record['chosen_loss'])

  out = {}
  for key, found in cells.items():
    best = max((r for r in found if r['seed'] == 0), key=rank)['factor']
    kept = {r['seed']: r for r in found if r['factor'] == best}
    out[key] = [kept[seed] for seed in sorted(kept)]
  return out


def score(records: list[dict]) -> str:
  values = [100 * r['reported'] for r in records if r['reported'] is not None]
  if not values:
    return records[0].get('error', 'not a number')[:40]
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  missing = '' if len(values) == len(SEEDS) else f' ({len(values)} of {len(SEEDS)} seeds)'
  return f'{statistics.mean(values):.1f} ± {spread:.1f}{missing}'


def main(argv):
  del argv
  records = [r for r in files.read_jsonl(HERE / 'records.jsonl') if r['steps'] == STEPS.value]
  cells, costs = final(records), files.read_json(catalogue.FILE)
  names = sorted({name for name, _ in cells}, key=lambda n: (cells_family(records, n), n))
  head = ('family', 'config', *TASKS, 'trained', 'stored', 'examples/s', 'peak MB')
  print('| ' + ' | '.join(head) + ' |')
  print('|' + '---|' * len(head))
  for name in names:
    runs = [r for task in TASKS for r in cells.get((name, task), [])]
    # 'loaded': made while the machine had other work to do.
    speed = [
      r['examples_per_second'] for r in runs if r.get('examples_per_second') and not r.get('loaded')
    ]
    peak = [r['peak_mb'] for r in runs if 'peak_mb' in r]
    row = [cells_family(records, name), name]
    row += [score(cells[name, task]) if (name, task) in cells else '-' for task in TASKS]
    row += (
      [f'{costs[name]["trained"]:,}', f'{costs[name]["stored"]:,}'] if name in costs else ['-'] * 2
    )
    row += [
      f'{max(speed):.0f}' if speed else '-',
      f'{max(peak):.0f}' if peak else '-',
    ]
    print('| ' + ' | '.join(row) + ' |')


def cells_family(records: list[dict], name: str) -> str:
  return next(r['family'] for r in records if r['config'] == name)


if __name__ == '__main__':
  app.run(main)
