"""Matrix products that accumulate in float32, forward and backward.

XLA's CPU backend runs bfloat16 x bfloat16 -> float32 four to five times faster than
bfloat16 -> bfloat16 where the machine has the instructions, and on GPU and TPU the wider
accumulator is free. JAX's transposition rule would contract the float32 cotangent with a bfloat16
operand, so each product here brings its own backward pass.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax


def contract(subscripts: str, a, b):
  """einsum of two operands of one type, accumulated and returned in float32.

  float32 operands are multiplied as float32 on every backend (no TF32 on GPU, no bfloat16
  passes on TPU): whoever wants speed asks for bfloat16.
  """
  return jnp.einsum(
    subscripts, a, b, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST
  )


def dot_general(x, w, dimension_numbers):
  """The default of `Hooks.dot_general`: x [..., K] times w [K, N] -> float32 [..., N].

  Takes `lax.dot_general`'s arguments, so that another contraction can stand in its place. The
  product runs in x's type, to which w is cast.

  Raises:
    ValueError: dimension numbers other than 'last axis of x with first axis of w'.
  """
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())) or w.ndim != 2:
    raise ValueError(f'expected x [..., K] with w [K, N], found {dimension_numbers}')
  y = _matmul(x.reshape(-1, x.shape[-1]), w)
  return y.reshape(*x.shape[:-1], w.shape[1])


@jax.custom_vjp
def _matmul(x, w):
  return contract('mk,kn->mn', x, w.astype(x.dtype))


def _matmul_fwd(x, w):
  return _matmul(x, w), (x, w)


def _matmul_bwd(residuals, g):
  x, w = residuals
  g = g.astype(x.dtype)
  dx = contract('mn,kn->mk', g, w.astype(x.dtype)).astype(x.dtype)
  dw = contract('km,mn->kn', _transpose(x), g).astype(w.dtype)
  return dx, dw


_matmul.defvjp(_matmul_fwd, _matmul_bwd)


def _transpose(x):
  """x.T, laid out in memory where the backend's fast product needs it.

  The CPU's bfloat16 kernels do not take a transposed left operand; a barrier on the flat array
  keeps XLA from folding the transposition back into the product (4x on weight gradients).
  """
  if x.dtype != jnp.bfloat16 or jax.default_backend() != 'cpu':
    return x.T
  return lax.optimization_barrier(x.T.reshape(-1)).reshape(x.shape[::-1])


def attend(q, k, v, bias, seed, rate):
  """Scaled dot-product attention with dropout on the probabilities.

  Args:
    q: [B, T, H, K].
    k, v: [B, S, H, K].
    bias: float32 [B, S], added to the scores: 0 where a key may be seen, very negative elsewhere.
    seed, rate: of the dropout, as for `drop`.

  Returns:
    [B, T, H, K] in q's type. The backward pass keeps q, k, v and the probabilities in their own
    type and draws the dropout again. No gradient flows into `bias`.
  """
  return _attend(q, k, v, bias, _draw(seed, rate))


@jax.custom_vjp
def _attend(q, k, v, bias, draw):
  return _attend_fwd(q, k, v, bias, draw)[0]


def _attend_fwd(q, k, v, bias, draw):
  scores = contract('bqhd,bkhd->bhqk', q, k) * (q.shape[-1] ** -0.5)
  p = jax.nn.softmax(scores + bias[:, None, None, :], axis=-1).astype(q.dtype)
  y = contract('bhqk,bkhd->bqhd', _drop(p, draw), v).astype(q.dtype)
  return y, (q, k, v, p, draw)


def _attend_bwd(residuals, g):
  q, k, v, p, draw = residuals
  g = g.astype(q.dtype)
  dv = contract('bhqk,bqhd->bkhd', _drop(p, draw), g).astype(v.dtype)
  dp = _drop(contract('bqhd,bkhd->bhqk', g, v), draw)
  p = p.astype(jnp.float32)
  ds = (p * (dp - jnp.sum(dp * p, -1, keepdims=True)) * (q.shape[-1] ** -0.5)).astype(q.dtype)
  dq = contract('bhqk,bkhd->bqhd', ds, k).astype(q.dtype)
  dk = contract('bhqk,bqhd->bkhd', ds, q).astype(k.dtype)
  return dq, dk, dv, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def drop(x, seed, rate):
  """Dropout: zeroes each element with probability `rate`, scales the others by 1 / (1 - rate).

  The bits are a hash of the element's index and the seed: a few integer operations that fuse
  with their surroundings, instead of a threefry call per element (a quarter of a training step
  on CPU). The mask depends on nothing but (seed, shape), so it is the same however the array is
  sharded, and the backward pass draws it again instead of storing it.

  Args:
    x: any float array.
    seed: uint32 [2], or None for no dropout.
    rate: in [0, 1); a Python float, or float32 [] where it is computed with.
  """
  return _drop(x, _draw(seed, rate))


def never(rate) -> bool:
  """Whether a rate is known to be zero; one that is computed with is not."""
  return isinstance(rate, int | float) and not rate


def _draw(seed, rate):
  """(seed, the bits from which on an element stays, what it is multiplied by), or None."""
  if seed is None or never(rate):
    return None
  if isinstance(rate, float):
    threshold = jnp.uint32(round(rate * 2**32))
  else:
    threshold = (rate * jnp.float32(2**32)).astype(jnp.uint32)
  return seed, threshold, jnp.float32(1 / (1 - rate))


@jax.custom_vjp
def _drop(x, draw):
  if draw is None:
    return x
  seed, threshold, scale = draw
  # In float32: 1 / (1 - rate) rounded to bfloat16 would shift the mean of everything dropped.
  kept = (x.astype(jnp.float32) * scale).astype(x.dtype)
  return jnp.where(hash_bits(seed, x.shape) >= threshold, kept, jnp.zeros((), x.dtype))


_drop.defvjp(lambda x, draw: (_drop(x, draw), draw), lambda draw, g: (_drop(g, draw), None))


def hash_bits(seed, shape):
  """uint32 bits of `shape`, uniform: murmur3's finaliser over the index.

  One half of the seed enters before the first multiplication and the other after it, so that two
  seeds do not give shifted copies of one sequence.
  """
  index = lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
  h = index ^ seed[0]
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = h + seed[1]
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return h ^ (h >> 16)
