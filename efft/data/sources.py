"""From a task's name, or the user's file or folder, to a checked data set."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efft.data import columns, folders, hub, labels, packages, splits, tables
from efft.data.classes import encodes
from efft.data.splits import Split
from efft.data.tables import Table
from efft.data.tasks import TASKS, Task, default_metrics
from efft.errors import InputError

log = logging.getLogger(__name__)

SPLITS = ('train', 'validation', 'test')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Checked splits and all that a run has to know about them.

  splits: 'train', 'validation' and, where there is one, 'test' (MNLI: also the mismatched ones).
  labels: class names in class order, () for regression. metrics: the main one first.
  columns: what was read, as {'text': ..., 'pair': ..., 'label': ...}. samples: three training rows.
  notes: what was found, decided or looks odd, one sentence each. leakage: per evaluation split, how
  many of its examples training (the whole of it) also holds.
  """

  name: str
  splits: dict[str, Split]
  labels: tuple[str, ...]
  kind: str
  metrics: tuple[str, ...]
  columns: dict[str, str]
  samples: list[dict]
  notes: list[str]
  leakage: dict[str, int]

  @property
  def num_labels(self) -> int:
    """Outputs of the head."""
    return len(self.labels) or 1


def load(
  name: str,
  *,
  path: str | None = None,
  text: str | None = None,
  pair: str | None = None,
  label: str | None = None,
  labels: Sequence[str] | str | None = None,  # noqa: A002 - the setting's name
  kind: str = 'auto',
  train: str | None = None,
  validation: str | None = None,
  test: str | None = None,
  fraction: float = 1.0,
  seed: int = 0,
  split_seed: int = 0,
  halves: bool = False,
) -> Dataset:
  """Reads and checks a data set.

  Args:
    name: a row of TASKS, or a csv, tsv, jsonl, parquet file, or a folder of them.
    path: a file or folder to read a named task from, in place of its own source. Without it,
      $EFFT_DATA/NAME is read where there is such a folder.
    text, pair, label: columns; found by name or content where not given. label=a+b+c: 0/1 columns.
    labels: class names in class order, a sequence or joined by '+'.
    kind: 'auto', 'single', 'multi' or 'regression'.
    train, validation, test: a file, or the source's name of the split.
    fraction, seed: the share of the training rows to use, and which ones; nested over fractions.
    split_seed: of the splits carved where the source has none. Apart from `seed`, so that runs with
      several seeds are measured on the same rows.
    halves: cut the validation split in two: 'validation' chooses (checkpoints, hyper-parameters),
      'report' has chosen nothing. Equal texts go to the same half.

  Raises InputError before anything is trained (file, rows and fix are named), EnvironmentProblem
  where a download fails.
  """
  if not 0 < fraction <= 1:
    raise InputError(
      'fraction', repr(fraction), 'a number in (0, 1]', 'set fraction=0.1 for a tenth'
    )
  row = TASKS.get(name)
  given = {'train': train, 'validation': validation, 'test': test}
  given = {split: value for split, value in given.items() if value}
  found, single = _tables(name, path, row, given)
  notes = [note for table in found.values() for note in table.notes]
  if (
    row
    and (path or given)
    and not (text or pair)
    and not set(row.text) <= set(found['train'].columns)
  ):
    use, found_notes = columns.choose(found['train'], label=label)
  elif row:
    own_pair = row.text[1] if len(row.text) > 1 and not text else None
    own_label = row.label if row.label in found['train'].columns else None
    use, found_notes = columns.choose(
      found['train'], text or row.text[0], pair or own_pair, label or own_label
    )
  else:
    use, found_notes = columns.choose(found['train'], text, pair, label)
  notes += found_notes
  for split, table in found.items():
    notes += _check_text(split, table, use)
  names = labels.split('+') if isinstance(labels, str) else labels
  kind = row.kind if row and kind == 'auto' else kind
  names = names or (row.labels if row and kind == row.kind else None)
  if 'validation' not in found:
    also_test = single and 'test' not in found
    found, carved, whole = _carve(found, use, kind, names, also_test, split_seed)
    # What the whole file is: a part of it may have too few values to be told by.
    kind = whole.kind
    notes += [carved, *whole.notes]
  read = _resolve(found, use, kind, names)
  notes += [note for note in read.notes if note not in notes]
  parts = {split: _split(table, use, read.arrays[split]) for split, table in found.items()}
  parts = {split: parts[split] for split in sorted(parts, key=_order)}
  if halves:
    parts = _halved(parts, split_seed)
  leaked = splits.leakage(parts)
  notes += [
    f'{n} of {len(parts[split])} examples of {split} are also in train'
    for split, n in leaked.items()
    if n
  ]
  if fraction < 1:
    keep = splits.subset(len(parts['train']), fraction, seed)
    notes.append(
      f'train: {len(keep)} of {len(parts["train"])} rows (fraction {fraction:g}, seed {seed})'
    )
    parts['train'] = _thinned(parts['train'].take(keep), read, notes)
  metrics = row.metrics if row and read.kind == row.kind else default_metrics(read.kind)
  if read.kind == 'single' and 'ece' not in metrics:
    metrics = (*metrics, 'ece')
  return Dataset(
    name=name,
    splits=parts,
    labels=read.names,
    kind=read.kind,
    metrics=metrics,
    columns={
      key: value
      for key, value in (('text', use.text), ('pair', use.pair), ('label', '+'.join(use.label)))
      if value
    },
    samples=_samples(found['train'], use),
    notes=notes,
    leakage=leaked,
  )


