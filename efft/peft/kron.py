"""Updates of high rank from few numbers: Kronecker and Hadamard products of small matrices."""

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, product
from efft.peft.updates import QUERY_VALUE, kernel_shape, uniform

FAMILY = 'low rank'  # in `efft methods`


def krona(
  shape: tuple[int, int] = (16, 16),
  scale: float = 1.0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """KronA (Edalati et al. 2022, https://arxiv.org/abs/2212.10650): y + scale x (A kron B).

  A has `shape`, B [d_in / shape[0], d_out / shape[1]]; their product is never built. A starts
  uniform in +-1/sqrt(shape[0]), for which the paper gives no distribution, B at zero: the model
  starts unchanged. Trains shape[0] shape[1] + d_in d_out / (shape[0] shape[1]) numbers a kernel.
  Merges as W + scale A kron B.

  Args:
    shape: of A; must divide the kernel's.
    scale: fixed factor of the update.
    dropout: rate on x, while training.
    at: which kernels.
  """
  if len(shape) != 2 or min(shape) < 1:
    raise ValueError(f'shape {list(shape)} is not that of a matrix')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    if d_in % shape[0] or d_out % shape[1]:
      raise ValueError(f'shape {list(shape)} does not divide a kernel of [{d_in}, {d_out}]')
    return {
      'a': uniform(key, tuple(shape), shape[0]),
      'b': jnp.zeros((d_in // shape[0], d_out // shape[1]), jnp.float32),
    }

  def apply(p, site):
    return site.y + scale * _times_kron(site.dropout(site.x, dropout), p['a'], p['b'])

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] + scale * jnp.kron(p['a'], p['b'])}

  return Delta(init, apply, at, merge)


def lokr(
  rank: int = 8,
  alpha: float = 8.0,
  decompose_both: bool = False,
  decompose_factor: int = -1,
  at: str = QUERY_VALUE,
) -> Delta:
  """LoKr (Yeh et al. 2023, https://arxiv.org/abs/2309.14859): y + (alpha / rank) x (W1 kron W2).

  Each side of the kernel is cut into two factors m <= n as near to each other as they divide it;
  W1 [m_in, m_out] is whole and W2 [n_in, n_out] is w2_a w2_b of the given rank, or whole where the
  rank is half of its longer side or more: HF PEFT's choices. W1 starts at zero, so the model
  starts unchanged, W2 as Kaiming does. For a kernel of 768 x 768 (24 x 32) and rank 8 it trains
  24^2 + 8 (32 + 32) numbers. Merges as W + (alpha / rank) W1 kron W2.

  Args:
    rank: of W2.
    alpha: numerator of the scale, whether or not W2 is whole.
    decompose_both: W1 too is of low rank, if `rank` is below half of its longer side.
    decompose_factor: m, where it divides the side; otherwise m is at most that. -1: no limit.
    at: which kernels.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  if decompose_factor < 1 and decompose_factor != -1:
    raise ValueError(f'decompose_factor {decompose_factor} is neither -1 nor positive')
  scale = alpha / rank

  def init(key, site):
    (m_in, n_in), (m_out, n_out) = (factors(d, decompose_factor) for d in kernel_shape(site))
    keys = jax.random.split(key, 3)
    if decompose_both and rank < max(m_in, m_out) / 2:
      w1_a = uniform(keys[0], (m_in, rank), m_in)
      p = {'w1_a': w1_a, 'w1_b': jnp.zeros((rank, m_out), jnp.float32)}
    else:
      p = {'w1': jnp.zeros((m_in, m_out), jnp.float32)}
    if rank < max(n_in, n_out) / 2:
      p['w2_a'] = uniform(keys[1], (n_in, rank), n_in)
      p['w2_b'] = uniform(keys[2], (rank, n_out), rank)
    else:
      p['w2'] = uniform(keys[1], (n_in, n_out), n_in)
    return p

  def whole(p, name):
    return p[name] if name in p else product(p[f'{name}_a'], p[f'{name}_b'])

  def apply(p, site):
    return site.y + scale * _times_kron(site.x, whole(p, 'w1'), whole(p, 'w2'))

  def merge(p, module):
    update = jnp.kron(whole(p, 'w1'), whole(p, 'w2'))
    return {**module, 'kernel': module['kernel'] + scale * update}

  return Delta(init, apply, at, merge)


def loha(rank: int = 8, alpha: float = 8.0, at: str = QUERY_VALUE) -> Delta:
  """LoHa (Hyeon-Woo et al. 2021, https://arxiv.org/abs/2108.06098): y + s x (A1 B1 * A2 B2).

  The element-wise product of two matrices of rank r has rank r^2; s = alpha / rank. It equals
  (A1 o A2) (B1 o B2) with r^2 products of columns in A1 o A2, and is applied as that: x never
  meets a matrix of the kernel's size. A2 starts at zero, so the model starts unchanged, A1 uniform
  in +-1/sqrt(d_in), B1 and B2 in +-1/sqrt(rank), as in HF PEFT. Trains 2 rank (d_in + d_out)
  numbers a kernel. Merges as W + s (A1 B1) * (A2 B2).
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  scale = alpha / rank

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    keys = jax.random.split(key, 3)
    return {
      'a1': uniform(keys[0], (d_in, rank), d_in),
      'b1': uniform(keys[1], (rank, d_out), rank),
      'a2': jnp.zeros((d_in, rank), jnp.float32),
      'b2': uniform(keys[2], (rank, d_out), rank),
    }

  def apply(p, site):
    a = (p['a1'][:, :, None] * p['a2'][:, None, :]).reshape(-1, rank * rank)
    b = (p['b1'][:, None] * p['b2'][None]).reshape(rank * rank, -1)
    return site.y + scale * product(product(site.x, a).astype(site.x.dtype), b)

  def merge(p, module):
    update = product(p['a1'], p['b1']) * product(p['a2'], p['b2'])
    return {**module, 'kernel': module['kernel'] + scale * update}

  return Delta(init, apply, at, merge)


def factors(side: int, limit: int = -1) -> tuple[int, int]:
  """side = m n with m <= n as near to each other as possible; `limit` as in `lokr`."""
  if limit > 0 and side % limit == 0:
    return limit, side // limit
  top = side if limit < 0 else limit
  m = max(m for m in range(1, min(top, int(side**0.5)) + 1) if side % m == 0)
  return m, side // m


def _times_kron(x, a, b):
  """x [..., K] times a kron b, without building it."""
  y = product(x.reshape(*x.shape[:-1], a.shape[0], b.shape[0]), b).astype(x.dtype)
  y = product(jnp.swapaxes(y, -1, -2), a)
  return jnp.swapaxes(y, -1, -2).reshape(*x.shape[:-1], a.shape[1] * b.shape[1])
