"""Which files of the user's make up which split."""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from efft import files
from efft.data import tables
from efft.data.tables import Table
from efft.data.tasks import TASKS
from efft.errors import InputError

_NAMED = {
  'train': re.compile(r'train(ing)?(?![a-z])'),
  'validation': re.compile(r'(validation|valid|val|dev|development)(?![a-z])'),
  'test': re.compile(r'test(ing)?(?![a-z])'),
}
_PART = re.compile(r'-\d{5}-of-\d{5}$')


def locate(
  place: str, own: Mapping[str, str], given: Mapping[str, str], named: bool
) -> tuple[dict[str, list[Path]], bool]:
  """Files per split of the user's file or folder."""
  root = Path(place).expanduser()
  if root.is_dir():
    stems = _stems(root)
    chosen = {}
    for split, value in given.items():
      chosen[split] = (
        _one(root, split, stems[value]) if value in stems else file(split, value, root)
      )
    for split, value in own.items():
      exact = stems.get(value.rpartition('/')[2]) if named else None
      paths = None if split in chosen else exact or _by_prefix(split, stems)
      if paths:
        chosen[split] = _one(root, split, paths)
    if 'train' not in chosen and len(stems) == 1 and not set(chosen) - set(given):
      return {'train': _one(root, 'train', next(iter(stems.values()))), **chosen}, True
    if 'train' not in chosen:
      listed = ', '.join(repr(p.name) for p in sorted(root.iterdir())[:20]) or 'nothing'
      raise InputError(
        str(root),
        listed,
        f'a file named train with one of {", ".join(tables.SUFFIXES)}',
        'set train=FILE',
      )
    return chosen, False
  if root.is_file():
    return {'train': [root]} | {
      split: file(split, value, root.parent) for split, value in given.items()
    }, True
  near = difflib.get_close_matches(place, TASKS, 1)
  expected = 'an existing file or folder' if named else 'a task, or an existing file or folder'
  hint = f'did you mean {near[0]!r}? ' if near else ''
  raise InputError('task', repr(place), expected, f'{hint}`efft tasks` lists the tasks')


def _stems(root: Path) -> dict[str, list[Path]]:
  """Data files by name without suffix; the numbered parts that the hub writes are one."""
  for folder in (root, root / 'data'):
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
      if (
        path.suffix.lower() in tables.SUFFIXES and path.is_file() and not path.name.startswith('.')
      ):
        found.setdefault(_PART.sub('', path.stem), []).append(path)
    if found:
      return found
  raise InputError(
    str(root), 'no data file', f'files ending in {", ".join(tables.SUFFIXES)}', 'check the folder'
  )


def _by_prefix(split: str, stems: Mapping[str, list[Path]]) -> list[Path]:
  pattern = _NAMED.get(split)
  return [
    path
    for stem, paths in stems.items()
    if pattern and pattern.match(stem.lower())
    for path in paths
  ]


def _one(root: Path, split: str, paths: list[Path]) -> list[Path]:
  """The paths, if they are one file or the numbered parts of one."""
  if len({_PART.sub('', path.name.removesuffix(path.suffix)) + path.suffix for path in paths}) > 1:
    raise InputError(
      str(root),
      f'{", ".join(repr(p.name) for p in paths)} for {split}',
      'one file',
      f'set {split}=FILE',
    )
  return paths


def file(split: str, value: str, root: Path | None) -> list[Path]:
  tried = [Path(value).expanduser()] + ([root / value] if root else [])
  for path in tried:
    if path.is_file():
      return [path]
  raise InputError(f'{split}={value}', 'no such file', 'an existing file', 'check the path')


def read(paths: list[Path]) -> Table:
  parts = [tables.read(path) for path in paths]
  if len(parts) == 1:
    return parts[0]
  if any(list(part.columns) != list(parts[0].columns) for part in parts):
    raise InputError(
      str(paths[0].parent),
      f'parts of {paths[0].name} with different columns',
      'equal columns',
      'write them alike',
    )
  joined = {
    name: [value for part in parts for value in part.columns[name]] for name in parts[0].columns
  }
  rows = np.arange(1, sum(map(len, parts)) + 1)
  return dataclasses.replace(
    parts[0], file=f'{paths[0]} and {len(parts) - 1} more', columns=joined, rows=rows, unit='row',
    notes=tuple(note for part in parts for note in part.notes), suffix=paths[0].suffix,
  )  # fmt: skip


def refuse_same(chosen: Mapping[str, list[Path]]) -> None:
  """The same file, or two of equal content, for two splits."""
  seen: list[tuple[str, Path]] = []
  for split, paths in chosen.items():
    for path in paths:
      for other, before in seen:
        same = os.path.samefile(path, before) or (
          path.stat().st_size == before.stat().st_size > 0
          and files.sha256(path) == files.sha256(before)
        )
        if same:
          raise InputError(
            f'{split}={path}',
            f'the content of {before} ({other})',
            'a file of its own for each split',
            f'give another {split} file, or train alone: it is then split',
          )
      seen.append((split, path))
