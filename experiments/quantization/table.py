"""README.md of this folder, from records.jsonl (run.py): scores, sizes, and what papers claim.

    python experiments/quantization/table.py

The same records give the same bytes.
"""

import statistics
from pathlib import Path

from absl import app

from efft import files
from efft.report import claims

HERE = Path(__file__).parent
METRICS = {'sst2': 'accuracy', 'mrpc': 'accuracy', 'cola': 'matthews', 'stsb': 'pearson'}
METRICS |= {'r8': 'accuracy'}
BASE, LONGER = 'base', 'float'
SEEDS = 3
WORDS = {
  'base': 'the run that all start from',
  'dynamic': 'int8, inputs by token at run time',
  'static': 'int8, inputs by calibrated ranges',
  'static percentile': 'ranges that cut outliers off',
  'static mse': 'ranges of the least squared error',
  'static asymmetric': 'ranges with a zero point',
  'smoothquant': 'static, scales moved to the weights',
  'smoothquant dynamic': 'by token, scales moved to the weights',
  'peg inputs': 'static, 6 ranges for groups of inputs',
  'int8 weights': 'stored in int8, computed in float',
  'int4 nearest': '4 bits in blocks of 32, rounded to nearest',
  'int4 gptq': '4 bits in blocks, ranges of the least squared error, errors made up for',
  'nf4': '4 bits of a normal distribution in blocks of 64',
  'w8a8 simulated': 'all activations, kernels and the word table, a range each',
  'peg simulated': 'the same, 6 ranges for each activation',
  'mixed simulated': "the same, but FFN's inputs, outputs and sums have 16 bits",
  'float': 'trained on, nothing rounded',
  'q8bert': 'trained on with int8 and moving ranges',
  'lsq': 'trained on with learnt steps',
}
INTRODUCTION = """# What fewer bits cost

all-MiniLM-L6-v2 (six layers, 22.7 M parameters), fine-tuned for each task and seed in full, 300
steps of 16 (stsb 400, cola 800) at 1e-4; every row starts from that run. Metrics are x 100 on the
validation split, which has chosen nothing; mean and standard deviation over three seeds. Rows that
train go on for a third of the steps at a fifth of the rate, and `float` says what these steps do
without rounding.

`flips`: predictions, in percent of the validation split, that are not the base run's (without stsb,
which has no classes). `outputs off by`: the mean relative error of the linear layers' outputs on
the calibration examples, where a layer is calibrated. `MB of weights` and `MB on disk` are of the
whole model in its bundle, embeddings included; what is `simulated` is stored in float32, its
activations are rounded as integers would be. Made by `run.py` and `table.py`.
"""
ABOUT = """Differences in points are of each task and seed; in brackets the 95 % interval of their
mean for these tasks (Welch's t over seeds), and in how many tasks the mean has the sign of the
whole. A claim whose interval holds 0 cannot be told."""


def score(record: dict) -> float:
  return 100 * record['metrics'][METRICS[record['task']]]


def table(records: list[dict], tasks: list[str]) -> str:
  head = ['', '', *(f'{task}, {METRICS[task]}' for task in tasks)]
  head += ['flips, %', 'outputs off by', 'MB of weights', 'MB on disk', 'runs']
  lines = []
  for variant in WORDS:
    own = [r for r in records if r['variant'] == variant]
    if not own:
      continue
    cells = [variant, WORDS[variant]]
    for task in tasks:
      found = [score(r) for r in own if r['task'] == task]
      cells.append(claims.spread(found))
    flips = [100 * r['flips'] for r in own if 'flips' in r and r['task'] != 'stsb']
    error = [r['off'] for r in own if r.get('off') is not None]
    cells += [
      claims.spread(flips), f'{statistics.mean(error):.2%}' if error else '-',
      f'{statistics.mean(r["whole_mb"] for r in own):.1f}',
      f'{statistics.mean(r["disk_mb"] for r in own):.1f}', str(len(own)),
    ]  # fmt: skip
    lines.append(cells)
  return claims.table(head, lines, 2)


def judged(records: list[dict], tasks: list[str]) -> list[claims.Claim]:
  scores = {(r['variant'], r['task'], r['seed']): score(r) for r in records}

  def against(text, name, other, expected, **more):
    seeds = sorted({seed for *_, seed in scores})
    found = {
      task: [
        scores[name, task, seed] - scores[other, task, seed]
        for seed in seeds
        if (name, task, seed) in scores and (other, task, seed) in scores
      ]
      for task in tasks
    }
    return claims.judge(text, found, expected, unit=' points', **more)

  same = {'expected': 'same', 'margin': 1.0}
  return [
    against(
      'Activations of 8 bits with one range a tensor lose accuracy (Bondarenko et al. 2021)',
      'w8a8 simulated', BASE, 'less',
    ),
    against('Groups of embedding dimensions mend it (PEG, the same)',
            'peg simulated', 'w8a8 simulated', 'more'),
    against('So do 16 bits for the sums of the FFN (mixed precision, the same)',
            'mixed simulated', 'w8a8 simulated', 'more'),
    against('With groups it is level with float, within a point', 'peg simulated', BASE, **same),
    against('With 16-bit sums it is level with float, within a point', 'mixed simulated', BASE,
            **same),
    against('Ranges by token are level with float, within a point (ZeroQuant, Yao et al. 2022)',
            'dynamic', BASE, **same),
    against('Ranges by token are better than calibrated ones', 'dynamic', 'static', 'more'),
    against('Moving scales to the weights mends calibrated ranges (SmoothQuant, Xiao et al. 2023)',
            'smoothquant', 'static', 'more'),
    against('Q8BERT is within a point of float training (Zafrir et al. 2019)', 'q8bert', LONGER,
            **same),
    against('LSQ is within a point of float training (Esser et al. 2020)', 'lsq', LONGER, **same),
    against('GPTQ, with ranges of the least squared error, is better than rounding to nearest at 4 '
            'bits (Frantar et al. 2023)', 'int4 gptq', 'int4 nearest', 'more'),
    against('NF4 in blocks of 64 is better than 4-bit integers in blocks of 32 '
            '(Dettmers et al. 2023)', 'nf4', 'int4 nearest', 'more'),
  ]  # fmt: skip


def main(argv):
  del argv
  records = files.read_jsonl(HERE / 'records.jsonl')
  failed = [r for r in records if 'error' in r]
  records = [r for r in records if 'error' not in r]
  tasks = [task for task in METRICS if any(r['task'] == task for r in records)]
  parts = [INTRODUCTION, table(records, tasks)]
  notes = [f'{r["variant"]} on {r["task"]}, seed {r["seed"]}: {r["error"]}' for r in failed]
  whole = len(WORDS) * len(METRICS) * SEEDS
  if len(records) + len(failed) < whole:
    notes.append(f'{len(records) + len(failed)} of {whole} runs have been made.')
  heading = 'What papers say'
  text = claims.page(parts, judged(records, tasks), ABOUT, notes, len(failed), heading=heading)
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
