"""Adapters whose kernels are sums of Kronecker products."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efft.peft.adapter import after_norm, before_norm, bottleneck, reduced, zeros
from efft.peft.base import Delta

FAMILY = 'adapters'  # in `efft methods`

glorot = jax.nn.initializers.glorot_uniform(batch_axis=0)


def compacter(
  n: int = 4,
  rank: int = 1,
  reduction: int = 32,
  activation: str = 'gelu',
  at: str = r'layer_\d+/(attention|mlp)_out',
) -> Delta:
  """Compacter (Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647).

  Houlsby's two adapters a layer, F(x) + adapter(F(x)), whose kernels are not trained but made:
  W = sum_i A_i (x) (s_i t_i) for i < n, with A_i [n, n] common to all adapters and both of their
  kernels (`rule`, as in AdapterHub: n^3 numbers in all), s_i [d_in / n, rank] and
  t_i [rank, d_out / n] of each kernel. A starts normal with standard deviation 1e-4, s and t
  Glorot-uniform, biases at zero: the start differs from the identity by rounding at most. Trains
  2 rank (d + m) + m + d numbers an adapter. The paper trains the LayerNorms too, a rule in
  configs/compacter.py.

  Args:
    n: terms of the sum; must divide d.
    rank: of s_i t_i.
    reduction: m = d / reduction, rounded up to a multiple of n (the paper's d are such that it
      is one).
    activation: of the bottleneck.
    at: which blocks.
  """
  return _phm(before_norm, at, n, rank, reduction, activation)


def compacter_plus(
  n: int = 4,
  rank: int = 1,
  reduction: int = 32,
  activation: str = 'gelu',
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """Compacter++ (Karimi Mahabadi et al. 2021, https://arxiv.org/abs/2106.04647).

  `compacter` after the FFN alone, half of its size. As in AdapterHub's `compacter++`, and unlike
  the authors' T5, the adapter reads norm(x + F(x)), as Pfeiffer's does.
  """
  return _phm(after_norm, at, n, rank, reduction, activation)


def kernel(rule, s, t):
  """sum_i rule_i (x) (s_i t_i): rule [n, n, n], s [n, K, r], t [n, r, N] -> [n K, n N]."""
  n, k, _ = s.shape
  return jnp.einsum('iab,ikr,irm->akbm', rule, s, t).reshape(n * k, n * t.shape[-1])


def _phm(read: Callable, at: str, n: int, rank: int, reduction: int, activation: str) -> Delta:
  if n < 1 or rank < 1:
    raise ValueError(f'n {n} and rank {rank} must be at least 1')
  size = reduced(reduction)
  plain = bottleneck(read, at, size, activation, zeros, zeros)

  def init(key, site):
    d = site.y.shape[-1]
    if d % n:
      raise ValueError(f'n {n} does not divide the hidden size {d}')
    m = -(-max(1, size(d)) // n) * n
    keys = jax.random.split(key, 4)
    return {
      'down_s': glorot(keys[0], (n, d // n, rank), jnp.float32),
      'down_t': glorot(keys[1], (n, rank, m // n), jnp.float32),
      'down_bias': jnp.zeros(m, jnp.float32),
      'up_s': glorot(keys[2], (n, m // n, rank), jnp.float32),
      'up_t': glorot(keys[3], (n, rank, d // n), jnp.float32),
      'up_bias': jnp.zeros(d, jnp.float32),
    }

  def shared(key, sites):
    return {'rule': 1e-4 * jax.random.normal(key, (n, n, n), jnp.float32)}

  def expand(p, path, key):
    made = {name: kernel(p['rule'], p[f'{name}_s'], p[f'{name}_t']) for name in ('down', 'up')}
    return {**made, 'down_bias': p['down_bias'], 'up_bias': p['up_bias']}

  return Delta(init, plain.apply, at, shared=shared, expand=expand)
