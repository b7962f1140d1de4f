"""README.md and plots of this folder, from records.jsonl (run.py).

    python experiments/pruning/table.py [--steps=300]

The same records give the same bytes.
"""

import math
import re
import statistics
from pathlib import Path

from absl import app, flags

from efft import files
from efft.report import claims, plots
from efft.report import statistics as intervals

HERE = Path(__file__).parent
STEPS = flags.DEFINE_integer('steps', 300, 'of the base runs')
GOAL, KEPT = 2.0, 99.0  # times as fast, % of the unpruned accuracy
INTRODUCTION = """# What pruning keeps, and how much faster it is

all-MiniLM-L6-v2 (six layers of twelve heads and 1536 units), fine-tuned in full for each task and
seed, {steps} steps of 16 at 1e-4; every chain of stages starts from that run and trains on after it
has pruned, by as many steps as the table says (block and cofi learn masks for {steps} of them,
movement for all; ziplm trains after each of its speed-ups, which its stages name). `none` prunes
nothing and trains on: `of the unpruned` is test accuracy in percent of what it has with that seed
after as many steps. `+distil` has the unpruned run as its teacher, by its logits, ziplm also by its
hidden states, token by token. Each stage begins anew with the first batches of its order, so that
most stages see examples that the base run has seen. Sizes and rates are fixed beforehand. Mean and
standard deviation over seeds.

`speed-up`: of the forward pass in float32 against the unpruned model's on the same core, measured
in turn, 32 texts of 64 tokens and one; `by the table`: what the latency table of single blocks
says for 32 (ziplm asks it for five percent more than its stages name). `kernels`: the numbers of
the layers' kernels that are not zero, in percent of all; movement pruning leaves single zeros,
which save no time. Made by `run.py` and `table.py`.

![Test accuracy against speed-up](speedup.png)
"""
UNTRAINED = """## What scores choose

Validation accuracy without what each score would remove, and nothing trained afterwards (12.5, 25,
50 and 75 % of all heads or units; one to four of six layers), in bfloat16, against the speed-up
that the latency table gives for 32 texts of 64 tokens. `obs` removes by reconstruction, at least so
many, and is the only one that changes the weights that stay.

![Validation accuracy by score](scores.png)
"""
LEARNT = ('block', 'cofi')  # end at other sizes with a teacher than without


def grouped(records: list[dict], *names: str) -> dict[tuple, list[dict]]:
  found: dict = {}
  for record in records:
    found.setdefault(tuple(record.get(name) for name in names), []).append(record)
  return found


def described(chain: str, stage: str) -> tuple[str, bool]:
  """(the way of pruning without its amount, whether it has a teacher)."""
  way, _, tag = chain.partition('+')
  return re.sub(r'-[\d.]+$', '', way), bool(tag)


def unpruned(records: list[dict]) -> dict[tuple, dict]:
  """{(task, seed): {steps after the base run: record}} of what is not pruned."""
  found: dict = {}
  for record in records:
    if record['chain'] in ('base', 'none'):
      own = found.setdefault((record['task'], record['seed']), {})
      own[record['steps_after']] = record
  return found


def points(records: list[dict]) -> list[dict]:
  """A row for each task, chain and stage that trains: means over the seeds that have a base, and
  an unpruned run of as many steps."""
  bases = unpruned(records)
  trained = [
    r for r in records
    if r['chain'] not in ('base', 'curve')
    and {0, r['steps_after']} <= bases.get((r['task'], r['seed']), {}).keys()
  ]  # fmt: skip
  found = []
  for (task, chain, stage), own in grouped(trained, 'task', 'chain', 'stage').items():
    whole = [bases[task, r['seed']][r['steps_after']] for r in own]
    dense = [bases[task, r['seed']][0] for r in own]
    way, distil = described(chain, stage)
    found.append({
      'task': task, 'chain': chain, 'stage': stage, 'way': way, 'distil': distil,
      'steps': own[0]['steps_after'], 'predicted': [r['predicted_32'] for r in own],
      'speedup': [r['speedup_32'] for r in own], 'alone': [r['speedup_1'] for r in own],
      'test': {r['seed']: 100 * r['test'] for r in own},
      'kept': [100 * r['test'] / b['test'] for r, b in zip(own, whole, strict=True)],
      'chosen': [
        100 * r['validation'] / b['validation'] for r, b in zip(own, whole, strict=True)
      ],
      'kernels': [
        100 * r['kernels_nonzero'] / b['kernels_nonzero'] for r, b in zip(own, dense, strict=True)
      ],
      'seeds': len(own),
    })  # fmt: skip
  return sorted(found, key=lambda r: (r['task'], r['chain'], r['stage']))