def read_texts(
  path: str | Path, text: str | None = None, pair: str | None = None, usual: Sequence[str] = ()
) -> Split:
  """The texts of one file, for prediction: no labels wanted. A .txt file holds one text a line.

  Args:
    path: csv, tsv, jsonl, parquet or txt.
    text, pair: columns; without them what the header suggests.
    usual: the text column and perhaps the pair column of a model, taken before anything is guessed
      where the file has them.
  """
  path = Path(path)
  if path.suffix.lower() == '.txt':
    lines = tables.decode(path).split('\n')
    lines = lines[:-1] if lines[-1] == '' else lines
    lines = [line.removesuffix('\r') for line in lines]
    table = Table(str(path), {'text': lines}, np.arange(1, len(lines) + 1))
  else:
    table = folders.read([path])
  if not text and usual and set(usual) <= table.columns.keys():
    text, pair = (*usual, None)[:2]
  use, notes = columns.choose(table, text, pair, need_label=False)
  for note in notes if usual else ():
    log.warning('%s, for want of %s', note, ' and '.join(usual))
  _check_text('input', table, use)
  return _split(table, use, None)


def _order(split: str) -> int:
  return SPLITS.index(split.split('_')[0]) * 2 + (split not in SPLITS)


# Where the tables come from.


def _tables(
  name: str, path: str | None, row: Task | None, given: Mapping[str, str]
) -> tuple[dict[str, Table], bool]:
  """Per split one table, and whether a single file is all there is."""
  own = dict(row.splits) if row else {split: split for split in SPLITS}
  place = path or (_at_hand(name) if row else name)
  if place is None:
    named = {split: value for split, value in given.items() if value in own.values()}
    chosen = {
      split: folders.file(split, value, None)
      for split, value in given.items()
      if split not in named
    }
    # A source's split that is asked for in another role is not also read in its own.
    own = {s: v for s, v in own.items() if v not in named.values()} | named
    found = _source(row, {split: value for split, value in own.items() if split not in chosen})
    single = False
  else:
    chosen, single = folders.locate(place, own, given, named=row is not None)
    found = {}
  folders.refuse_same(chosen)
  found |= {split: folders.read(paths) for split, paths in chosen.items()}
  if 'train' not in found:
    raise InputError(
      place or name, f'splits {", ".join(sorted(found))}', 'a training split', 'set train=FILE'
    )
  for split, table in found.items():
    if not len(table):
      raise InputError(table.file, f'no rows for {split}', 'one or more', 'give another file')
  return {split: found[split] for split in sorted(found, key=_order)}, single


def _at_hand(name: str) -> str | None:
  """$EFFT_DATA/NAME, where that is a folder: a copy of a task is read in place of its source."""
  folder = os.environ.get('EFFT_DATA')
  place = os.path.join(folder or '', name)
  return place if folder and os.path.isdir(place) else None


def _source(row: Task, wanted: Mapping[str, str]) -> dict[str, Table]:
  where, _, rest = row.source.partition(':')
  if where == 'package':
    every = packages.READERS[rest]()
    return {split: every[value] for split, value in wanted.items()}
  return hub.tables(rest, wanted, row.name)


# What the tables are made into.


