"""Markdown table of records.jsonl: each task's metric, mean and sd over seeds.

python experiments/quantization/table.py
"""

import statistics
from pathlib import Path

from absl import app

from efft import files

HERE = Path(__file__).parent
METRICS = {'sst2': 'accuracy', 'mrpc': 'accuracy', 'cola': 'matthews', 'stsb': 'pearson'}
METRICS |= {'r8': 'accuracy'}


def mean(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  return f'{scale * statistics.mean(values):.{digits}f} ± {scale * spread:.{digits}f}'


def main(argv):
  del argv
  records = files.read_jsonl(HERE / 'records.jsonl')
  failed = [r for r in records if 'error' in r]
  records = [r for r in records if 'error' not in r]
  tasks = [task for task in METRICS if any(r['task'] == task for r in records)]
  head = ['', *(f'{task}, {METRICS[task]}' for task in tasks)]
  head += ['flips', 'outputs off by', 'MB of weights', 'MB on disk', 'runs']
  print('| ' + ' | '.join(head) + ' |\n' + '|---' * len(head) + '|')
  for variant in dict.fromkeys(r['variant'] for r in records):
    own = [r for r in records if r['variant'] == variant]
    cells = []
    for task in tasks:
      found = [r['metrics'][METRICS[task]] for r in own if r['task'] == task]
      cells.append(mean(found, 100) if found else '')
    flips = [r['flips'] for r in own if 'flips' in r and r['task'] != 'stsb']
    error = [r['off'] for r in own if r.get('off') is not None]
    cells += [
      mean(flips) if flips else '', f'{statistics.mean(error):.2%}' if error else '',
      f'{statistics.mean(r["whole_mb"] for r in own):.1f}',
      f'{statistics.mean(r["disk_mb"] for r in own):.1f}', str(len(own)),
    ]  # fmt: skip
    print(f'| {variant} | ' + ' | '.join(cells) + ' |')
  for record in failed:
    print(f'\nfailed: {record}')


if __name__ == '__main__':
  app.run(main)
