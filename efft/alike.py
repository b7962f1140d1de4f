"""Which configs differ in numbers alone, so that their runs can train in one program."""

import re
from collections.abc import Mapping
from typing import Any

from efft import config as configs

# Fields in which members of a population may differ; what else a config says is the same in all.
VARIES = (
  'seed', 'task.*', 'model.dropout', 'method.*.alpha', 'method.*.rank', 'optim.lr',
  'optim.weight_decay', 'optim.groups.*.lr', 'optim.groups.*.weight_decay',
)  # fmt: skip
ANY = ['varies']  # stands for a number that may differ, but has to be there in all members
PLACES = 8  # members that train side by side, unless told otherwise
_VARIES = re.compile('|'.join(re.escape(name).replace(r'\*', '.+') for name in VARIES))


def common(config) -> dict | None:
  """What has to be the same in all members, {field: value}; None where a run can only go alone."""
  config = configs.resolve(config)
  alone = config['stages'] or config['distil']['teacher'] or config['mesh']['distributed']
  if alone or any('transform' in fields for fields in config['optim']['groups'].values()):
    return None
  return {path: ANY if varies(path, x) else x for path, x in paths(config).items()}


def varies(path: str, value: Any) -> bool:
  """Whether members may differ in a field of this value; in optimiser and methods, in numbers."""
  return _VARIES.fullmatch(path) is not None and (_elsewhere(path) or _number(value))


def numbers(config: Mapping) -> dict[str, float]:
  """{field: value} of those in which members may differ and which a program computes with."""
  found = paths(config).items()
  return {p: x for p, x in found if varies(p, x) and not _elsewhere(p) and not p.endswith('.rank')}


def _elsewhere(path: str) -> bool:
  """Whether a field acts through data, seeds or the encoder's config, which members have each."""
  return path in ('seed', 'model.dropout') or path.startswith('task.')


def _number(x) -> bool:
  return isinstance(x, int | float) and not isinstance(x, bool)


def paths(config: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'optim.groups.head.lr': 1e-3, ...} of all of a resolved config."""
  found = {}
  for key, value in config.items():
    nested = isinstance(value, Mapping) and value
    found |= paths(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return found
