"""Markdown table of records.jsonl (run.py) and costs.jsonl (cost.py): every config's score on the
half that chose nothing, and what it costs.

    python experiments/methods/table.py > experiments/methods/README.md

Scores are mean and standard deviation over the seeds, times 100. Parameters are those of this
encoder, trained and (megabytes) stored.
"""

import statistics
from pathlib import Path

from absl import app
from chosen import HEAD, NOISE, SEEDS, TASKS, final

from efft import catalogue, files

HERE = Path(__file__).parent
PROMPTS = """Prompts move what the head sees before they have learnt anything: with a prompt that
does not train, and the head at the rate of the head alone, stsb ends at {} (`frozen_prompt.py`).
In so short a run they do not make up for it."""
TOO_FEW = """On cola the head alone is not told from 0 either: to be below it says that 800 steps
were too few to leave the majority class. Of those that are so on both halves, above the head on
stsb, where signals are stronger: {}."""
INTRODUCTION = """# Every method on two tasks

all-MiniLM-L6-v2; stsb (Pearson correlation; 300 steps of 4 pairs) and cola (Matthews correlation;
800 steps of 16 sentences of similar length in bfloat16): mean and standard deviation over three
seeds, x 100. One half of the validation split has chosen learning rates (`run.py` says how), the
other half is reported.
The budget is the same for all, and small: it ranks how fast methods learn, not where they end.
A half of cola has 521 sentences, where a correlation near 0 has a standard error of 4 points that
all seeds share: scores below 9 or so are not told from 0, nor neighbours from each other.
Examples a second, the memory that a compiled step asks for and the largest resident set of the
process are of steps of 16 pairs on one core, each config alone. Made by `run.py`, `cost.py` and
`table.py`.
"""


def score(records: list[dict]) -> str:
  values = [100 * r['reported'] for r in records if r['reported'] is not None]
  if not values:
    return records[0].get('error', 'not a number')[:40]
  spread = statistics.stdev(values) if len(values) > 1 else 0.0
  missing = '' if len(values) == len(SEEDS) else f' ({len(values)} of {len(SEEDS)} seeds)'
  return f'{statistics.mean(values):.1f} ± {spread:.1f}{missing}'


def paid(cost: dict | None) -> list[str]:
  """The cells of a record of cost.py; '-' for what is not known."""
  if not cost or 'error' in cost:
    return ['-'] * 4
  return [
    f'{cost["bundle_mb"]:.2f}', f'{cost["examples_per_second"]:.0f}',
    '-' if cost['step_mb'] is None else f'{cost["step_mb"]:.0f}', f'{cost["peak_mb"]:.0f}',
  ]  # fmt: skip


def below(cells: dict) -> str:
  """What ends below the head alone by more than run.py's NOISE, and what is known of it.

  Whether on both halves, too: one alone is as small as `INTRODUCTION` says.
  """
  lines = ['## Below the head alone', '']

  def told(names):
    return ', '.join(f'`{name}`' for name in sorted(names)) or 'none'

  def means(records):
    return [statistics.mean(r[half] for r in records) for half in ('chosen', 'reported')]

  lost = {}
  for task in TASKS:
    found = {
      name: means(records)
      for (name, other), records in cells.items()
      if other == task and all(r['reported'] is not None for r in records)
    }
    if HEAD in found:
      limits = [x - NOISE for x in found[HEAD]]
      under = {n: [x < limit for x, limit in zip(own, limits, strict=True)]
               for n, own in found.items()}  # fmt: skip
      lines.append(f'- {task}: {told(n for n, halves in under.items() if halves[1])}.')
      lost[task] = {n for n in under if all(under[n])}
      lines.append(f'  On the half that chooses, too: {told(lost[task])}.')
  if len(lost) == len(TASKS):
    lines += ['', TOO_FEW.format(told(lost['cola'] - lost['stsb']))]
  still = HERE / 'frozen_prompt.jsonl'
  if still.exists():
    lines += ['', PROMPTS.format(score(files.read_jsonl(still)))]
  return '\n'.join(lines)


def main(argv):
  del argv
  records = files.read_jsonl(HERE / 'records.jsonl')
  spent = HERE / 'costs.jsonl'
  costs = {r['config']: r for r in files.read_jsonl(spent)} if spent.exists() else {}
  cells, entries = final(records), files.read_json(catalogue.FILE)
  names = sorted({name for name, _ in cells}, key=lambda n: (entries[n]['family'], n))
  head = ('family', 'config', *TASKS, 'trained', 'stored MB', 'examples/s', 'step MB', 'peak MB')
  print(INTRODUCTION)
  print('| ' + ' | '.join(head) + ' |')
  print('|' + '---|' * len(head))
  for name in names:
    row = [entries[name]['family'], f'`{name}`']
    row += [score(cells[name, task]) if (name, task) in cells else '-' for task in TASKS]
    trained = [
      r['trainable'] for task in TASKS for r in cells.get((name, task), ()) if 'trainable' in r
    ]
    row += [f'{trained[0]:,}' if trained else '-', *paid(costs.get(name))]
    print('| ' + ' | '.join(row) + ' |')
  print()
  print(below(cells))


if __name__ == '__main__':
  app.run(main)
