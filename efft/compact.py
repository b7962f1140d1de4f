"""Leaves as a bundle stores them: what differs from the base, a bit for a yes or no, few for many.

A mask that lets 0.5 % of an encoder train changes 0.5 % of its numbers, and only those are worth
the disk: the flat indices and values of what differs, where that takes less than the whole leaf.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from efft.qtensor import QTensor

# After a leaf's path in the file; no path holds a '#'. A QTensor's parts have their own names.
_BITS, _INDEX, _VALUES = '#bits', '#index', '#values'


class Sparse(NamedTuple):
  """A leaf that is the base's but for some numbers; zero but for them, where the base has none.

  Attributes:
    shape: of the leaf.
    index: uint32 [k], ascending, into the flat leaf.
    values: float32 [k].
  """

  shape: tuple[int, ...]
  index: np.ndarray
  values: np.ndarray


def compact(leaves: Mapping, base: Mapping) -> dict:
  """{path: array or Sparse}, without loss: compared and kept to the bit.

  Args:
    leaves: {path: array}; float32 ones may become sparse.
    base: {path: array} of the pretrained leaves; others below 'params/' (a head) stay whole.
  """
  return {path: _compact(path, x, base) for path, x in leaves.items()}


def _compact(path: str, x, base: Mapping):
  if isinstance(x, QTensor):
    return x
  x = np.asarray(x)
  if x.dtype != np.float32 or (path.startswith('params/') and path not in base):
    return x
  rest = np.asarray(base[path], np.float32) if path in base else np.zeros_like(x)
  index = np.flatnonzero(x.reshape(-1).view(np.uint32) != rest.reshape(-1).view(np.uint32))
  if 2 * index.size >= x.size:
    return x
  return Sparse(x.shape, index.astype(np.uint32), x.reshape(-1)[index])


def whole(leaves: Mapping, base: Mapping) -> dict[str, np.ndarray]:
  """The inverse of `compact`, with float32 for bool: what the model takes.

  Raises KeyError for a sparse leaf below 'params/' that the base does not have.
  """
  return {path: _whole(path, x, base) for path, x in leaves.items()}


def _whole(path: str, x, base: Mapping):
  if isinstance(x, QTensor):
    return x
  if not isinstance(x, Sparse):
    return x.astype(np.float32) if x.dtype == bool else x
  if path.startswith('params/'):
    out = np.array(base[path], np.float32)
  else:
    out = np.zeros(x.shape, np.float32)
  out.reshape(-1)[x.index] = x.values
  return out


def encode(leaves: Mapping) -> dict[str, np.ndarray]:
  """{name: array} for a file that knows no bits, no sparse and no quantised arrays."""
  out = {}
  for path, x in leaves.items():
    if isinstance(x, QTensor):
      out |= {f'{path}#{name}': part for name, part in x.parts().items()}
    elif isinstance(x, Sparse):
      out |= {path + _INDEX: x.index, path + _VALUES: x.values}
    elif x.dtype == bool:
      out[path + _BITS] = np.packbits(x)
    else:
      out[path] = x
  return out


def described(leaves: Mapping) -> dict:
  """{path: shape, or a QTensor's `kind`}: what `decode` needs beside the arrays."""
  return {p: x.kind() if isinstance(x, QTensor) else list(x.shape) for p, x in leaves.items()}


def decode(arrays: Mapping, shapes: Mapping) -> dict:
  """The inverse of `encode`, given `described`. Raises ValueError where the two do not fit."""
  out, left = {}, dict(arrays)
  for path, shape in shapes.items():
    if isinstance(shape, Mapping):
      out[path] = _quantized(path, shape, left)
      continue
    size = int(np.prod(shape))
    if path in left:
      out[path] = left.pop(path)
      fits = list(out[path].shape) == list(shape)
    elif path + _BITS in left:
      bits = left.pop(path + _BITS)
      fits = bits.dtype == np.uint8 and bits.shape == (-(-size // 8),)
      out[path] = np.unpackbits(bits, count=size).astype(bool).reshape(shape) if fits else bits
    else:
      index, values = left.pop(path + _INDEX, None), left.pop(path + _VALUES, None)
      fits = index is not None and values is not None and index.shape == values.shape
      fits = fits and index.ndim == 1 and (not index.size or int(index.max()) < size)
      out[path] = Sparse(tuple(shape), index, values)
    if not fits:
      raise ValueError(path)
  if left:
    raise ValueError(min(left))
  return out


def _quantized(path: str, kind: Mapping, left: dict) -> QTensor:
  own = [name for name in left if name.startswith(path + '#')]
  parts = {name.partition('#')[2]: left.pop(name) for name in own}
  try:
    made = QTensor(**parts, **{**kind, 'shape': tuple(kind['shape'])})
    made.check()
  except (TypeError, ValueError, KeyError):
    raise ValueError(path) from None
  return made


def nbytes(x) -> int:
  """What a leaf, or its shape and type, takes in a bundle."""
  if isinstance(x, QTensor):
    return x.nbytes
  if isinstance(x, Sparse):
    return x.index.nbytes + x.values.nbytes
  size = int(np.prod(x.shape))
  return -(-size // 8) if x.dtype == bool else size * np.dtype(x.dtype).itemsize
