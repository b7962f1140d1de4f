"""Products and lookups with matrices in few bits.

An int8 product is int8 x int8 -> int32, forward and for the gradient of its input: rounding has no
gradient, so both products are written out (straight-through; Bengio et al. 2013,
https://arxiv.org/abs/1308.3432). No gradient of the matrix exists. A matrix' integers, and what
products make of given integers, are the same on every backend. What is done in float32 differs by
its rounding, division on some GPUs included: an input that lies between two integers may become the
other one there.

A processor without dot products of int8 multiplies the matrices as floats instead, which is faster
there; EFFT_INT8=always or never overrides that.
"""

import os

import jax
import jax.numpy as jnp
from jax import lax

from efft import cpu
from efft.errors import InputError
from efft.models import dots
from efft.qtensor import NF4, QTensor, spread

jax.tree_util.register_dataclass(
  QTensor,
  data_fields=['value', 'scale', 'smooth', 'order', 'x_scale', 'x_zero', 'sums'],
  meta_fields=['codes', 'inputs', 'shape', 'stochastic'],
)


NO_INTEGERS = 'no int8 products on this processor, or EFFT_INT8=never: floats instead'


def dot_general(x, w, dimension_numbers):
  """`dots.dot_general`, where w may be a QTensor [K, N]: x [..., K] -> float32 [..., N]."""
  if not isinstance(w, QTensor):
    return dots.dot_general(x, w, dimension_numbers)
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
    raise ValueError(f'expected x [..., K] with w [K, N], found {dimension_numbers}')
  y = _product(x.reshape(-1, x.shape[-1]), w)
  return y.reshape(*x.shape[:-1], w.shape[1])


def integers() -> bool:
  """Whether products are of integers here."""
  setting = os.environ.get('EFFT_INT8', 'auto')
  if setting not in ('auto', 'always', 'never'):
    raise InputError('EFFT_INT8', repr(setting), 'auto, always or never', 'correct it')
  if setting != 'auto':
    return setting == 'always'
  return jax.default_backend() != 'cpu' or cpu.multiplies_int8()


def slowed(values) -> bool:
  """Whether products of these variables would be of integers, but are not here."""
  leaves = jax.tree.leaves(values, is_leaf=lambda x: isinstance(x, QTensor))
  return not integers() and any(isinstance(x, QTensor) and x.inputs != 'float' for x in leaves)


def rows(table, index):
  """table[index], float32 [..., features]: the rows of a table of embeddings, QTensor or array."""
  if not isinstance(table, QTensor):
    return jnp.take(table, index, axis=0).astype(jnp.float32)
  picked = _numbers(jnp.take(table.value, index, axis=0), table.codes)
  scale = table.scale
  scale = scale[0] if scale.shape[0] == 1 else jnp.take(scale, index, axis=0)
  return picked * spread(scale, (*scale.shape[:-1], table.shape[1]))


def dequantized(w, dtype=jnp.float32):
  """A QTensor as an array of `dtype`; an array as it is."""
  if not isinstance(w, QTensor):
    return w
  y = _numbers(w.value, w.codes) * spread(w.scale, w.shape)
  if w.order is not None:
    y = y[jnp.argsort(w.order)]
  return (y if w.smooth is None else y * (1 / w.smooth)[:, None]).astype(dtype)


def _numbers(value, codes: str):
  """float32 of codes as they are stored: [..., columns]."""
  if codes == 'int8':
    return value.astype(jnp.float32)
  value = jnp.concatenate([value & 15, value >> 4], -1)
  if codes == 'int4':
    return (value.astype(jnp.int8) - 8).astype(jnp.float32)
  return jnp.take(jnp.asarray(NF4, jnp.float32), value.astype(jnp.int32))


