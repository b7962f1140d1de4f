"""What the settings of an arm are called: the hyper-parameters that tell its runs apart."""

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence

from efft.fields import FIELDS

# Fields that group runs, or that runs of one setting differ in.
_NO_SETTING = ('seed', 'task', 'task.name', 'task.fraction')


def settings(groups: Sequence[Hashable], records: Sequence[Mapping]) -> list[str]:
  """A name for each record's setting, the same one for all seeds of it.

  It has the record's overrides, but for the seed and for what all records of all groups share, and
  what else differs between the configs of its group: runs that were made by hand have no
  overrides. Paths that change with the seed alone (each seed its own teacher) are no
  hyper-parameters.

  Args:
    groups: of each record, what settings are compared within.
    records: as `records.read` finds them.
  """
  members: dict[Hashable, list[int]] = {}
  for index, group in enumerate(groups):
    members.setdefault(group, []).append(index)
  names = [''] * len(records)
  common = _shared([_fields(record.get('overrides')) for record in records], len(members))
  for indices in members.values():
    seeds = [records[i]['seed'] for i in indices]
    overrides = [
      {
        name: value
        for name, value in _fields(records[i].get('overrides')).items()
        if name not in common
      }
      for i in indices
    ]
    configs = [_fields(records[i].get('config')) for i in indices]
    # A failed run may have no config; it must not split the setting of the others.
    known = [config for config in configs if config]
    differ = {n for n in _names(known) if len({_text(c.get(n, _default(n))) for c in known}) > 1}
    fields = [
      some | {n: v for n, v in config.items() if n in differ and some.get(n, v) == v}
      for config, some in zip(configs, overrides, strict=True)
    ]
    bound = {name for name in _names(fields) if _follows_seed(name, fields, seeds)}
    for i, some in zip(indices, fields, strict=True):
      shown = {name: value for name, value in some.items() if name not in bound}
      names[i] = ', '.join(f'{name}={_text(value)}' for name, value in sorted(shown.items()))
  return names


def flatten(tree: Mapping, prefix: str = '') -> dict:
  """{'a': {'b': 1}} as {'a.b': 1}; lists become JSON."""
  flat = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f'{prefix}{key}.')
    else:
      flat[f'{prefix}{key}'] = json.dumps(value) if isinstance(value, list) else value
  return flat


def _fields(values: Mapping | None) -> dict:
  """Dotted fields that decide the result, but for those that no setting has."""
  return {
    name: value
    for name, value in flatten(values or {}).items()
    if name not in _NO_SETTING and (name not in FIELDS or FIELDS[name].steers)
  }


def _shared(overrides: Sequence[Mapping], groups: int) -> set[str]:
  """Fields that have one value in all records, of several groups."""
  if groups < 2:
    return set()
  return {
    name
    for name in set.intersection(*map(set, overrides))
    if len({_text(some[name]) for some in overrides}) == 1
  }


def _default(name: str):
  """What a config has that was resolved before there was such a field."""
  return FIELDS[name].default if name in FIELDS else None


def _names(dicts: Iterable[Mapping]) -> set[str]:
  return set().union(*dicts)


def _follows_seed(name: str, fields: Sequence[Mapping], seeds: Sequence[int]) -> bool:
  """Whether a text has one value for each seed, and another for each."""
  pairs = {(seed, some[name]) for seed, some in zip(seeds, fields, strict=True) if name in some}
  values = {value for _, value in pairs}
  if len(values) < 2 or not all(isinstance(value, str) for value in values):
    return False
  return len(pairs) == len(values) == len({seed for seed, _ in pairs})


def _text(value) -> str:
  return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
