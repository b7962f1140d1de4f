"""What deltas that add a matrix to a kernel have in common."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, product

# Where most of them act by default.
QUERY_VALUE = r'layer_\d+/attention/(query|value)/matmul'
LINEARS = r'layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))/matmul'


def kernel_shape(site) -> tuple[int, int]:
  """[d_in, d_out] of the kernel that made site.y from site.x."""
  if site.w is None or site.x is None:
    raise ValueError('a site without a kernel')
  return site.w.shape


def uniform(key, shape, fan_in: int):
  """Uniform in +-1/sqrt(fan_in): torch's kaiming_uniform_ with a = sqrt(5)."""
  bound = fan_in**-0.5
  return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def dense(init: Callable, update: Callable, at: str, **fields) -> Delta:
  """y + x `update(parameters, kernel's shape)`, where the matrix is made as a whole."""

  def apply(p, site):
    return site.y + product(site.x, _whole(update(p, site.w.shape)))

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] + update(p, module['kernel'].shape)}

  return Delta(init, apply, at, merge, **fields)


def factored(init: Callable, factors: Callable, at: str, dropout: float = 0.0, **fields) -> Delta:
  """y + (x A) B, where (A, B) are `factors(parameters, kernel's shape)`; dropout acts on x."""

  def apply(p, site):
    a, b = _whole(factors(p, site.w.shape))
    low = product(site.dropout(site.x, dropout), a).astype(site.x.dtype)
    return site.y + product(low, b)

  def merge(p, module):
    a, b = factors(p, module['kernel'].shape)
    return {**module, 'kernel': module['kernel'] + a @ b}

  return Delta(init, apply, at, merge, **fields)


def _whole(matrices):
  """The matrices as they are. Otherwise XLA folds how they were made, a transposition say, into the
  products and their gradients, and the CPU has no bfloat16 product with transposed operands."""
  return jax.lax.optimization_barrier(matrices)
