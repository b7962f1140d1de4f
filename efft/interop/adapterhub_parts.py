"""What AdapterHub's families of methods share: names of places, checks, the part of an adapter.

AdapterHub: https://github.com/adapter-hub/adapters, whose options and tensors are called here as
there. Names of tensors are those without the encoder's prefix ('bert.').
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from efft import functions, tree
from efft.errors import InputError
from efft.interop.foreign import REFUSED, Keys, modules
from efft.models import convert
from efft.models.encoder import EncoderConfig
from efft.models.hub import Base
from efft.models.layers import ACTIVATIONS


class Part(NamedTuple):
  """What one of the library's configs is in efft's terms.

  Attributes:
    method: entries of config.method.
    leaves: by path.
    rules: those that come before the general ones.
    notes: what a user should know.
    gated: whether its leaves hold gates, which `hybrid.unipelt` alone has.
  """

  method: dict[str, dict]
  leaves: dict[str, np.ndarray]
  rules: tuple[tuple[str, str], ...] = ()
  notes: tuple[str, ...] = ()
  gated: bool = False


class Source(NamedTuple):
  """A checkpoint that is being read: its tensors, the encoder, the adapter's name in it."""

  tensors: Keys
  base: Base
  name: str

  @property
  def cfg(self) -> EncoderConfig:
    return self.base.cfg

  def take(self, name: str, *shape: int) -> np.ndarray:
    """The tensor of that name and shape."""
    found = self.tensors.take(name)
    if found.shape != shape:
      raise InputError(
        f'{self.tensors.where}: {name}', f'shape {list(found.shape)}', str(list(shape)),
        'take the config and the base model that belong to the adapter',
      )  # fmt: skip
    return found

  def gate(self, stem: str) -> dict[str, np.ndarray]:
    """The leaves of a gate."""
    weight = self.take(f'{stem}.weight', 1, self.cfg.hidden)
    return {'gate': kernel(weight), 'gate_bias': self.take(f'{stem}.bias', 1)}


class Target(NamedTuple):
  """What one method of efft is in the library's terms: configs, and tensors by name."""

  configs: list[dict]
  tensors: dict[str, np.ndarray]


def kernel(x: np.ndarray) -> np.ndarray:
  """A matrix between torch's layout and ours."""
  return np.ascontiguousarray(np.asarray(x).T, np.float32)


def layer(cfg: EncoderConfig, i: int) -> str:
  """The library's name of a layer."""
  return f'{"transformer" if cfg.architecture == "distilbert" else "encoder"}.layer.{i}'


@functools.cache
def linears(cfg: EncoderConfig) -> dict[str, str]:
  """{our module: the library's name}."""
  prefix = convert.NAMES[cfg.architecture][0]
  return {ours: theirs.removeprefix(prefix) for theirs, ours in modules(cfg).items()}


def lora_stem(cfg: EncoderConfig, site: str, name: str) -> str:
  """The library's name of what LoRA and its relatives put beside a linear layer."""
  return f'{linears(cfg)[site]}.loras.{name}'


def kernel_shape(base: Base, site: str) -> tuple[int, int]:
  """[d_in, d_out] of a linear layer."""
  return parameters_of(base)[f'params/{site}/kernel'].shape


def parameters_of(base: Base) -> dict[str, np.ndarray]:
  """{path: the base's own numbers}."""
  return tree.flatten({'params': base.params})


def refuse(where: str, found: str, expected: str = 'what efft computes exactly') -> InputError:
  return InputError(where, found, expected, REFUSED)


def flag(config: Keys, key: str, default: bool = False) -> bool:
  value = config.take(key, default)
  if type(value) is not bool:
    raise InputError(config.where, f'{key}={value!r:.100}', 'true or false', 'correct it')
  return value


def number(config: Keys, key: str, *default, low: float = 0.0) -> float:
  value = config.take(key, *default)
  if type(value) not in (int, float) or not low <= value < 1e9:
    expected = f'a number of at least {low:g}'
    raise InputError(config.where, f'{key}={value!r:.100}', expected, 'correct it')
  return value


def whole(config: Keys, key: str, *default, low: int = 1) -> int:
  value = number(config, key, *default, low=low)
  if value != int(value):
    raise InputError(config.where, f'{key}={value}', 'a whole number', 'correct it')
  return int(value)


def activation(config: Keys, *default) -> str:
  value = config.take('non_linearity', *default)
  name = value.lower() if isinstance(value, str) else value
  if not isinstance(name, str) or name not in ACTIVATIONS:
    known = f'one of {", ".join(ACTIVATIONS)}'
    raise refuse(config.where, f'non_linearity={value!r:.100}', known)
  return name


