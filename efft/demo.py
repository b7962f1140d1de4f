"""`efft demo`: LoRA on film reviews, from download to table, by the public functions alone."""

import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from efft import config, run

SENTENCES = (
  'A warm and funny film whose cast never puts a foot wrong.',
  'Two hours of noise, and not one idea of its own.',
  'I expected to hate it, and left the cinema smiling.',
)
ROWS = (
  ('trainable parameters', '{trainable:,} of {parameters:,} ({share:.2%})'),
  ('training', '{seconds:.0f} s'),
  ('speed', '{examples_per_second:.0f} examples/s'),
  ('peak memory', '{peak_mb:,.0f} MB'),
  ('size on disk', '{bundle_mb:.2f} MB, the base model not counted'),
)


def demo(workdir: str = 'runs/demo', *, short: bool = False) -> dict:
  """Trains, evaluates on films not seen in training, classifies `SENTENCES`; prints a table.

  A second call continues or reuses the run in `workdir`. `short` takes a few steps, for CI.
  """
  cfg = config.load('configs/lora.py:task=rotten_tomatoes')
  cfg.train.epochs = 1.0
  cfg.train.group_by_length = True  # half the time on snippets of 5 to 70 tokens
  if short:
    cfg.task.fraction, cfg.train.steps, cfg.model.max_length = 0.02, 6, 32
  results = run.train(cfg, workdir)
  scores = run.evaluate(workdir, split='test')
  records = list(run.predict(workdir, SENTENCES))

  shown = [(f'test {name}', _number(value)) for name, value in scores.items()]
  # A run that was stopped after its last step has no speed of its own to tell.
  known = {name: float('nan') if x is None else x for name, x in results.items()}
  shown += [(name, text.format(**known)) for name, text in ROWS]
  said = [(r['text'], f'{r["label"]} {r["score"]:.2f}') for r in records]
  console = Console(highlight=False)
  title = f'LoRA r={cfg.method.lora.rank} of {cfg.model.name} on {cfg.task.name}'
  console.print(_table(title, shown), _table('three sentences', said))
  console.print(f'run folder: {workdir}', markup=False, soft_wrap=True)
  predict = f'{program()} predict --run={shlex.quote(str(workdir))}'
  console.print(f"try: echo '{SENTENCES[0]}' | {predict}", markup=False, soft_wrap=True)
  return results


def program() -> str:
  """How a shell in this folder calls this environment's efft, activated or not."""
  beside = Path(sys.executable).with_name('efft')
  found = shutil.which('efft')
  if found and Path(found).parent.resolve() == beside.parent.resolve():
    return 'efft'
  if not beside.is_file():
    return f'{shlex.quote(sys.executable)} -m efft'
  here = Path.cwd()
  return shlex.quote(str(beside.relative_to(here) if beside.is_relative_to(here) else beside))


def _number(value) -> str:
  return f'{value:.4f}' if isinstance(value, float) else str(value)


def _table(title: str, rows) -> Table:
  table = Table(title=title, show_header=False, title_justify='left')
  table.add_column()
  table.add_column(justify='right')
  for row in rows:
    table.add_row(*row)
  return table