def goal(rows: list[dict]) -> str:
  """Of what is fast enough validation chooses, and test says what it kept."""
  lines = [f'## {KEPT:.0f} % at {GOAL:.0f} times the speed', '']
  lines += [
    f'Of the chains that are {GOAL:.0f} times as fast with 32 texts (the mean over seeds), the one '
    'that keeps the most of the validation accuracy, and what it keeps of the test accuracy:', '',
  ]  # fmt: skip
  for task in sorted({row['task'] for row in rows}):
    fast = [r for r in rows if r['task'] == task and statistics.mean(r['speedup']) >= GOAL]
    if not fast:
      lines.append(f'- {task}: nothing is as fast.')
      continue
    best = max(fast, key=lambda r: statistics.mean(r['chosen']))
    kept = statistics.mean(best['kept'])
    low, high, _ = intervals.stratified([best['kept']])
    verdict = 'reached' if kept >= KEPT else f'missed by {KEPT - kept:.1f} points'
    told = '' if math.isnan(low) else f' (95 % interval of the mean {low:.1f} to {high:.1f})'
    lines.append(
      f'- {task}: `{best["chain"]}` ({best["stage"]}), {claims.spread(best["kept"])} %{told} at '
      f'{claims.spread(best["speedup"], 2)} times the speed: {verdict}.'
    )
  return '\n'.join(lines)


def teacher(rows: list[dict]) -> list[claims.Claim]:
  """What the teacher is worth: chains that were run with and without."""
  by_name = {(r['task'], r['chain'], r['stage']): r for r in rows}
  pairs: dict[tuple, dict[int, list[float]]] = {}
  for (task, chain, stage), row in by_name.items():
    with_teacher = by_name.get((task, f'{chain}+distil', stage))
    if with_teacher and row['way'] not in LEARNT:
      new, old = with_teacher['test'], row['test']
      for seed in sorted(new.keys() & old.keys()):
        own = pairs.setdefault((row['way'], task), {})
        own.setdefault(seed, []).append(new[seed] - old[seed])
  found: dict[str, dict[str, list[float]]] = {}
  for (way, task), by_seed in pairs.items():
    # Stages of a seed follow from each other, and count as one.
    found.setdefault(way, {})[task] = [statistics.mean(by_seed[seed]) for seed in sorted(by_seed)]
  return [
    claims.judge(f'{way}: a teacher brings accuracy back', tasks, 'more', unit=' points')
    for way, tasks in sorted(found.items())
  ]


def against_speed(rows: list[dict]) -> dict:
  """Test accuracy against speed-up, a panel a task, a line for each way of pruning."""
  values = [
    {
      'panel': row['task'], 'way': row['way'],
      'teacher': 'with a teacher' if row['distil'] else 'without',
      'x': statistics.mean(row['speedup']), 'y': statistics.mean(row['kept']),
      'low': min(row['kept']), 'high': max(row['kept']),
    }
    for row in rows
  ]  # fmt: skip
  x = {'field': 'x', 'type': 'quantitative', 'title': 'speed-up, 32 x 64 tokens'}
  x['scale'] = {'zero': False}
  y = {'field': 'y', 'type': 'quantitative', 'title': 'test accuracy, % of the unpruned'}
  y['scale'] = {'zero': False}
  legend = {'orient': 'right', 'symbolOpacity': 1}
  colour = {'field': 'way', 'type': 'nominal', 'title': None, 'legend': legend}
  colour['scale'] = {'scheme': 'tableau10'}
  shape = {'field': 'teacher', 'type': 'nominal', 'title': None, 'legend': legend}
  shape['scale'] = {'range': ['circle', 'cross']}
  return plots.faceted(
    [
      {'mark': {'type': 'rule', 'strokeOpacity': 0.35},
       'encoding': {'x': x, 'y': {**y, 'field': 'low'}, 'y2': {'field': 'high'}, 'color': colour}},
      {'transform': [{'filter': "datum.teacher === 'with a teacher'"}],
       'mark': {'type': 'line', 'strokeWidth': 1.6, 'strokeOpacity': 0.7},
       'encoding': {'x': x, 'y': y, 'color': colour}},
      {'mark': {'type': 'point', 'filled': True, 'size': 60, 'opacity': 1},
       'encoding': {'x': x, 'y': y, 'color': colour, 'shape': shape}},
    ],
    values, 'Test accuracy against measured speed-up',
  )  # fmt: skip


