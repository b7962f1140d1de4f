"""Which values a study tries: lists of overrides, {dotted field of the config: value}.

Lists, so that one may be used for several arms. `product` and `chain` put them together; nothing
here knows configs, fields are checked where the study is read.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

Overrides = dict[str, Any]
Distribution = Callable[[float], Any]  # quantile function: [0, 1) -> value


def grid(values: Mapping[str, Sequence]) -> list[Overrides]:
  """Every combination of {field: [values]}; the last field changes fastest."""
  for field, options in values.items():
    if isinstance(options, str) or not isinstance(options, Iterable):
      raise ValueError(f'grid: {field} needs a list of values, not {options!r}')
  return [
    dict(zip(values, chosen, strict=True))
    for chosen in itertools.product(*map(tuple, values.values()))
  ]


def listed(overrides: Iterable[Mapping[str, Any]]) -> list[Overrides]:
  """Combinations written out one by one."""
  found = list(overrides)
  for item in found:
    if not isinstance(item, Mapping):
      raise ValueError(f'listed: {item!r} is not a dictionary of overrides')
  return [dict(item) for item in found]


def random(distributions: Mapping[str, Distribution], count: int, seed: int) -> list[Overrides]:
  """`count` draws of {field: distribution}, independent of each other (random search).

  A field's draws depend on seed and its name alone: a larger count goes on where the smaller one
  ended, and another field beside it changes nothing, so what has been run stays of use.

  Source: Bergstra and Bengio 2012, "Random search for hyper-parameter optimization".
  """
  streams = {field: Random(f'{seed} {field}') for field in distributions}
  return [
    {field: draw(streams[field].random()) for field, draw in distributions.items()}
    for _ in range(count)
  ]


def uniform(low: float, high: float) -> Distribution:
  """Uniform on [low, high], to four digits."""
  _ordered('uniform', low, high)
  return lambda u: _rounded(low + (high - low) * u, low, high)


def log_uniform(low: float, high: float) -> Distribution:
  """Uniform in the logarithm on [low, high], low > 0, to four digits."""
  _ordered('log_uniform', low, high)
  if low <= 0:
    raise ValueError(f'log_uniform: low is {low!r}, must be above 0')
  return lambda u: _rounded(low * (high / low) ** u, low, high)


def choice(options: Sequence) -> Distribution:
  """One of `options`, all equally likely; `range(1, 9)` draws whole numbers."""
  options = tuple(options)
  if not options:
    raise ValueError('choice: no options')
  return lambda u: options[int(u * len(options))]


def seeds(count: int, first: int = 0) -> list[Overrides]:
  """{'seed': first}, {'seed': first + 1}, ..."""
  return [{'seed': seed} for seed in range(first, first + count)]


def product(*spaces: Iterable[Mapping[str, Any]]) -> list[Overrides]:
  """Each of the first with each of the second, and so on; the last changes fastest.

  A field that two spaces set is an error: one of its values would be lost.
  """
  found: list[Overrides] = [{}]
  for space in map(listed, spaces):
    for left, right in itertools.product(found, space):
      if both := sorted(left.keys() & right.keys()):
        raise ValueError(f'product: {both[0]} is set by two spaces')
    found = [left | right for left, right in itertools.product(found, space)]
  return found


def chain(*spaces: Iterable[Mapping[str, Any]]) -> list[Overrides]:
  """One after the other."""
  return [item for space in spaces for item in listed(space)]


def _ordered(name: str, low: float, high: float) -> None:
  if not (math.isfinite(low) and math.isfinite(high) and low <= high):
    raise ValueError(f'{name}: {low!r} to {high!r} is not an interval')


def _rounded(value: float, low: float, high: float) -> float:
  # Logarithms differ in the last bit between machines, and a run is known by its exact config.
  return min(max(float(f'{value:.4g}'), low), high)
