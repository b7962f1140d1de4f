"""A few trained numbers behind projections that are drawn once and never trained."""

import jax
import jax.numpy as jnp

from efft.models import dots
from efft.peft.base import Delta, product
from efft.peft.updates import LINEARS, QUERY_VALUE, dense, kernel_shape

FAMILY = 'low rank'  # in `efft methods`


def vera(
  rank: int = 1024, d_initial: float = 0.1, dropout: float = 0.0, at: str = QUERY_VALUE
) -> Delta:
  """VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454): y + ((x A * d) B) * b.

  A [d_in, rank] and B [rank, d_out] are random, frozen and the same for all sites: as large as the
  largest kernel needs, and cut to size for the others. Both start as torch's kaiming_uniform_:
  in +-sqrt(6 / d_in) and +-sqrt(6 / rank). Trained are the scales d [rank], which start at
  `d_initial`, and b [d_out], at zero, so the model starts unchanged: rank + d_out numbers a
  kernel. Merges as W + (A * d) B * b. As HF PEFT's, but that A and B are always kept with the
  method instead of drawn again from a seed.

  Args:
    rank: r; large, as its numbers are cheap.
    d_initial: where d starts.
    dropout: rate on x before A, while training.
    at: which kernels.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')

  def shared(key, sites):
    d_in, d_out = (max(site.w.shape[axis] for site in sites.values()) for axis in (0, 1))
    kaiming = jax.nn.initializers.he_uniform()
    key_a, key_b = jax.random.split(key)
    return {
      'a': kaiming(key_a, (d_in, rank), jnp.float32),
      'b': kaiming(key_b, (rank, d_out), jnp.float32),
    }

  def init(key, site):
    _, d_out = kernel_shape(site)
    return {
      'lambda_d': jnp.full(rank, d_initial, jnp.float32),
      'lambda_b': jnp.zeros(d_out, jnp.float32),
    }

  def apply(p, site):
    d_in, d_out = site.w.shape
    low = product(site.dropout(site.x, dropout), p['a'][:d_in]) * p['lambda_d']
    return site.y + product(low.astype(site.x.dtype), p['b'][:, :d_out]) * p['lambda_b']

  def merge(p, module):
    d_in, d_out = module['kernel'].shape
    update = product(p['a'][:d_in] * p['lambda_d'], p['b'][:, :d_out]) * p['lambda_b']
    return {**module, 'kernel': module['kernel'] + update}

  return Delta(init, apply, at, merge, shared)


def said(
  dim: int = 1000,
  at: str = LINEARS,
) -> Delta:
  """Intrinsic SAID (Aghajanyan et al. 2020, https://arxiv.org/abs/2012.13255): W + lambda P v.

  One vector v [dim], shared by all kernels, moves them through projections P that are drawn once;
  lambda is a scale of each. v starts at zero, lambda at one: the model starts unchanged. Trains
  dim + 1 for each kernel.

  Deviations: P has one entry in a row, of random sign (a hashed projection: weight k of a kernel
  follows +-v[k mod dim]), where the paper mixes all of v with the Fastfood transform; its columns
  are orthogonal and of length one as there, and it costs nothing to keep but a seed. Kernels alone
  move, not biases, norms and embeddings, and lambda is one for each kernel instead of each layer.

  Args:
    dim: d, the intrinsic dimension.
    at: which kernels; the default is all six of every layer.
  """
  if dim < 1:
    raise ValueError(f'dim {dim} is below 1')

  def shared(key, sites):
    return {'v': jnp.zeros(dim, jnp.float32)}

  def init(key, site):
    kernel_shape(site)
    return {'seed': jax.random.bits(key, (2,), jnp.uint32), 'lambda': jnp.ones(1, jnp.float32)}

  def update(p, shape):
    size = shape[0] * shape[1]
    rows = -(-size // dim)
    bits = dots.hash_bits(p['seed'], (rows, dim))
    # The sign is the hash's top bit.
    signs = 1.0 - 2.0 * (bits >> 31).astype(jnp.float32)
    return (signs * (p['v'] * p['lambda'] / rows**0.5)).reshape(-1)[:size].reshape(shape)

  return dense(init, update, at, shared=shared)