def numbers(config: Keys, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
  """A list of layers."""
  value = config.take(key, default)
  value = () if value is None else value
  if not isinstance(value, list | tuple) or not all(type(i) is int for i in value):
    raise InputError(config.where, f'{key}={value!r:.100}', 'a list of layers', 'correct it')
  return tuple(value)


def kept_layers(config: Keys, cfg: EncoderConfig) -> list[int]:
  """The layers that `leave_out` leaves."""
  left_out = numbers(config, 'leave_out')
  kept = [i for i in range(cfg.layers) if i not in left_out]
  if not kept:
    raise InputError(config.where, f'leave_out={list(left_out)}', 'a layer to act in', 'correct it')
  return kept


def pattern(cfg: EncoderConfig, layers: Iterable[int]) -> str:
  """The regex of these layers."""
  layers = sorted(layers)
  if layers == list(range(cfg.layers)):
    return r'layer_\d+'
  return f'layer_({"|".join(map(str, layers))})' if len(layers) > 1 else f'layer_{layers[0]}'


def reduction(where: str, width: int, size: int, wanted: float = 0) -> int:
  """The whole number that divides `width` to `size`, rounded down; `wanted` if it does."""
  least = width // (size + 1) + 1
  found = int(wanted) if wanted and wanted == int(wanted) else least
  if width // found == size:
    return found
  if width // least == size:
    return least
  raise refuse(where, f'{size} units of a bottleneck for {width}', 'a whole reduction factor')


def training_only(config: Keys, *keys: str) -> tuple[str, ...]:
  """Rates of what acts while training alone and has no equal here: taken, and noted."""
  found = [(key, config.take(key, 0.0)) for key in keys]
  return tuple(
    f'{key}={value} of AdapterHub acts while training only, and efft has no equal'
    for key, value in found
    if value not in (0, None)
  )


def delta(site: str, name: str, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Leaves of a method at a site, by path."""
  return {f'delta/{site}_{name}/{leaf}': x for leaf, x in leaves.items()}


class Entry(NamedTuple):
  """A method that is being written.

  Attributes:
    options: all of its function's.
    sites: {site: Keys of its leaves}; what the sites share is at 'shared'.
    name: of the adapter in the library's files.
    params: leaves that stand in place of the base's.
  """

  where: str
  options: dict[str, Any]
  sites: dict[str, Keys]
  base: Base
  name: str
  params: Keys

  @property
  def cfg(self) -> EncoderConfig:
    return self.base.cfg

  def layers(self, site: str) -> list[int]:
    """The layers that have the site ('mlp_out')."""
    return [i for i in range(self.cfg.layers) if f'layer_{i}/{site}' in self.sites]

  def known(self, *allowed: str) -> None:
    """Raises where there are sites that the library has no place for."""
    for site in self.sites:
      if site != 'shared' and re.sub(r'^layer_\d+/', '', site) not in allowed:
        raise refuse(self.where, f'parameters at {site}', f'AdapterHub has {", ".join(allowed)}')

  def common(self, *sites: str) -> list[int]:
    """The layers of the sites, which must be the same for all of them that there are."""
    found = {tuple(self.layers(site)) for site in sites} - {()}
    if len(found) != 1:
      raise refuse(self.where, 'different places in different layers', 'the same in each')
    return list(found.pop())

  def left_out(self, layers: Sequence[int]) -> list[int]:
    return [i for i in range(self.cfg.layers) if i not in layers]


def entries(method: Mapping[str, dict], leaves: Keys, base: Base, name: str) -> dict[str, Entry]:
  """{name of the method: Entry}; takes the 'delta/' leaves."""
  found: dict[str, dict[str, dict]] = {own: {} for own in method}
  for path in leaves:
    if not path.startswith('delta/'):
      continue
    place, _, leaf = path.removeprefix('delta/').rpartition('/')
    owners = [own for own in method if place.endswith(f'_{own}')]
    if not owners:
      continue
    own = max(owners, key=len)
    site = place.removesuffix(f'_{own}')
    found[own].setdefault(site, {})[leaf] = np.asarray(leaves.take(path))
  return {
    own: Entry(
      f'method {own}', functions.checked(f'method {own}', dict(method[own])),
      {site: Keys(x, f'delta/{site}_{own}') for site, x in sites.items()}, base, name,
      leaves,
    )
    for own, sites in found.items()
  }  # fmt: skip
