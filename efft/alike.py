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
_VARIES = re.compile('|'.join(re.escape(name).replace(r'\*', '.+') for name in VARIES))


def varies(path: str) -> bool:
  """Whether members may differ in a field."""
  return _VARIES.fullmatch(path) is not None


def common(config) -> dict | None:
  """What has to be the same in all members, {field: value}; None where a run can only go alone."""
  config = configs.resolve(config)
  alone = config['stages'] or config['distil']['teacher'] or config['mesh']['distributed']
  if alone or any('transform' in fields for fields in config['optim']['groups'].values()):
    return None
  return {path: x for path, x in paths(config).items() if not varies(path)}


def paths(config: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'optim.groups.head.lr': 1e-3, ...} of all of a resolved config."""
  found = {}
  for key, value in config.items():
    nested = isinstance(value, Mapping) and value
    found |= paths(value, f'{prefix}{key}.') if nested else {prefix + key: value}
  return found