def _check_text(split: str, table: Table, use: columns.Columns) -> list[str]:
  """Refuses a missing column and what is no text; notes blank texts where they are legal."""
  notes = []
  for name in filter(None, (use.text, use.pair)):
    values = table.columns.get(name)
    if values is None:
      raise InputError(
        table.file,
        f'no column {name!r} (columns: {", ".join(map(repr, table.columns))})',
        f'the text of {split}',
        'name the column alike in all files, or set text= and pair=',
      )
    odd = [i for i, value in enumerate(values) if not isinstance(value, str)]
    if odd:
      what = (
        'a null'
        if values[odd[0]] is None
        else f'{type(values[odd[0]]).__name__} {values[odd[0]]!r:.60}'
      )
      raise InputError(
        f'{table.at(odd)}, column {name!r}',
        what,
        'text',
        'fill it in, write it as text, or drop those rows',
      )
    blank = [i for i, value in enumerate(values) if not value.strip()]
    if blank and table.is_text:
      raise InputError(
        f'{table.at(blank)}, column {name!r}', 'no text', 'text', 'fill it in or drop those rows'
      )
    if blank:
      notes.append(f'{table.at(blank)}, column {name!r}: {len(blank)} blank texts')
    broken = [i for i, value in enumerate(values) if not encodes(value)]
    if broken:
      raise InputError(
        f'{table.at(broken)}, column {name!r}',
        'half of a surrogate pair',
        'valid Unicode',
        'correct those rows',
      )
  return notes


def _resolve(found, use, kind, names) -> labels.Labels:
  return labels.resolve(found, use.label, kind, names)


def _carve(found, use, kind, names, also_test, seed) -> tuple[dict[str, Table], str, labels.Labels]:
  """Takes a tenth of training for validation, and one for test of a single file.

  Gives the tables, a note, and what the labels of the whole are.
  """
  table = found['train']
  read = _resolve({'train': table}, use, kind, names)
  whole = _split(table, use, read.arrays['train'])
  wanted = ('validation', 'test') if also_test else ('validation',)
  kept, *parts = splits.carve(whole.keys(), whole.labels, [0.1] * len(wanted), seed)
  if not all(len(part) for part in parts):
    fix = 'add rows, or set validation=FILE' + (' and test=FILE' if also_test else '')
    raise InputError(
      table.file,
      f'{len(table)} rows',
      f'enough to split into train and {" and ".join(wanted)}',
      fix,
    )
  carved = {split: table.take(part) for split, part in zip(wanted, parts, strict=True)}
  sizes = ', '.join(
    f'{split} {len(part)}' for split, part in [('train', kept), *zip(wanted, parts, strict=True)]
  )
  how = 'stratified by label' if read.kind == 'single' else 'at random'
  missing = ' or '.join(wanted)
  note = f'{table.file}: no {missing} split: carved from it, {how}, split_seed {seed}: {sizes}'
  return found | {'train': table.take(kept)} | carved, note, read


def _halved(parts: dict[str, Split], seed: int) -> dict[str, Split]:
  whole = parts['validation']
  found, fix = f'{len(whole)} rows of validation', 'leave task.halves out'
  if 'report' in parts:
    raise InputError('config.task.halves', 'a split named report', 'none of that name', fix)
  kept, other = splits.carve(whole.keys(), whole.labels, [0.5], seed)
  if not len(other):
    raise InputError('config.task.halves', found, 'two different texts or more', fix)
  cut = {'validation': whole.take(kept), 'report': whole.take(other)}
  rest = {name: part for name, part in parts.items() if name not in ('train', 'validation')}
  return {'train': parts['train'], **cut, **rest}


def _split(table: Table, use: columns.Columns, array: np.ndarray | None) -> Split:
  pairs = table.columns[use.pair] if use.pair else None
  return Split(table.columns[use.text], pairs, array, table.rows, table.file)


def _thinned(train: Split, read: labels.Labels, notes: list[str]) -> Split:
  if read.kind == 'single':
    there = set(train.labels.tolist())
    gone = [name for i, name in enumerate(read.names) if i not in there]
    if len(there) < 2:
      raise InputError(
        train.file, f'one class only in {len(train)} training rows', 'two or more', 'raise fraction'
      )
    if gone:
      notes.append(f'the chosen training rows have none of {", ".join(map(repr, gone[:10]))}')
  return train


def _samples(table: Table, use: columns.Columns) -> list[dict]:
  picked = []
  for i in range(min(3, len(table))):
    sample = {'text': table.columns[use.text][i]}
    if use.pair:
      sample['pair'] = table.columns[use.pair][i]
    values = [table.columns[name][i] for name in use.label]
    picked.append(
      sample | {'label': values[0] if len(values) == 1 else values, 'row': int(table.rows[i])}
    )
  return picked
