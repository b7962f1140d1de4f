"""Markdown table of records.jsonl beside peer.jsonl (transformers + PEFT, same budget).

python experiments/baseline/table.py
"""

import statistics
from pathlib import Path

from efft import files

HERE = Path(__file__).parent
METRIC = {'sst2': 'accuracy', 'mrpc': 'accuracy', 'cola': 'matthews', 'stsb': 'pearson'}


def main():
  sides = {name: files.read_jsonl(HERE / f'{name}.jsonl') for name in ('records', 'peer')}
  cells = sorted(
    {cell(r) for r in sides['records']}, key=lambda c: (list(METRIC).index(c[0]), c[1:])
  )
  print('| task, metric | steps | pooling | method | efft | transformers + PEFT | difference |')
  print('|---|---|---|---|---|---|---|')
  for key in cells:
    task, steps, pooling, method = key
    found = {
      name: [100 * (r['metrics'][METRIC[task]] or 0.0) for r in records if cell(r) == key]
      for name, records in sides.items()
    }
    scores = [score(values) for values in found.values()]
    ours, theirs = (statistics.mean(values) for values in found.values())
    row = (f'{task}, {METRIC[task]}', str(steps), pooling, method, *scores, f'{ours - theirs:+.1f}')
    print('| ' + ' | '.join(row) + ' |')


def cell(record: dict) -> tuple:
  return record['task'], record['steps'], record['pooling'], record['method']


def score(values: list[float]) -> str:
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  missing = '' if len(values) == 3 else f' ({len(values)} seeds)'
  return f'{statistics.mean(values):.1f} ± {spread:.1f}{missing}'


if __name__ == '__main__':
  main()
