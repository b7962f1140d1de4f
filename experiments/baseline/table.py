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
  print('| task, metric | pooling | method | efft | transformers + PEFT | difference |')
  print('|---|---|---|---|---|---|')
  for task, metric in METRIC.items():
    for pooling in ('cls', 'mean'):
      for method in ('lora', 'full'):
        cells, means = [], []
        for records in sides.values():
          found = [
            100 * (record['metrics'][metric] or 0.0)
            for record in records
            if (record['task'], record['pooling'], record['method']) == (task, pooling, method)
          ]
          means.append(statistics.mean(found))
          spread = statistics.stdev(found) if len(found) > 1 else 0.0
          missing = '' if len(found) == 3 else f' ({len(found)} seeds)'
          cells.append(f'{means[-1]:.1f} ± {spread:.1f}{missing}')
        row = (f'{task}, {metric}', pooling, method, *cells, f'{means[0] - means[1]:+.1f}')
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  main()
