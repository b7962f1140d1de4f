"""Class names of single- and multi-label problems: read from the values, put in order, checked."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from efft.data.tables import Table
from efft.errors import InputError

SEPARATOR = '|'
INTEGER = re.compile(r'0|-?[1-9]\d*')


def written(value) -> str:
  """The class name of one label value: strings as they are, 3.0 as '3', True as 'true'."""
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, float) and value.is_integer():
    return str(int(value))
  return str(value)


def keys_of(table: Table, values: Sequence, kind: str) -> list[tuple[str, ...]]:
  """Class names per row: one for 'single', any number for 'multi'."""
  if kind == 'single':
    nan = [
      i for i, value in enumerate(values) if isinstance(value, float) and not math.isfinite(value)
    ]
    if nan:
      raise InputError(
        table.at(nan), f'the label {values[nan[0]]!r}', 'a label in every row', 'correct those rows'
      )
    return [(written(value),) for value in values]
  rows = []
  for i, value in enumerate(values):
    parts = (
      value
      if isinstance(value, list)
      else [part.strip() for part in written(value).split(SEPARATOR)]
    )
    names = tuple(written(part) for part in parts if part != '')
    if any(part is None or isinstance(part, list | dict) for part in parts):
      raise InputError(
        table.at([i]), f'the label {value!r}', 'a flat list of class names', 'correct the row'
      )
    if len(set(names)) < len(names):
      raise InputError(
        table.at([i]),
        f'a class twice in {value!r}',
        'the names or ids of the classes that hold',
        'give names, or one 0/1 column a class (label=a+b+c)',
      )
    rows.append(names)
  return rows


def encodes(text: str) -> bool:
  """Whether there are bytes for this text: not for half of a surrogate pair."""
  try:
    return text.isascii() or bool(text.encode())
  except UnicodeEncodeError:
    return False


def assign(
  tables: Mapping[str, Table],
  keys: Mapping[str, list[tuple[str, ...]]],
  given: Sequence[str] | None,
  kind: str,
) -> tuple[tuple[str, ...], dict[str, list[list[int]]], list[str]]:
  """(names, class ids per split and row, notes). Every label must be known, and occur in training.

  `given` names are in class order; where the labels are no such names but integers, they are ids.
  """
  for split, rows in keys.items():
    if broken := [i for i, row in enumerate(rows) if not all(map(encodes, row))]:
      where, found = tables[split].at(broken), 'half of a surrogate pair in a label'
      raise InputError(where, found, 'valid Unicode', 'correct those rows')
  trained = {name for row in keys['train'] for name in row}
  if len(trained) < (2 if kind == 'single' else 1):
    raise InputError(
      tables['train'].file,
      f'one class only, {min(trained, default="none")!r}',
      'two or more classes',
      'check label=COLUMN',
    )
  if kind == 'multi' and len(trained) > 1 and all(len(r) == len(trained) for r in keys['train']):
    raise InputError(
      tables['train'].file,
      f'all of {few(sorted(trained))} in every row',
      'rows of different classes',
      'where these are vectors of 0 and 1, write the names or ids of the classes that hold, or a '
      '0/1 column for each (label=a+b+c)',
    )
  integers = all(INTEGER.fullmatch(name) for name in trained)
  if given is None:
    names = tuple(sorted(trained, key=int) if integers else sorted(trained))
    index = {name: i for i, name in enumerate(names)}
  else:
    names, index = tuple(given), {name: i for i, name in enumerate(given)}
    by_id = {str(i): i for i in range(len(names))}
    if integers and not trained & set(index):
      index = by_id
  known = set(index) if given else trained
  ids = {}
  for split, rows in keys.items():
    bad = [i for i, row in enumerate(rows) if not known.issuperset(row)]
    late = [i for i, row in enumerate(rows) if not trained.issuperset(row)]
    label = (
      repr(next(name for name in rows[(bad or late)[0]] if name not in (known if bad else trained)))
      if bad or late
      else ''
    )
    if bad and given:
      raise InputError(
        tables[split].at(bad),
        f'the unknown label {label}',
        f'one of {few(names)}, or all as ids from 0',
        'correct those rows, or set labels=NAME+NAME',
      )
    if bad or late:
      fix = 'add training rows of that class or drop those'
      if integers and kind == 'single':
        fix += '; if the labels are amounts, set kind=regression'
      raise InputError(
        tables[split].at(bad or late),
        f'the label {label}, which no training row has',
        f'one of {few(sorted(trained))}',
        fix,
      )
    ids[split] = [[index[name] for name in row] for row in rows]
  return names, ids, _class_notes(names, index, trained)


def _class_notes(names: Sequence[str], index: Mapping[str, int], trained: set[str]) -> list[str]:
  notes = []
  idle = [names[i] for name, i in index.items() if name not in trained]
  if idle:
    notes.append(f'no training row has the label {few(idle)}')
  alike = {}
  for name in names:
    alike.setdefault(' '.join(name.lower().split()), []).append(name)
  notes += [
    f'labels that differ only in case or spaces: {few(same)}'
    for same in alike.values()
    if len(same) > 1
  ]
  return notes


def array(rows: list[list[int]], classes: int, kind: str) -> np.ndarray:
  """int32 [N] of class ids (single), or float32 [N, C] of zeros and ones (multi)."""
  if kind == 'single':
    return np.asarray([row[0] for row in rows], np.int32)
  flags = np.zeros((len(rows), classes), np.float32)
  for i, row in enumerate(rows):
    flags[i, row] = 1
  return flags


def few(names: Iterable[str]) -> str:
  """The names, ten at most."""
  names = list(names)
  return ', '.join(map(repr, names[:10])) + (
    f' and {len(names) - 10} more' if len(names) > 10 else ''
  )