@jax.custom_vjp
def _product(x, w):
  """x [M, K] w -> float32 [M, N]."""
  if w.inputs == 'float' or not integers():
    return dots.contract('mk,kn->mn', x, dequantized(w, x.dtype))
  x = x.astype(jnp.float32)
  if w.smooth is not None:
    x = x * (1 / w.smooth)
  if w.inputs == 'token':
    q, step = per_row(x)
    return multiply(q, w.value).astype(jnp.float32) * (step * w.scale)
  if w.order is not None:
    x = x[:, w.order]
  groups = w.x_scale.shape[0]
  size = w.shape[0] // groups
  y = 0.0
  for g in range(groups):
    rows = slice(g * size, (g + 1) * size)
    zero = 0 if w.x_zero is None else w.x_zero[g]
    sums = multiply(static(x[:, rows], w.x_scale[g], zero), w.value[rows])
    if w.x_zero is not None:
      sums = sums - zero * w.sums[g]
    y = y + sums.astype(jnp.float32) * w.x_scale[g]
  return y * w.scale


def _forward(x, w):
  # The matrix as it is stored, not as it is multiplied: that is a copy of the weights in float.
  return _product(x, w), (w, jnp.zeros((0,), x.dtype))


def _backward(residuals, g):
  w, like = residuals
  if w.inputs == 'float' or not integers():
    kernel = dequantized(w, like.dtype)
    return dots.contract('mn,kn->mk', g.astype(like.dtype), kernel).astype(like.dtype), None
  q, step = per_row(g.astype(jnp.float32) * w.scale, w.stochastic)
  dx = multiply(q, w.value, transposed=True).astype(jnp.float32) * step
  if w.order is not None:
    dx = dx[:, jnp.argsort(w.order)]
  if w.smooth is not None:
    dx = dx * (1 / w.smooth)
  return dx.astype(like.dtype), None


_product.defvjp(_forward, _backward)


def per_row(x, stochastic: bool = False):
  """(int8 [M, K], float32 [M, 1]): rows of float32 x in steps of a 127th of their largest.

  With `stochastic`, a number between two integers becomes one of them, with probabilities such
  that the mean is right. What is drawn is a hash of the place and of the sum of all steps, so that
  equal inputs are rounded alike, and others not.
  """
  largest = jnp.max(jnp.abs(x), -1, keepdims=True)
  units = x * jnp.where(largest > 0, 127.0 / largest, 0.0)
  if stochastic:
    seed = jnp.stack([lax.bitcast_convert_type(jnp.sum(largest), jnp.uint32), jnp.uint32(0)])
    bits = dots.hash_bits(seed, x.shape) >> 8
    whole = jnp.minimum(jnp.floor(units + bits.astype(jnp.float32) * 2.0**-24), 127)
  else:
    whole = jnp.round(units)
  return whole.astype(jnp.int8), largest * (1 / 127)


def static(x, scale, zero):
  """int8 of float32 x, in steps of `scale` from the integer `zero`; what is beyond is cut off."""
  low = -127 if isinstance(zero, int) else -128
  whole = jnp.round(x * (1 / scale)) + zero
  return jnp.clip(whole, low, 127).astype(jnp.int8)


def multiply(x, w, transposed: bool = False):
  """int8 [M, K] times int8 [K, N] (transposed: [M, N] times [K, N]') -> int32 [M, N] ([M, K]).

  On NVIDIA GPUs, whose int8 units want multiples of 4, odd sizes (pruned ones) are filled up with
  zeros; larger ones are left alone.
  """
  axes = (((1,), (1 if transposed else 0,)), ((), ()))

  def plain(x, w):
    return lax.dot_general(x, w, axes, preferred_element_type=jnp.int32)

  def padded(x, w):
    m, n = x.shape[0], w.shape[0 if transposed else 1]
    return plain(_fill(x), _fill(w))[:m, :n]

  if all(size % 4 == 0 for size in (*x.shape, *w.shape)):
    return plain(x, w)
  return lax.platform_dependent(x, w, cuda=padded, default=plain)


def _fill(x):
  return jnp.pad(x, [(0, -size % 4) for size in x.shape])
