"""Matrices in few bits: what they are, how they come from float ones, how 4 bits share a byte.

Made with numpy on the host, so that the integers are the same whatever device they are then used
on. `efft.models.quantized` multiplies with them. This module imports no jax.

K inputs and N outputs of a kernel [K, N]; rows and features of a table of embeddings.
"""

import dataclasses
from typing import Any

import numpy as np

# Quantiles of the normal distribution in [-1, 1], with an exact zero (QLoRA's table).
NF4 = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip
# The largest code; of int4 as of int8 the smallest is its negative.
TOP = {'int8': 127, 'int4': 7}
_PARTS = ('value', 'scale', 'smooth', 'order', 'x_scale', 'x_zero', 'sums')


@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
  """value * scale, or levels[value] * scale. Its parts are numpy or jax arrays.

  Attributes:
    value: int8 `shape`; of 4 bits, uint8 [rows, columns / 2]: the first half of the columns in the
      low bits, the second half in the high ones, int4 as code + 8.
    scale: float32, each of its numbers for a block of `value`: [1, N] for a kernel with a scale an
      output, [K / 32, N] in blocks, [rows, 1] for embeddings, [1, 1] for one scale.
    smooth: float32 [K], by which inputs are divided before they become integers, and by which the
      kernel was multiplied before it did (SmoothQuant); None: 1.
    order: int32 [K], which of the inputs each row of `value` is for, where groups want another
      order than the kernel's; None: the kernel's.
    x_scale: float32 [G], what a step of the inputs' integers is worth, for each of G groups of
      K / G inputs that follow each other; None unless inputs are 'static'.
    x_zero: int32 [G], the integer of 0 (asymmetric ranges, from -128 to 127); None: 0, and integers
      are from -127 to 127.
    sums: int32 [G, N], sums of `value` over each group, where there is an x_zero.
    codes, inputs: as in `efft.formats.Format`.
    shape: of the matrix.
    stochastic: whether the gradient of inputs is rounded at random, without bias.
  """

  value: Any
  scale: Any
  smooth: Any = None
  order: Any = None
  x_scale: Any = None
  x_zero: Any = None
  sums: Any = None
  codes: str = 'int8'
  inputs: str = 'token'
  shape: tuple[int, int] = (0, 0)
  stochastic: bool = False

  dtype = np.dtype(np.int8)

  @property
  def size(self) -> int:
    return self.shape[0] * self.shape[1]

  @property
  def nbytes(self) -> int:
    """Of all parts."""
    return sum(int(np.prod(x.shape)) * np.dtype(x.dtype).itemsize for x in self.parts().values())

  @property
  def finite(self) -> bool:
    return all(np.isfinite(x).all() for x in self.parts().values())

  def parts(self) -> dict[str, Any]:
    """{name: array} of those that are there."""
    found = {name: getattr(self, name) for name in _PARTS}
    return {name: x for name, x in found.items() if x is not None}

  def check(self) -> None:
    """Raises ValueError where the parts do not fit each other."""
    rows, columns = self.shape
    wanted = {'value': ((rows, columns if self.codes == 'int8' else columns // 2), 'int8')}
    if self.codes in ('int4', 'nf4'):
      wanted['value'] = (wanted['value'][0], 'uint8')
    elif self.codes != 'int8':
      raise ValueError(f'codes {self.codes!r}')
    if self.inputs not in ('float', 'token', 'static'):
      raise ValueError(f'inputs {self.inputs!r}')
    blocks = np.shape(self.scale)
    if len(blocks) != 2 or any(
      not n or size % n for n, size in zip(blocks, self.shape, strict=True)
    ):
      raise ValueError(f'scales {blocks} of {self.shape}')
    groups = len(self.x_scale) if self.x_scale is not None else 0
    wanted |= {
      'scale': (blocks, 'float32'), 'smooth': ((rows,), 'float32'), 'order': ((rows,), 'int32'),
      'x_scale': ((groups,), 'float32'), 'x_zero': ((groups,), 'int32'),
      'sums': ((groups, columns), 'int32'),
    }  # fmt: skip
    for name, x in self.parts().items():
      if (tuple(x.shape), str(x.dtype)) != wanted[name]:
        raise ValueError(f'{name} is {x.dtype} {tuple(x.shape)}, not {wanted[name]}')
    integers = self.inputs != 'float'
    if integers and (self.codes != 'int8' or blocks[0] != 1):
      raise ValueError('products of integers want int8 codes and one scale an output')
    if (self.inputs == 'static') != bool(groups and not rows % groups):
      raise ValueError(f'{groups} ranges of inputs that are {self.inputs}')
    if (self.x_zero is None) != (self.sums is None):
      raise ValueError('x_zero without sums')
    if self.order is not None and not np.array_equal(np.sort(self.order), np.arange(rows)):
      raise ValueError('an order that is not one of the inputs')
    if self.order is not None and self.inputs != 'static':
      raise ValueError(f'an order of inputs that are {self.inputs}')

  def kind(self) -> dict[str, Any]:
    """All that is not an array, for JSON: with `parts`, what the constructor takes."""
    return {
      'codes': self.codes,
      'inputs': self.inputs,
      'shape': list(self.shape),
      'stochastic': self.stochastic,
    }


def scales(w: np.ndarray, codes: str, block: int = 0, axis: int = 0) -> np.ndarray:
  """float32 scales such that the largest number of each block along `axis` gets the last code.

  Args:
    w: [rows, columns], finite.
    codes: 'int8', 'int4' or 'nf4'.
    block: how many numbers along `axis` share one; 0: all.
    axis: 0 for kernels, whose rows are summed over; 1 for tables, whose rows are read one by one.

  Raises:
    ValueError: numbers that are not finite, or an axis that is not cut into such blocks.
  """
  w = np.asarray(w, np.float32)
  if not np.isfinite(w).all():
    raise ValueError('numbers that are not finite')
  size = w.shape[axis]
  block = block or size
  if size % block:
    raise ValueError(f'{size} numbers along axis {axis}, which are not cut into blocks of {block}')
  split = (size // block, block)
  cut = w.reshape(*split, w.shape[1]) if axis == 0 else w.reshape(w.shape[0], *split)
  largest = np.abs(cut).max(axis + 1)
  scale = largest / np.float32(TOP.get(codes, 1))
  # A block of zeros is zeros times anything; so is one whose scale is too small for a float32.
  return np.where(scale > 0, scale, np.float32(1))


def quantize(
  w: np.ndarray, codes: str = 'int8', scale: np.ndarray | None = None, *, block: int = 0,
  axis: int = 0, inputs: str = 'token', **more,
) -> QTensor:  # fmt: skip
  """The nearest codes; numbers beyond the last code get the last.

  Args:
    w: float [rows, columns].
    codes: 'int8', 'int4' or 'nf4'.
    scale: as in QTensor; None: `scales(w, codes, block, axis)`.
    block, axis: as for `scales`.
    inputs, **more: other fields of the QTensor. `smooth` multiplies w first, then `order` sorts its
      rows.

  Raises:
    ValueError: as `scales`; an odd number of columns for 4 bits.
  """
  w = np.asarray(w, np.float32)
  if more.get('smooth') is not None:
    w = w * np.asarray(more['smooth'], np.float32)[:, None]
  if more.get('order') is not None:
    w = w[more['order']]
  scale = scales(w, codes, block, axis) if scale is None else np.asarray(scale, np.float32)
  return from_codes(encode(w, codes, scale), codes, scale, inputs=inputs, **more)


def encode(w: np.ndarray, codes: str, scale: np.ndarray) -> np.ndarray:
  """int8 [rows, columns] of w: its codes, one a byte."""
  units = np.asarray(w, np.float32) / spread(scale, w.shape)
  if codes == 'nf4':
    levels = np.asarray(NF4, np.float32)
    return np.searchsorted((levels[1:] + levels[:-1]) / 2, units).astype(np.int8)
  return np.clip(np.rint(units), -TOP[codes], TOP[codes]).astype(np.int8)


def from_codes(value: np.ndarray, codes: str, scale: np.ndarray, **fields) -> QTensor:
  """A QTensor of codes, one a byte; packs those of 4 bits."""
  shape = value.shape
  zero = fields.get('x_zero')
  if zero is not None:
    groups = value.reshape(len(zero), -1, shape[1])
    fields['sums'] = groups.sum(1, dtype=np.int32)
  if codes != 'int8':
    value = pack(value + 8 if codes == 'int4' else value)
  return QTensor(value, np.asarray(scale, np.float32), codes=codes, shape=shape, **fields)


def pack(codes: np.ndarray) -> np.ndarray:
  """Codes from 0 to 15 [rows, columns] -> uint8 [rows, columns / 2]."""
  rows, columns = codes.shape
  if columns % 2:
    raise ValueError(f'{columns} columns, and 4 bits want an even number')
  low, high = codes[:, : columns // 2].astype(np.uint8), codes[:, columns // 2 :].astype(np.uint8)
  return low | (high << 4)


def unpack(value: np.ndarray) -> np.ndarray:
  """The inverse of `pack`."""
  return np.concatenate([value & 15, value >> 4], 1)


def codes_of(q: QTensor) -> np.ndarray:
  """int8 [rows, columns]: the codes, one a byte."""
  if q.codes == 'int8':
    return np.asarray(q.value)
  codes = unpack(np.asarray(q.value)).astype(np.int8)
  return codes - np.int8(8) if q.codes == 'int4' else codes


def dequantize(q: QTensor) -> np.ndarray:
  """float32 [rows, columns]: the matrix that the codes stand for, `smooth` and `order` undone."""
  w = values(codes_of(q), q.codes, np.asarray(q.scale))
  if q.order is not None:
    w = w[np.argsort(q.order)]
  return w if q.smooth is None else w * (1 / np.asarray(q.smooth))[:, None]


def values(codes: np.ndarray, kind: str, scale: np.ndarray) -> np.ndarray:
  """float32 [rows, columns] of codes of a kind ('int8', 'int4', 'nf4'), one a byte."""
  levels = np.asarray(NF4, np.float32)[codes] if kind == 'nf4' else codes.astype(np.float32)
  return levels * spread(np.asarray(scale, np.float32), codes.shape)


def spread(scale, shape: tuple[int, ...]):
  """Scales of blocks (numpy or jax), one for each number as far as broadcasting does not do it."""
  for axis, size in enumerate(shape):
    if scale.shape[axis] not in (1, size):
      scale = scale.repeat(size // scale.shape[axis], axis)
  return scale
