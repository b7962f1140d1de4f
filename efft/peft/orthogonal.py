"""Rotations of what a kernel reads or writes, in place of something added to it.

Those that rotate the input compute y + (x R - x) W, so that they add to what other deltas have
done to y; what a delta before them added is not rotated, though it is by `merge`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from efft.models import dots
from efft.peft.base import Delta, product
from efft.peft.updates import LINEARS, QUERY_VALUE, kernel_shape

FAMILY = 'orthogonal'  # in `efft methods`


def oft(
  block_size: int = 32,
  block_share: bool = False,
  use_cayley_neumann: bool = False,
  num_cayley_neumann_terms: int = 5,
  at: str = QUERY_VALUE,
) -> Delta:
  """OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280): x R W, R block-diagonal, orthogonal.

  Each block is the Cayley transform (I - Q)(I + Q)^-1 of a skew-symmetric Q, of which the part
  above the diagonal trains: (block_size - 1) / 2 numbers for each input, 138,240 in BERT-base
  with blocks of 16. Q starts at zero, so the model starts unchanged. Merges as R W.

  OFTv2 (Qiu et al. 2025, https://arxiv.org/abs/2506.19847) replaces the inverse by a few terms of
  its Neumann series, which is orthogonal only while Q is small. HF PEFT does so by default; here
  it is an option. As there, the series is that of (I + Q)(I - Q)^-1, so switching it on turns the
  other way for the same Q. The constrained variant (COFT) and block dropout are left out.

  Args:
    block_size: b, which divides d_in.
    block_share: one block for all of a kernel's inputs.
    use_cayley_neumann: the series instead of the inverse.
    num_cayley_neumann_terms: powers of Q in it, counting Q^0; at least 4.
    at: which kernels; the default is query and value of every layer.
  """
  if block_size < 2:
    raise ValueError(f'block_size {block_size} is below 2')
  if num_cayley_neumann_terms < 4:
    raise ValueError(f'num_cayley_neumann_terms {num_cayley_neumann_terms} is below 4')

  def init(key, site):
    d_in, _ = kernel_shape(site)
    blocks = _blocks(d_in, block_size, 'block_size')
    shape = 1 if block_share else blocks, block_size * (block_size - 1) // 2
    return {'q': jnp.zeros(shape, jnp.float32)}

  def turn(p, d_in):
    q = skew(p['q'], block_size)
    r = cayley_neumann(q, num_cayley_neumann_terms) if use_cayley_neumann else cayley(q)
    return jnp.broadcast_to(r, (d_in // block_size, block_size, block_size))

  def apply(p, site):
    change = _by_blocks(site.x, turn(p, site.x.shape[-1])).astype(site.x.dtype)
    return site.y + site.contract(change, site.w)

  def merge(p, module):
    kernel = module['kernel']
    r = turn(p, kernel.shape[0])
    change = jnp.einsum('nij,njo->nio', r, kernel.reshape(*r.shape[:2], -1))
    return {**module, 'kernel': kernel + change.reshape(kernel.shape)}

  return Delta(init, apply, at, merge)


def boft(block_size: int = 8, factors: int = 2, at: str = QUERY_VALUE) -> Delta:
  """BOFT (Liu et al. 2023, https://arxiv.org/abs/2311.06243): s * (x R W), R a butterfly product.

  R is a product of `factors` sparse orthogonal matrices. Each is block-diagonal (Cayley, as in
  OFT) after a permutation: the i-th joins half blocks that lie 2^i half blocks apart, so that with
  enough of them every input reaches every output. s scales the outputs. R starts at the identity
  and s at one, so the model starts unchanged. Trains factors d_in (block_size - 1) / 2 + d_out
  numbers a kernel, and merges as R W s.

  HF PEFT keeps block_size^2 numbers a block, of which only the skew-symmetric part has an effect,
  and one factor unless its CUDA kernel is there. Block dropout is left out.

  Args:
    block_size: b, even if there are several factors.
    factors: m (boft_n_butterfly_factor); 2^(m - 1) b must divide d_in.
    at: which kernels; the default is query and value of every layer.
  """
  if block_size < 2 or factors < 1:
    raise ValueError(f'block_size {block_size}, factors {factors}: at least 2 and 1')
  if factors > 1 and block_size % 2:
    raise ValueError(f'block_size {block_size} is odd')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    _blocks(d_in, block_size * 2 ** (factors - 1), '2^(factors - 1) block_size')
    skews = factors, d_in // block_size, block_size * (block_size - 1) // 2
    return {'q': jnp.zeros(skews, jnp.float32), 's': jnp.ones(d_out, jnp.float32)}

  def turn(p, x):
    """x R, in float32."""
    for i in reversed(range(factors)):
      moved = butterfly(x, i, block_size)
      moved = moved + _by_blocks(moved, cayley(skew(p['q'][i], block_size)))
      x = butterfly(moved, i, block_size, back=True)
    return x

  def apply(p, site):
    x = site.x.astype(jnp.float32)
    change = (turn(p, x) - x).astype(site.x.dtype)
    return p['s'] * (site.y + site.contract(change, site.w))

  def merge(p, module):
    rotation = turn(p, jnp.eye(module['kernel'].shape[0]))
    return {**module, 'kernel': p['s'] * (rotation @ module['kernel'])}

  return Delta(init, apply, at, merge)


def hra(
  rank: int = 8,
  regularization: float = 0.0,
  at: str = LINEARS,
) -> Delta:
  """HRA (Yuan et al. 2024, https://arxiv.org/abs/2405.17484): x R W, R a chain of reflections.

  R = H_r ... H_1 with H_i = I - 2 u_i u_i' / |u_i|^2. The product is applied as x R - x =
  -(x U) T U', with U the normalised u and T [rank, rank] triangular, and U' W is taken first: a
  low-rank update that follows W. Vectors start in equal pairs, whose reflections cancel, each
  uniform in +-sqrt(2 / rank). Trains rank d_in numbers a kernel, 663,552 for all linears of
  BERT-base. Merges as R W. Gram-Schmidt (apply_GS), which such pairs do not survive, is left out.

  Args:
    rank: r, how many reflections; even.
    regularization: lambda; adds lambda |U'U - I|^2 to the loss for each kernel.
    at: which kernels; the default is all linear layers.
  """
  if rank < 2 or rank % 2:
    raise ValueError(f'rank {rank} is not an even number from 2 up')

  def init(key, site):
    d_in, _ = kernel_shape(site)
    bound = math.sqrt(2 / rank)
    half = jax.random.uniform(key, (d_in, rank // 2), jnp.float32, -bound, bound)
    return {'u': jnp.repeat(half, 2, axis=1)}

  def unit(p):
    return p['u'] / jnp.linalg.norm(p['u'], axis=0)

  def follow(u, seen):
    """-T U' W from U' W."""
    gram = u.T @ u
    inverse = jnp.tril(gram, -1) + 0.5 * jnp.eye(rank)
    return -jax.scipy.linalg.solve_triangular(inverse, seen, lower=True)

  def apply(p, site):
    u = unit(p)
    seen = site.contract(u.T.astype(site.x.dtype), site.w)
    low = product(site.x, u).astype(site.x.dtype)
    return site.y + product(low, follow(u, seen))

  def merge(p, module):
    u, kernel = unit(p), jnp.asarray(module['kernel'])
    return {**module, 'kernel': kernel + u @ follow(u, u.T @ kernel)}

  def penalty(p, path):
    u = unit(p)
    return regularization * jnp.sum((u.T @ u - jnp.eye(rank)) ** 2)

  return Delta(init, apply, at, merge, penalty=penalty if regularization else None)


def road(
  variant: str = 'road_1',
  group_size: int = 64,
  at: str = LINEARS,
) -> Delta:
  """RoAd (Liao & Monz 2024, https://arxiv.org/abs/2409.00119): rotates pairs of outputs.

  A group's outputs are paired, first half with second; (y1, y2) becomes (a cos t y1 - a sin t y2,
  a sin t y1 + a cos t y2). road_1 trains one angle t and one scale a for each pair, road_2 one of
  each for each output, road_4 one of each for all four entries of a pair's matrix: d_out, 2 d_out,
  4 d_out numbers a kernel (road_1: 82,944 in BERT-base). Angles start at 0 and scales at 1, so the
  model starts unchanged. Merges into the kernel's columns.

  Acts on x W, before the bias: HF PEFT turns x W + b, so that its checkpoints need their b turned.

  Args:
    variant: 'road_1', 'road_2' or 'road_4'.
    group_size: even, divides d_out. It says which outputs are pairs.
    at: which kernels; the default is all linear layers.
  """
  sizes = {'road_1': 0.5, 'road_2': 1, 'road_4': 2}
  if variant not in sizes:
    raise ValueError(f'variant {variant!r} is none of {", ".join(sizes)}')
  if group_size < 2 or group_size % 2:
    raise ValueError(f'group_size {group_size} is not an even number from 2 up')

  def init(key, site):
    _, d_out = kernel_shape(site)
    _blocks(d_out, group_size, 'group_size')
    size = (int(sizes[variant] * d_out),)
    return {'theta': jnp.zeros(size, jnp.float32), 'alpha': jnp.ones(size, jnp.float32)}

  def turn(p, y):
    return road_rotate(p['theta'], p['alpha'], y, variant, group_size)

  def apply(p, site):
    return turn(p, site.y)

  def merge(p, module):
    return {**module, 'kernel': turn(p, module['kernel'])}

  return Delta(init, apply, at, merge)


def road_rotate(theta, alpha, y, variant: str, group_size: int):
  """The outputs y [..., d_out] of RoAd's rotations."""
  half = group_size // 2
  # As groups of two halves, which road_1 fills with the same numbers.
  groups = {'road_1': (-1, 1, 1, half), 'road_2': (-1, 1, 2, half), 'road_4': (-1, 2, 2, half)}
  theta, alpha = (v.reshape(groups[variant]) for v in (theta, alpha))
  own = alpha[:, 0] * jnp.cos(theta[:, 0])
  other = alpha[:, -1] * jnp.sin(theta[:, -1])
  y2 = y.reshape(*y.shape[:-1], -1, 2, half)
  swapped = jnp.stack([-y2[..., 1, :], y2[..., 0, :]], axis=-2)
  return (y2 * own + swapped * other).reshape(y.shape)


def skew(q, size: int):
  """[..., size (size - 1) / 2] -> skew-symmetric [..., size, size]: q above the diagonal."""
  rows, columns = np.triu_indices(size, 1)
  upper = jnp.zeros((*q.shape[:-1], size, size), q.dtype).at[..., rows, columns].set(q)
  return upper - jnp.swapaxes(upper, -1, -2)


def cayley(q):
  """(I - Q)(I + Q)^-1 - I, which is -2 (I + Q)^-1 Q: exactly zero where Q is."""
  return jnp.linalg.solve(jnp.eye(q.shape[-1]) + q, -2.0 * q)


def cayley_neumann(q, terms: int):
  """(I + Q)(I + Q + ... + Q^(terms - 2)) - I, close to (I + Q)(I - Q)^-1 - I for small Q."""
  change, power = 2.0 * q, q
  for i in range(2, terms):
    power = power @ q
    change = change + (2.0 if i < terms - 1 else 1.0) * power
  return change


def butterfly(x, level: int, block_size: int, back: bool = False):
  """Inputs [..., d] in the order in which the factor of a level has its blocks, or back again.

  Among 2^level blocks, half block p of the first half of them is followed by half block p of the
  second half: the two make one block of the new order.
  """
  inner = (2**level, 2) if back else (2, 2**level)
  halves = x.reshape(*x.shape[:-1], -1, *inner, block_size // 2)
  return jnp.swapaxes(halves, -2, -3).reshape(x.shape)


def _by_blocks(x, r):
  """x [..., d] times block-diagonal r [n, b, b], in float32, as blocks of this size cost little."""
  blocks = x.reshape(*x.shape[:-1], *r.shape[:2]).astype(jnp.float32)
  return dots.contract('...nb,nbc->...nc', blocks, r).reshape(x.shape)


def _blocks(width: int, size: int, name: str) -> int:
  if width % size:
    raise ValueError(f'{name} {size} does not divide {width}')
  return width // size