def by_score(curves: dict[tuple, list[dict]]) -> dict:
  values = [
    {
      'panel': f'{task}, {structure}', 'score': score,
      'x': statistics.mean(r['predicted_32'] for r in records),
      'y': 100 * statistics.mean(r['validation'] for r in records),
      'low': 100 * min(r['validation'] for r in records),
      'high': 100 * max(r['validation'] for r in records),
    }
    for (task, structure, score, _), records in curves.items()
  ]  # fmt: skip
  x = {'field': 'x', 'type': 'quantitative', 'title': 'speed-up by the table'}
  x['scale'] = {'zero': False}
  y = {'field': 'y', 'type': 'quantitative', 'title': 'validation accuracy'}
  y['scale'] = {'zero': False}
  colour = {'field': 'score', 'type': 'nominal', 'title': None, 'scale': {'scheme': 'tableau20'}}
  return plots.faceted(
    [
      {'mark': {'type': 'rule', 'strokeOpacity': 0.35},
       'encoding': {'x': x, 'y': {**y, 'field': 'low'}, 'y2': {'field': 'high'}, 'color': colour}},
      {'mark': {'type': 'line', 'point': {'size': 45}, 'strokeWidth': 1.6},
       'encoding': {'x': x, 'y': y, 'color': colour}},
    ],
    values, 'Validation accuracy without retraining, by score',
  ) | {'columns': 3}  # fmt: skip


def main(argv):
  del argv
  records = [r for r in files.read_jsonl(HERE / 'records.jsonl') if r['steps'] == STEPS.value]
  good = [r for r in records if 'error' not in r]
  key = ('task', 'seed', 'chain')
  made = set(grouped(good, *key))
  failed = {k: rs[-1] for k, rs in grouped(records, *key).items() if k not in made}
  records, rows = good, points(good)
  lines = [
    (
      *(r[name] for name in ('task', 'chain', 'stage', 'steps')),
      *(claims.spread(r[name], 2) for name in ('speedup', 'alone', 'predicted')),
      claims.spread(list(r['test'].values())), claims.spread(r['kept']),
      claims.spread(r['kernels'], 0), r['seeds'],
    )
    for r in rows
  ]  # fmt: skip
  for (task,), own in grouped([r for r in good if r['chain'] == 'base'], 'task').items():
    test = claims.spread([100 * r['test'] for r in own])
    lines.append((task, 'base', '', 0, '1', '1', '1', test, '', '100', len(own)))
  head = ('task', 'chain', 'stage', 'steps', 'speed-up, 32 x 64', '1 x 64', 'by the table', 'test')
  head += ('% of the unpruned', '% of kernels', 'seeds')
  order = sorted(lines, key=lambda line: (line[0], line[1] != 'base', line[1:3]))
  table = claims.table(head, order, 3)

  curves = grouped(
    [r for r in records if r['chain'] == 'curve'], 'task', 'structure', 'score', 'share'
  )
  lines = []
  for task, structure, score in sorted({key[:3] for key in curves}):
    shares = sorted(key[3] for key in curves if key[:3] == (task, structure, score))
    cells = []
    for share in shares:
      own = curves[task, structure, score, share]
      faster = statistics.mean(r['predicted_32'] for r in own)
      found = claims.spread([100 * r['validation'] for r in own])
      cells.append(f'{found} ({share:.0%}, {faster:.2f})')
    lines.append((task, structure, score, ', '.join(cells)))
  head = ('task', 'structure', 'score', 'accuracy (share removed, speed-up by the table)')
  scored = claims.table(head, lines, 4)

  for name, spec in (('speedup', against_speed(rows)), ('scores', by_score(curves))):
    png, svg = plots.pictures(spec)
    files.atomic_write(HERE / f'{name}.png', png)
    files.atomic_write(HERE / f'{name}.svg', svg)
  about = (
    'Differences in points of test accuracy are of each task and seed, means over the stages of a '
    "chain; in brackets the 95 % interval of their mean for these tasks (Welch's t), and in how "
    'many tasks the mean has the sign of the whole. A claim whose interval holds 0 cannot be told. '
    'Masks that are learnt (block, cofi) end at another size with a teacher than without, and are '
    'not compared so.'
  )
  notes = [f'{c} on {t}, seed {seed}: {r["error"]}' for (t, seed, c), r in failed.items()]
  parts = [INTRODUCTION.format(steps=STEPS.value), goal(rows), table, UNTRAINED, scored]
  heading = 'What the teacher is worth'
  text = claims.page(parts, teacher(rows), about, notes, len(failed), heading=heading)
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
