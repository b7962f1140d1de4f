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
            100 * record['metrics'][metric]
            for record in records
            if (record['task'], record['pooling'], record['method']) == (task, pooling, method)
          ]
          means.append(statistics.mean(found))
          cells.append(f'{means[-1]:.1f} ± {statistics.stdev(found):.1f}')
        row = (f'{task}, {metric}', pooling, method, *cells, f'{means[0] - means[1]:+.1f}')
        print('| ' + ' | '.join(row) + ' |')


if __name__ == '__main__':
  main()
