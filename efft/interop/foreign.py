"""What the formats of other libraries share: an adapter in efft's terms, names, strictness.

A format is a module with three functions:

    num_labels(folder) -> int            of the head in it
    read(folder, base) -> Adapter        base: `hub.load(..., num_labels=num_labels(folder))`
    write(adapter, base) -> {file name: bytes}

Conversions are exact or refused: every key of a source is used, stands at the one value at which it
does nothing, or is named in the error.
"""

import functools
import json
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from efft import tree
from efft.errors import InputError
from efft.models import convert
from efft.models.encoder import EncoderConfig, init_params

REFUSED = 'merge it (`efft export --format=auto`), or keep it in efft'


class Adapter(NamedTuple):
  """A trained adapter with its head, as a bundle holds it.

  Attributes:
    method: config.method: {name: {'fn': 'lora.lora', options}}.
    leaves: {path: array}: the head ('params/head/out/kernel'), what stands in place of the base's
      own numbers ('params/embed/norm/scale'), and deltas ('delta/layer_0/...'). float32, kernels
      [d_in, d_out].
    rules: what trains where training goes on: (path regex, group).
    labels: class names in the order of the head's outputs; None where the format has none.
    kind: 'single', 'multi' or 'regression'; None where the format does not say.
    notes: what a user should know of the conversion.
  """

  method: dict[str, dict]
  leaves: dict[str, np.ndarray]
  rules: tuple[tuple[str, str], ...]
  labels: tuple[str, ...] | None = None
  kind: str | None = None
  notes: tuple[str, ...] = ()


@functools.cache
def parameters(cfg: EncoderConfig) -> Mapping[str, str]:
  """{Hugging Face's name, with the model's prefix: path} of all parameters.

  {'bert.encoder.layer.0.output.dense.weight': 'params/layer_0/mlp/down/kernel', ...}
  """
  shapes = tree.flatten(jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0)))
  names = {convert.hf_name(path, cfg, prefixed=True): f'params/{path}' for path in shapes}
  return types.MappingProxyType(names)


def modules(cfg: EncoderConfig) -> dict[str, str]:
  """{Hugging Face's module, with the model's prefix: ours}: 'classifier': 'head/out', ..."""
  return {
    name.rpartition('.')[0]: path.removeprefix('params/').rpartition('/')[0]
    for name, path in parameters(cfg).items()
  }


def turned(path: str, array: np.ndarray) -> np.ndarray:
  """A parameter between torch's layout and ours: kernels are transposed, either way."""
  array = np.asarray(array).T if path.endswith('/kernel') else np.asarray(array)
  return np.ascontiguousarray(array, np.float32)


class Keys:
  """A mapping whose every key must be accounted for.

  keys = Keys(config, 'adapter_config.json')
  rank = keys.take('r', 8)
  keys.only('bias', 'none')
  keys.finish()
  """

  def __init__(self, values: Mapping[str, Any], where: str):
    self.where = where
    self._left = dict(values)

  def __contains__(self, key: str) -> bool:
    return key in self._left

  def __iter__(self):
    return iter(tuple(self._left))

  def take(self, key: str, *default):
    """The value of a key, which then counts as used; without a default it must be there."""
    if key not in self._left and not default:
      raise InputError(self.where, f'no {key}', f'{key}', 'complete the checkpoint')
    return self._left.pop(key, *default)

  def only(self, key: str, *values) -> None:
    """Uses up a key that may be missing or have one of the values, and no other."""
    if key in self._left and self._left[key] not in values:
      found = f'{key}={json.dumps(self._left[key], default=str)[:200]}'
      raise InputError(
        self.where,
        f'{found}, which has no equal in efft',
        f'{key}={json.dumps(values[0])}',
        REFUSED,
      )
    self._left.pop(key, None)

  def ignore(self, keys: Iterable[str]) -> None:
    """Uses up keys that say nothing about what the adapter computes."""
    for key in keys:
      self._left.pop(key, None)

  def finish(self) -> None:
    """Raises InputError where keys are left."""
    if self._left:
      names = sorted(self._left)
      more = f' and {len(names) - 5} more' if len(names) > 5 else ''
      raise InputError(
        self.where, f'{", ".join(names[:5])}{more}, of which efft does not know what to make',
        'an adapter that can be read whole', 'nothing was written; report the library and version',
      )  # fmt: skip


def head(keys: Keys, cfg: EncoderConfig, prefix: str = '') -> dict[str, np.ndarray]:
  """The classification head's leaves out of tensors by Hugging Face name; a missing one raises."""
  leaves = {}
  for name, path in parameters(cfg).items():
    if path.startswith('params/head/'):
      leaves[path] = turned(path, keys.take(prefix + name))
  return leaves


def packed(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
  """A safetensors file, as the library itself writes it."""
  whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  return safetensors.numpy.save(whole, dict(metadata) if metadata else None)


def to_json(value: Any) -> bytes:
  """As both libraries write their configs: sorted, indented by two, no newline at the end."""
  return json.dumps(value, indent=2, sort_keys=True).encode()


def plain(name: Any, where: str) -> str:
  """A name that may become a part of a path; raises InputError for any other."""
  if isinstance(name, str) and re.fullmatch(r'[\w-][\w.,-]{0,199}', name):
    return name
  raise InputError(where, f'the name {name!r:.200}', 'letters, digits, - _ .', 'rename it')
