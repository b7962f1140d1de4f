"""From the values of the label columns to arrays, with every doubt settled before any training.

A class name is the label as it is written: '007' and '7' are two classes. Numbers are a regression
target only where the values say so (FEW or more distinct values with a fraction) or the user does.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from efft.data.classes import INTEGER, SEPARATOR, array, assign, keys_of, written
from efft.data.tables import Table
from efft.errors import InputError

KINDS = ('single', 'multi', 'regression')
FEW = 5

_NUMBER = re.compile(
  r'[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(nan|inf|infinity)', re.IGNORECASE
)


@dataclasses.dataclass(frozen=True)
class Labels:
  """What the label columns hold.

  names: in class order, () for regression. arrays: per split int32 [N] (single), float32 [N, C]
  (multi), float32 [N] (regression), or None where the split is unlabelled.
  """

  kind: str
  names: tuple[str, ...]
  arrays: dict[str, np.ndarray | None]
  notes: tuple[str, ...] = ()


def resolve(
  tables: Mapping[str, Table],
  columns: Sequence[str],
  kind: str = 'auto',
  names: Sequence[str] | None = None,
) -> Labels:
  """Reads the label columns of all splits ('train' decides what is not given).

  Only a split other than train and validation may be unlabelled: no column, or nothing but empty
  cells, nulls or -1. Raises InputError with the file and the rows: a missing or unknown label, a
  kind that does not fit or differs between splits, a class that occurs only in evaluation, one
  class only, a target that is not finite.
  """
  if kind not in ('auto', *KINDS):
    near = difflib.get_close_matches(kind, KINDS, 1) or ['auto']
    raise InputError(
      'kind', repr(kind), f'auto or one of {", ".join(KINDS)}', f'set kind={near[0]}'
    )
  names = _distinct(names) if names else None
  if len(columns) > 1:
    return _from_flags(tables, columns, kind, names)
  raw = {
    split: _values(split, table, columns[0], tables['train']) for split, table in tables.items()
  }
  found = {split: values for split, values in raw.items() if values is not None}
  forms = {split: _form(tables[split], values) for split, values in found.items()}
  asked, kind = kind, _kind(kind, forms['train'], found['train'])
  _same_form(tables, found, forms, kind)
  if kind == 'regression':
    arrays = {split: _targets(tables[split], values) for split, values in found.items()}
    if np.ptp(arrays['train']) == 0:
      raise InputError(
        tables['train'].file,
        f'the target {arrays["train"][0]:g} in every row',
        'targets that differ',
        'check label=COLUMN',
      )
    read, notes = (), []
    if asked == 'auto':
      notes.append(
        f'label column {columns[0]!r}: numbers, read as regression '
        '(kind=single makes classes of them)'
      )
  else:
    for split, values in found.items():
      _refuse_missing(tables[split], values, kind)
    declared = tables['train'].names.get(columns[0])
    if declared:
      for split, values in found.items():
        own = tables[split].names.get(columns[0])
        found[split] = _named(values, forms[split], own, declared, names, kind)
    keys = {split: keys_of(tables[split], values, kind) for split, values in found.items()}
    given = names or declared
    read, ids, notes = assign(tables, keys, given, kind)
    arrays = {split: array(rows, len(read), kind) for split, rows in ids.items()}
  notes += [
    f'{tables[split].file}: no labels, {split} is for prediction only'
    for split in raw
    if split not in found
  ]
  return Labels(kind, read, {split: arrays.get(split) for split in tables}, tuple(notes))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
  names = tuple(written(name) for name in names)
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise InputError('labels', f'{twice!r} twice', 'names that differ', 'name each class once')
  return names


def _named(
  values: Sequence, form: str, own: Sequence[str] | None, train: Sequence[str],
  names: Sequence[str] | None, kind: str,
) -> list:  # fmt: skip
  """The class names of ids, where the training file declares names.

  Args:
    values: of one file.
    form: theirs, of `_form`.
    own: what this file declares, which may count otherwise; None: nothing, and it counts as
      training does, unless its numbers are names.
    train: what the training file declares.
    names: the user's, which stand for ids where they are other words altogether.
    kind: 'multi' or 'single'.
  """
  if not own and (form != 'integer' or {written(value) for value in values} & set(train)):
    return list(values)
  words = own or train
  if names and not set(names) & set(words):
    words = names

  def name(value):
    if isinstance(value, bool) or not INTEGER.fullmatch(written(value)):
      return value
    if isinstance(value, str) and own:
      return value
    known = 0 <= (i := int(written(value))) < len(words)
    found = words[i] if known else value
    return [found] if kind == 'multi' and known else found

  return [name(value) for value in values]


def _values(split: str, table: Table, column: str, train: Table) -> list | None:
  values = table.columns.get(column)
  if split in ('train', 'validation'):
    if values is None:
      raise InputError(
        table.file,
        f'no column {column!r} (columns: {", ".join(map(repr, table.columns))})',
        f'the labels of {split}',
        'name the column alike in all files',
      )
    return values
  if values is None or all(value is None or value == '' for value in values):
    return None
  # The hub's hidden test labels are -1, which some data sets also use for a class of their own.
  if all(str(value) in ('-1', '-1.0') for value in values):
    if not any(str(value) in ('-1', '-1.0') for value in train.columns[column]):
      return None
  return values


def _form(table: Table, values: Sequence) -> str:
  """What the labels of a split look like: 'list', 'integer', 'number' or 'text', not a mixture."""
  seen = [(i, value) for i, value in enumerate(values) if not _missing(value)]
  types = {}
  for i, value in seen:
    kind = (
      'number'
      if isinstance(value, int | float) and not isinstance(value, bool)
      else type(value).__name__
    )
    types.setdefault(
      {'bool': 'text', 'str': 'text', 'list': 'list', 'number': 'number'}.get(kind, kind), []
    ).append(i)
  odd = set(types) - {'text', 'list', 'number'}
  if len(types) > 1 or odd:
    rarest = min(types, key=lambda name: (name not in odd, len(types[name])))
    raise InputError(
      table.at(types[rarest]),
      f'labels of the type {rarest} among {", ".join(sorted(types))}',
      'labels of one type: text, numbers or lists',
      'write them alike',
    )
  form = next(iter(types), 'text')
  if form == 'number':
    return 'integer' if all(float(value).is_integer() for _, value in seen) else 'number'
  if form == 'text' and table.is_text and seen:
    if all(INTEGER.fullmatch(value) for _, value in seen):
      return 'integer'
    if all(_NUMBER.fullmatch(value.strip()) for _, value in seen):
      return 'number'
  return form


def _missing(value) -> bool:
  return value is None or value == ''


def _kind(kind: str, form: str, values: Sequence) -> str:
  if kind != 'auto':
    return kind
  if form == 'list':
    return 'multi'
  if form == 'number':
    numbers = {float(value) for value in values if not _missing(value)}
    fractions = {x for x in numbers if math.isfinite(x) and not x.is_integer()}
    return 'regression' if len(fractions) >= FEW else 'single'
  return 'single'


def _same_form(tables, found, forms, kind) -> None:
  """Refuses labels that do not fit the kind, and splits that are labelled in different ways."""
  for split, form in forms.items():
    table, other = tables[split], forms['train']
    if split != 'train' and (form == 'list') != (other == 'list'):
      raise InputError(
        f'{table.file} ({split})',
        f'{form} labels',
        f'{other} labels as in {tables["train"].file}',
        'write the labels of all splits alike',
      )
    if kind == 'single' and form == 'list':
      raise InputError(table.file, 'lists of labels', 'one label a row', 'set kind=multi')
    if kind == 'multi' and form not in ('list', 'text', 'integer'):
      raise InputError(
        table.file,
        f'{form} labels',
        f"a list column, text such as 'a{SEPARATOR}b', or several 0/1 columns",
        'set label=a+b+c, or another kind',
      )
    if kind == 'regression' and form in ('text', 'list'):
      bad = [
        i
        for i, value in enumerate(found[split])
        if not _missing(value) and not (isinstance(value, str) and _NUMBER.fullmatch(value.strip()))
      ]
      if bad:
        raise InputError(
          table.at(bad),
          f'the label {found[split][bad[0]]!r}',
          'a number (kind=regression)',
          'correct those rows, or set kind=single',
        )
    if kind == 'single' and split != 'train' and (form == 'text') != (other == 'text'):
      ours = {written(value) for value in found[split]}
      if not ours & {written(value) for value in found['train']}:
        raise InputError(
          f'{table.file} ({split})',
          f'{form} labels',
          f'{other} labels as in {tables["train"].file}',
          'write the labels of all splits alike',
        )


def _refuse_missing(table: Table, values: Sequence, kind: str) -> None:
  empty = [i for i, value in enumerate(values) if _missing(value)]
  if kind == 'multi' and table.is_text:
    return  # an empty cell of a|b|c text is a row with none of the classes
  if empty:
    raise InputError(
      table.at(empty), 'a missing label', 'a label in every row', 'fill it in or delete those rows'
    )


def _targets(table: Table, values: Sequence) -> np.ndarray:
  _refuse_missing(table, values, 'regression')
  targets = np.asarray([float(value) for value in values], np.float32)
  bad = np.flatnonzero(~np.isfinite(targets))
  if len(bad):
    raise InputError(
      table.at(bad),
      f'the target {values[bad[0]]!r}',
      'a finite number',
      'correct or delete those rows',
    )
  return targets


def _from_flags(tables, columns, kind, names) -> Labels:
  """Several 0/1 columns, one per class."""
  if kind not in ('auto', 'multi'):
    raise InputError(
      'label',
      f'{len(columns)} columns with kind={kind}',
      'one column',
      'set kind=multi or one label',
    )
  if names and len(names) != len(columns):
    raise InputError(
      'labels',
      f'{len(names)} names for {len(columns)} columns',
      'one name a column',
      'set labels alike',
    )
  flag = {'0': 0, '1': 1, 'false': 0, 'true': 1}
  arrays, notes = {}, []
  for split, table in tables.items():
    values = [_values(split, table, column, tables['train']) for column in columns]
    if all(column is None for column in values):
      arrays[split] = None
      notes.append(f'{table.file}: no labels, {split} is for prediction only')
      continue
    arrays[split] = np.zeros((len(table), len(columns)), np.float32)
    for c, (column, flags) in enumerate(zip(columns, values, strict=True)):
      flags = [None] * len(table) if flags is None else flags
      bad = [i for i, value in enumerate(flags) if written(value).lower() not in flag]
      if bad:
        raise InputError(
          f'{table.at(bad)}, column {column!r}', repr(flags[bad[0]]), '0 or 1', 'correct those rows'
        )
      arrays[split][:, c] = [flag[written(value).lower()] for value in flags]
  late = [
    (split, c)
    for split, a in arrays.items()
    if a is not None
    for c in np.flatnonzero(a.any(0) & ~arrays['train'].any(0))
  ]
  if late:
    split, c = late[0]
    raise InputError(
      tables[split].at(np.flatnonzero(arrays[split][:, c])),
      f'the label {columns[c]!r}, which no training row has',
      'classes seen in training',
      'add training rows of that class or drop the column',
    )
  return Labels('multi', names or tuple(columns), arrays, tuple(notes))
