"""Records of runs as tidy tables: a row a run, dotted columns.

A record is one JSON object a line of a `records.jsonl`, schema 1. Keys that are not known here are
kept as columns and otherwise ignored.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from efft import files
from efft.errors import InputError
from efft.report.naming import flatten, settings

log = logging.getLogger(__name__)

SCHEMA = 1
FILE = 'records.jsonl'
NEEDED = {'arm': str, 'task': str, 'seed': int, 'status': str}
# What groups runs, and so is no hyper-parameter.
GROUP = ['task', 'fraction', 'arm']
LEAD = [
  'study', 'run', 'task', 'fraction', 'arm', 'setting', 'seed', 'status', 'error', 'metric',
  'higher_is_better',
]  # fmt: skip


class Runs(NamedTuple):
  """What was read.

  Attributes:
    table: runs that ended well, a row each: `LEAD`, then the record's own numbers by dotted names
      (`metrics.report.accuracy`, `parameters.trained`, `overrides.optim.lr`), and
      `latency.<batch>x<length>.p50_ms` in the precision that the run was scored in (a bfloat16 run
      that was timed in float32 only: that), not merged where it was timed so.
    failed: the others, in the same columns.
    latency: a row for each measured shape of each run of `table`: task, fraction, arm, setting,
      seed, batch, length, precision, merged, p50_ms, p95_ms, p99_ms, examples_per_second.
    records: the records themselves; the index of the three tables (`record` in `latency`) counts
      in this list.
    folders: where each record's file is, which `run` is relative to.
    notes: what a reader of the numbers should know.
  """

  table: pd.DataFrame
  failed: pd.DataFrame
  latency: pd.DataFrame
  records: list[dict]
  folders: list[Path]
  notes: list[str]


def read(runs: str | PathLike | Sequence[str | PathLike]) -> Runs:
  """Reads records.

  Args:
    runs: records.jsonl files and folders that hold one (or whose folders do), several in a list or
      with commas between them.

  Returns:
    One row a run. Of several records of one run (task, fraction, arm, setting, seed) the last one
    counts: that is what a second attempt is.

  Raises:
    InputError: nothing to read, or a record without a key that is needed.
  """
  paths = _files(runs)
  records, folders = [], []
  for path in paths:
    try:
      found = files.read_jsonl(path)
    except OSError as error:
      raise InputError(str(path), error.strerror, f'a {FILE}', 'name another') from None
    for number, record in enumerate(found, 1):
      records.append(_checked(record, f'{path}, record {number}'))
      folders.append(path.parent)
  if not records:
    raise InputError(', '.join(map(str, paths)), 'no record', 'records of runs', 'run something')
  records, folders, notes = _with_benches(records, folders)
  rows = [_row(record) for record in records]
  groups = [tuple(row[name] for name in GROUP) for row in rows]
  last = {}
  for index, name in enumerate(settings(groups, records)):
    rows[index]['setting'] = name
    last[*groups[index], name, rows[index]['seed']] = index
  if len(last) < len(rows):
    repeated = len(rows) - len(last)
    notes.append(
      f'{repeated} of {len(rows)} records were followed by a later record of the same run, which '
      'counts in their place.'
    )
  kept = sorted(last.values())
  _one_metric(rows)
  notes += _data_notes(rows, records, kept)
  frame = _frame(rows, kept)
  ended = frame['status'] == 'ok'
  latency = _latency(rows, records, [i for i in kept if rows[i]['status'] == 'ok'])
  return Runs(frame[ended], frame[~ended], latency, records, folders, notes)


def shape_column(batch: int, length: int) -> str:
  """The column of `Runs.table` that holds the median milliseconds of a shape."""
  return f'latency.{batch}x{length}.p50_ms'


def shapes(table: pd.DataFrame) -> list[tuple[int, int]]:
  """(batch, length) of all measured shapes, in order."""
  matches = (re.fullmatch(r'latency\.(\d+)x(\d+)\.p50_ms', name) for name in table.columns)
  return sorted((int(m[1]), int(m[2])) for m in matches if m)


def _files(runs) -> list[Path]:
  if isinstance(runs, str | PathLike):
    whole = Path(runs)
    runs = [whole] if whole.exists() else [part for part in str(runs).split(',') if part]
  found = []
  for path in map(Path, runs):
    if path.is_dir():
      inside = [path / FILE] if (path / FILE).exists() else sorted(path.glob(f'*/{FILE}'))
    else:
      inside = [path] if path.exists() else []
    if not inside:
      what = 'a folder without records' if path.is_dir() else 'nothing there'
      fix = 'name what `efft sweep` or `efft bench --output=` has written'
      raise InputError(f'--runs={path}', what, f'a {FILE}, or a folder with one', fix)
    found += inside
  if not found:
    raise InputError('--runs', 'nothing', f'a {FILE}, or a folder with one', 'name one')
  return list(dict.fromkeys(found))


def _checked(record: dict, where: str) -> dict:
  schema = record.get('schema')
  if 'schema' not in record:
    fix = 'name what `efft sweep` or `efft bench --output` has written'
    raise InputError(where, 'no schema', 'a record of a run', fix)
  if schema != SCHEMA:
    raise InputError(where, f'schema {schema!r}', f'{SCHEMA}', 'use the efft that wrote it')
  needed = NEEDED | ({'metric': str} if record.get('status') == 'ok' else {})
  for key, kind in needed.items():
    if not isinstance(record.get(key), kind):
      found = repr(record[key]) if key in record else 'nothing'
      expected = 'a whole number' if kind is int else 'a string'
      raise InputError(f'{where}, {key}', found, expected, 'mend the record, or remove it')
  return record


def _row(record: dict) -> dict:
  overrides, config = record.get('overrides') or {}, record.get('config') or {}
  fraction = overrides.get('task.fraction', (config.get('task') or {}).get('fraction', 1.0))
  skipped = ('config', 'latency', 'schema')
  row = {key: value for key, value in record.items() if key not in skipped}
  device = row.get('device')
  if isinstance(device, Mapping) and 'versions' in row:
    row['device'] = {key: value for key, value in device.items() if key != 'versions'}
  if isinstance(device := row.get('device'), Mapping):
    row['device'] = dict(sorted(device.items()))
  row = flatten(row)
  row['fraction'] = float(fraction)
  row['higher_is_better'] = bool(record.get('higher_is_better', True))
  row['study'] = record.get('study') or ''
  chosen: dict[str, tuple] = {}
  for shape in _shapes_of(record):
    column = shape_column(shape['batch'], shape['length'])
    likeness = _likeness(shape.get('precision'), config)
    rank = (likeness, not shape.get('merged')) if likeness else (0, False)
    if rank > chosen.get(column, ((0, False), None))[0]:
      chosen[column] = rank, shape.get('p50_ms')
  return row | {column: p50 for column, (_, p50) in chosen.items()}


def _shapes_of(record: dict) -> list[dict]:
  rows = record.get('latency') or []
  return [row for row in rows if row.get('batch') and row.get('length')]


def _likeness(precision: str | None, config: Mapping) -> int:
  """2 where a latency is that of the model as it was scored, 1 where nearly so, else 0.

  Times in fewer bits than a run was scored in say nothing about what its score costs.
  """
  if precision is None:
    return 2
  model = config.get('model') or {}
  stages = [stage for stage in (config.get('stages') or {}).values() if isinstance(stage, Mapping)]
  few = model.get('quantize') or any(str(s.get('fn', '')).startswith('quant.') for s in stages)
  if few:
    return 0 if precision in ('f32', 'bf16') else 2
  if precision == ('bf16' if model.get('dtype') == 'bfloat16' else 'f32'):
    return 2
  return int(precision == 'f32')


def _with_benches(
  records: list[dict], folders: list[Path]
) -> tuple[list[dict], list[Path], list[str]]:
  """Gives the times that `efft bench` has measured later to the records of the same runs.

  A bench knows no study: its record says what the run's config is called by itself, and would be
  an arm of its own. A later time of the same shape replaces an earlier one, and says its device.
  """
  studied: dict[str, list[int]] = {}
  for index, record in enumerate(records):
    if record.get('study') and record.get('config_hash'):
      studied.setdefault(record['config_hash'], []).append(index)
  records, kept = list(records), []
  for index, record in enumerate(records):
    same = [] if record.get('study') else studied.get(record.get('config_hash'), [])
    if not same or not record.get('latency'):
      kept.append(index)
    for other in same if record.get('latency') else ():
      known = {_cell(row): row for row in records[other].get('latency') or []}
      place = record.get('latency_device', record.get('device'))
      known |= {_cell(row): {**row, 'device': place} for row in record['latency']}
      records[other] = records[other] | {'latency': list(known.values())}
  notes = []
  if gone := len(records) - len(kept):
    notes.append(f'The times of {gone} records of `efft bench` count for the same runs of a study.')
  return [records[i] for i in kept], [folders[i] for i in kept], notes


def _cell(row: Mapping) -> tuple:
  return *(row.get(name) for name in ('batch', 'length', 'precision')), bool(row.get('merged'))


def _one_metric(rows: list[dict]) -> None:
  metrics: dict[str, dict] = {}
  for row in rows:
    if row['status'] == 'ok':
      metrics.setdefault(row['task'], {})[row['metric'], row['higher_is_better']] = None
  for task, found in metrics.items():
    if len(found) > 1:
      names = ', '.join(f'{name} ({"higher" if up else "lower"} is better)' for name, up in found)
      fix = 'report them apart'
      raise InputError(f'task {task}', f'records scored by {names}', 'one metric a task', fix)


def _data_notes(rows: list[dict], records: list[dict], kept: Iterable[int]) -> list[str]:
  notes, data, machines, together = [], {}, {}, set()
  for row, record in ((rows[i], records[i]) for i in kept):
    if row['status'] != 'ok':
      continue
    together.add(bool(row.get('train.population')))
    if digest := row.get('data.sha256'):
      data.setdefault((row['task'], row['fraction'], row['seed']), set()).add(digest)
    usual = record.get('latency_device', record.get('device'))
    for shape in _shapes_of(record):
      place = shape.get('device', usual)
      place = place if isinstance(place, Mapping) else {'cpu': place}
      machines.setdefault(
        ', '.join(str(place[n]) for n in ('cpu', 'devices') if place.get(n)), None
      )
  machines.pop('', None)
  mixed = {task for (task, _, _), digests in data.items() if len(digests) > 1}
  for task in sorted(mixed):
    notes.append(f'Runs of {task} with the same seed have seen different data (data.sha256).')
  if len(together) > 1:
    notes.append(
      'Some runs trained in populations: their times of a step were measured apart, of usual '
      'batches, and their times of training are shares of the whole; those of the others are of '
      'their own runs.'
    )
  if len(machines) > 1:
    names = '; '.join(sorted(machines))
    notes.append(f'Latency was measured on {len(machines)} machines, which differ: {names}.')
  return notes


def _frame(rows: list[dict], kept: list[int]) -> pd.DataFrame:
  names = {name for i in kept for name in rows[i]} - set(LEAD)
  columns = [*LEAD, *sorted(names, key=_natural)]
  frame = pd.DataFrame([[rows[i].get(n) for n in columns] for i in kept], kept, columns)
  frame['error'] = frame['error'].astype(object)
  return frame


def _natural(name: str) -> list:
  return [(0, int(s), '') if s.isdigit() else (1, 0, s) for s in re.split(r'(\d+)', name)]


def _latency(rows: list[dict], records: list[dict], kept: list[int]) -> pd.DataFrame:
  own = [*GROUP, 'setting', 'seed']
  shaped = ['batch', 'length', 'precision', 'merged']
  measured = ['p50_ms', 'p95_ms', 'p99_ms', 'examples_per_second']
  lines = [
    [i, *(rows[i][name] for name in own), *_cell(shape), *(shape.get(name) for name in measured)]
    for i in kept
    for shape in _shapes_of(records[i])
  ]
  return pd.DataFrame(lines, columns=['record', *own, *shaped, *measured])
