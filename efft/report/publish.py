"""A report as a folder: report.md, summary.csv, runs.csv, plots/, index.html."""

from os import PathLike
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from efft import files
from efft.errors import InputError
from efft.report import changes, costs, page, plots, records, selection, statistics, tables

_OURS = ('report.md', 'summary.csv', 'runs.csv', 'index.html')


class Content(NamedTuple):
  """What is written, before it is: the chosen rows, the tables, the plots, and the words."""

  rows: pd.DataFrame
  tables: list[tables.Table]
  points: list[dict]
  axes: list[costs.Cost]
  specs: dict[str, dict]
  curves: dict | None
  about: str
  notes: list[str]


def report(
  runs,
  output: str | PathLike,
  *,
  against=None,
  baseline: str | None = None,
  split: str = 'report',
  title: str = 'What it costs',
) -> dict:
  """Writes the report of recorded runs; the same records give the same bytes.

  Args:
    runs: records.jsonl files and folders with one, as `records.read` takes them.
    output: folder to make; an earlier report there is replaced, anything else refused.
    against: runs that these are compared with, arm by arm.
    baseline: arm that the others are tested against; without it, 'full' or what trains the most.
    split: 'report', the half of the validation split that chose nothing, or 'test', or
      'held_out', test where there is one.
    title: heading.

  Returns:
    {'report': path of the page, 'runs', 'failed', 'arms', 'tasks', 'baseline', 'notes'}.

  Raises:
    InputError: no runs, an unknown arm or split, a folder that is no report; nothing is written.
    EnvironmentProblem: vl-convert is missing, or the disk refuses.
  """
  plots.vl_convert()
  output = Path(output)
  refuse_other(output, _OURS, 'a report')
  found = records.read(runs)
  content = contents(found, against=against, baseline=baseline, split=split)
  pictures = {name: plots.pictures(spec) for name, spec in content.specs.items()}
  metrics = _metrics(content.rows)
  extra = {} if content.curves is None else {'Score against data': content.curves}
  html = page.page(
    title, content.about, content.notes, content.tables, content.points, content.axes, metrics,
    extra,
  )  # fmt: skip
  everything = pd.concat([found.table, found.failed]).sort_index()
  with files.atomic_folder(output) as folder:
    files.atomic_write(folder / 'report.md', _markdown(title, content))
    files.atomic_write(folder / 'summary.csv', tables.summary_csv(content.rows))
    files.atomic_write(folder / 'runs.csv', tables.to_csv(everything))
    files.atomic_write(folder / 'index.html', html)
    (folder / 'plots').mkdir()
    for name, (png, svg) in pictures.items():
      files.atomic_write(folder / 'plots' / f'{name}.png', png)
      files.atomic_write(folder / 'plots' / f'{name}.svg', svg)
  return {
    'report': str(output / 'index.html'),
    'runs': len(everything),
    'failed': len(found.failed),
    'arms': int(content.rows['arm'].nunique()),
    'tasks': list(metrics),
    'baseline': selection.baseline(content.rows, baseline),
    'notes': content.notes,
  }


def contents(
  found: records.Runs, *, against=None, baseline: str | None = None, split: str = 'report'
) -> Content:
  """What a report of `found` says, as `report` takes its arguments."""
  settings = selection.settings(found, split)
  rows, notes = selection.choose(settings)
  base = selection.baseline(rows, baseline)
  compared = statistics.against_baseline(rows, base)
  whole = selection.largest(rows)
  over = statistics.over_tasks(rows, compared)
  lacking = sorted(set(whole['task']) - set(whole[whole['arm'] == base]['task']))
  if lacking:
    notes.append(f'{base}, the baseline, has no runs on {", ".join(lacking)}: no tests there.')
  points = plots.points(rows, settings.costs)
  # What was measured only of smaller shares of the data has no points.
  axes = [cost for cost in settings.costs if any(p['axis'] == cost.name for p in points)]
  parts = [tables.scores(settings, rows)]
  if against is not None:
    old = selection.choose(selection.settings(records.read(against), split))[0]
    parts.append(tables.changed(changes.changes(rows, old)))
  parts += [tables.compared(compared, base), tables.over_tasks(over, base)]
  if settings.costs:
    parts += [tables.cost_table(settings, whole), tables.fronts(points, axes)]
  parts += [tables.latency(found.latency, whole), tables.failed(settings.failed)]
  curves = plots.data_curves(rows)
  specs = {
    cost.name: plots.against_cost(
      [p for p in points if p['axis'] == cost.name], cost, _metrics(rows)
    )
    for cost in axes
    if cost.plotted and whole[cost.column].nunique() > 1
  }
  return Content(
    rows,
    [part for part in parts if part.rows],
    points,
    axes,
    specs | ({} if curves is None else {'data': curves}),
    curves,
    _about(found, rows),
    notes,
  )


def refuse_other(folder: Path, ours: tuple[str, ...], what: str) -> None:
  """Refuses a folder that holds something else than what we have written there."""
  if not folder.exists():
    return
  inside = folder.is_dir() and list(folder.iterdir())
  if not folder.is_dir() or (inside and not all((folder / name).exists() for name in ours)):
    found = 'a folder of something else' if folder.is_dir() else 'a file'
    expected = f'a new folder, or {what} to replace'
    raise InputError(f'--output={folder}', found, expected, 'choose another')


def _metrics(rows: pd.DataFrame) -> dict[str, str]:
  return dict(sorted(zip(rows['task'], rows['metric'], strict=True)))


def _about(found: records.Runs, rows: pd.DataFrame) -> str:
  def counted(n: int, what: str) -> str:
    return f'{n:,} {what}' + ('' if n == 1 else 's')

  total = len(found.table) + len(found.failed)
  seeds = sorted(set(rows['n']))
  each = counted(seeds[0], 'seed') if len(seeds) == 1 else f'{seeds[0]} to {seeds[-1]} seeds'
  parts = [
    counted(total, 'run') + (f' ({len(found.failed)} failed)' if len(found.failed) else ''),
    counted(rows['arm'].nunique(), 'arm'),
    counted(rows['task'].nunique(), 'task'),
    f'{each} an arm',
  ]
  machines = set()
  for _, row in found.table.iterrows():
    names = [row.get(name) for name in ('device.cpu', 'device.devices')]
    if text := ', '.join(str(name) for name in names if not tables.missing(name)):
      machines.add(text)
  return ' · '.join([*parts, *sorted(machines)[:3]])


def _markdown(title: str, content: Content) -> str:
  lines = [f'# {tables.cell(title)}', '', tables.cell(content.about), '']
  if content.notes:
    lines += [*(f'- {tables.cell(note)}' for note in content.notes), '']
  lines += [tables.markdown(table) for table in content.tables]
  if content.specs:
    lines += ['## Plots', '']
    lines += [f'![{spec["title"]}](plots/{name}.svg)\n' for name, spec in content.specs.items()]
  return '\n'.join(lines)
