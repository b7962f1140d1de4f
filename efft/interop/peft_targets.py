"""Which modules a config of HF PEFT means, and configs that mean given modules.

Read as `check_target_module_exists` and `get_pattern_key` of PEFT 0.21 do.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from efft.errors import InputError
from efft.interop import foreign
from efft.models.encoder import EncoderConfig

HEAD = ('classifier', 'score')


class Names(NamedTuple):
  """An encoder's names, with Hugging Face's prefix of the model.

  Attributes:
    parameters: {'bert.pooler.dense.weight': 'params/pooler/kernel', ...}
    modules: {'bert.pooler.dense': 'pooler', ...}
    linears: those of `modules` that have a kernel and are no part of the head.
  """

  parameters: Mapping[str, str]
  modules: dict[str, str]
  linears: tuple[str, ...]


@functools.cache
def names(cfg: EncoderConfig) -> Names:
  """The names of an encoder's parts; not to be changed."""
  parameters = foreign.parameters(cfg)
  linears = tuple(
    name.rpartition('.')[0]
    for name, path in parameters.items()
    if path.endswith('/kernel') and not path.startswith('params/head/')
  )
  return Names(parameters, foreign.modules(cfg), linears)


def selected(config: foreign.Keys, eligible: Iterable[str], saved: Collection[str]) -> list[str]:
  """The modules that a config targets, out of those that its method can act on.

  Args:
    config: of which target_modules, exclude_modules, layers_to_transform, layers_pattern are used.
    eligible: names of modules.
    saved: modules_to_save, which are never targets.
  """
  where, wanted = config.where, config.take('target_modules')
  excluded = config.take('exclude_modules', None) or []
  layers, pattern = config.take('layers_to_transform', None), config.take('layers_pattern', None)
  everything = isinstance(wanted, str) and wanted.lower() == 'all-linear'
  if not isinstance(wanted, str | list) or not wanted:
    found = f'target_modules={wanted!r}'
    raise InputError(where, found, 'names of modules or a regex', 'write down what it targets')

  def hit(name):
    if matches(excluded, name, where) or any(_inside(name, module) for module in saved):
      return False
    if everything:
      return True
    if not matches(wanted, name, where):
      return False
    return isinstance(wanted, str) or layers in (None, []) or _layer(name, pattern, where) in (
      layers if isinstance(layers, list) else [layers]
    )  # fmt: skip

  found = [name for name in eligible if hit(name)]
  if not found:
    expected = 'modules of this encoder'
    raise InputError(where, f'target_modules={wanted!r:.200}', expected, 'use the base it is for')
  return found


def by_pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any, where: str) -> Any:
  """What rank_pattern or one like it gives a module."""
  for key, value in (patterns or {}).items():
    if _regex(rf'(.*\.)?({key})$', where).match(name):
      return value
  return otherwise


def is_saved(parameter: str, saved: Collection[str]) -> bool:
  """Whether a parameter belongs to a module that modules_to_save names by its ending."""
  parts = parameter.split('.')[:-1]
  modules = ['.'.join(parts[: n + 1]) for n in range(len(parts))]
  return any(module.endswith(ending) for module in modules for ending in saved)


def endings(targets: Collection[str], others: Iterable[str]) -> list[str]:
  """The shortest target_modules that select `targets` and none of `others`."""
  others = [name for name in others if name not in targets]
  found = set()
  for name in targets:
    parts = name.split('.')
    choices = ['.'.join(parts[-n:]) for n in range(1, len(parts)) if not parts[-n].isdigit()]
    found.add(next((c for c in choices if not any(o.endswith(c) for o in others)), name))
  return sorted(found)


def regex(paths: Iterable[str], layers: int) -> str:
  """A regex of exactly these paths of an encoder of so many layers, the layers put together."""
  rows: dict[str, set[int]] = {}
  for path in paths:
    match = re.match(r'layer_(\d+)/', path)
    rest = path[match.end() :] if match else path
    rows.setdefault(rest, set()).update([int(match[1])] if match else [-1])
  alike: dict[tuple[int, ...], list[str]] = {}
  for rest, numbers in rows.items():
    alike.setdefault(tuple(sorted(numbers)), []).append(rest)
  parts = []
  for numbers, rests in alike.items():
    if numbers == (-1,):
      parts += rests
      continue
    which = r'\d+' if len(numbers) == layers else _choice(map(str, numbers))
    parts.append(f'layer_{which}/{_choice(_factored(rests))}')
  return '|'.join(parts)


def _factored(rests: list[str]) -> list[str]:
  """['attention/query/matmul', 'attention/value/matmul'] -> ['attention/(query|value)/matmul']."""
  alike: dict[tuple[str, str], list[str]] = {}
  for rest in rests:
    first, _, tail = rest.partition('/')
    middle, _, last = tail.rpartition('/')
    alike.setdefault((first, last), []).append(middle)
  return [
    '/'.join(part for part in (first, _choice(middles), last) if part)
    for (first, last), middles in alike.items()
  ]


def _choice(options: Iterable[str]) -> str:
  options = list(options)
  return options[0] if len(options) == 1 else f'({"|".join(options)})'


def matches(wanted, name: str, where: str) -> bool:
  if isinstance(wanted, str):
    return bool(_regex(wanted, where).fullmatch(name))
  return any(name == ending or name.endswith(f'.{ending}') for ending in wanted)


def _inside(name: str, module: str) -> bool:
  return f'.{module}.' in f'.{name}.'


def _layer(name: str, pattern, where: str) -> int | None:
  patterns = [pattern] if isinstance(pattern, str) and pattern else pattern or [None]
  for one in patterns:
    text = r'.*?\.[^.]*' if one is None else rf'(?:^|.*?\.){one}'
    match = _regex(rf'{text}\.(?P<idx>\d+)\.', where).match(name)
    if match:
      return int(match['idx'])
  return None


def _regex(text: str, where: str) -> re.Pattern:
  try:
    return re.compile(text)
  except re.error as error:
    raise InputError(where, f'{text!r:.200}: {error}', 'a regex', 'correct it') from None
