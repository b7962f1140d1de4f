"""Markdown table of records.jsonl, which run.py makes: every config's score on the half that chose
nothing.

python experiments/methods/table.py
"""

import math
import statistics
from pathlib import Path

from absl import app

from efft import catalogue, files

HERE = Path(__file__).parent
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
  records = files.read_jsonl(HERE / 'records.jsonl')
  cells, costs = final(records), files.read_json(catalogue.FILE)
  names = sorted({name for name, _ in cells}, key=lambda n: (costs[n]['family'], n))
  head = ('family', 'config', *TASKS, 'trained', 'stored')
  print('| ' + ' | '.join(head) + ' |')
  print('|' + '---|' * len(head))
  for name in names:
    row = [costs[name]['family'], name]
    row += [score(cells[name, task]) if (name, task) in cells else '-' for task in TASKS]
    row += [f'{costs[name]["trained"]:,}', f'{costs[name]["stored"]:,}']
    print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  app.run(main)
