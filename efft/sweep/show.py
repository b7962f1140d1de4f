"""What a person sees of a sweep: the list of its runs, the live panel, the summary."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from efft.progress import clock
from efft.sweep.records import Records
from efft.sweep.study import Planned


def status(run: Planned, records: Records) -> str:
  """'to do', 'done', or how it failed."""
  record = records.get(run.key)
  if record is None:
    return 'to do'
  return 'done' if record.get('status') == 'ok' else str(record.get('status', 'failed'))


def listing(runs: Sequence[Planned], records: Records) -> str:
  """A line a run: status, task, arm, and the overrides that are not the same in all."""
  rows, first = [], runs[0].overrides if runs else {}
  same = {k for k, v in first.items() if all(r.overrides.get(k) == v for r in runs)}
  for run in runs:
    own = {k: v for k, v in run.overrides.items() if len(runs) == 1 or k not in same}
    task = Path(run.config['task']['name']).name
    rows.append((status(run, records), task, run.arm, overridden(own)))
  return aligned([('status', 'task', 'arm', 'overrides'), *rows])


def overridden(overrides: Mapping) -> str:
  return ' '.join(f'{name}={value}' for name, value in overrides.items())


def score(record: Mapping) -> tuple[str, str, float | None]:
  """(split, metric, value): of the half that chose nothing where there is one."""
  metrics, name = record.get('metrics') or {}, record.get('metric', '')
  split = 'report' if 'report' in metrics else 'validation'
  return split, name, (metrics.get(split) or {}).get(name)


def outcome(record: Mapping) -> str:
  """A finished run in a few words."""
  if record.get('status') != 'ok':
    return f'{record.get("status", "failed")}: {record.get("error")}'
  split, name, value = score(record)
  return f'{name} {_number(value)} ({split})'


def summary(records: Sequence[Mapping]) -> str:
  """A line for each task and arm, with the mean over its runs; then the runs that failed."""
  arms: dict[tuple, list] = {}
  for record in records:
    config = record.get('config') or {}
    task = record.get('task') or (config.get('task') or {}).get('name', '')
    arms.setdefault((task, record['arm']), []).append(record)
  rows = [('task', 'arm', 'runs', 'failed', 'mean', 'of')]
  for (task, arm), mine in arms.items():
    scores = [score(record) for record in mine if record.get('status') == 'ok']
    values = [value for _, _, value in scores if value is not None]
    mean = math.fsum(values) / len(values) if values else None
    kinds = ', '.join(sorted({f'{name}, {split}' for split, name, _ in scores}))
    rows.append((Path(task).name, arm, len(mine), len(mine) - len(scores), _number(mean), kinds))
  lines = [aligned(rows, right=(2, 3, 4))]
  for record in records:
    if record.get('status') != 'ok':
      what = f'{record["arm"]} {overridden(record.get("overrides") or {})}'.rstrip()
      lines.append(f'{what}: {outcome(record)}')
  return '\n'.join(lines)


def panel(counts: str, running: Sequence[tuple[str, float, str]]) -> Group:
  """The live panel: the counts above (name, seconds, last line of its log) of what runs."""
  table = Table(show_header=False, box=None)
  for name, seconds, line in running:
    table.add_row(Text(name), clock(seconds), Text(line[:90]))
  return Group(Text(counts), table)


def aligned(rows: Sequence[Sequence], right: Sequence[int] = ()) -> str:
  """Columns as wide as their widest cell; the last one ragged."""
  cells = [[str(cell) for cell in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in cells
  )


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.4f}'
