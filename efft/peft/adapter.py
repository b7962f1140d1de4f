"""Bottleneck adapters: two small linear layers beside or behind a block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efft.models.layers import ACTIVATIONS
from efft.peft.base import Delta, Site, product

truncated = jax.nn.initializers.truncated_normal(1e-3)
normal = jax.nn.initializers.normal(0.02)
kaiming = jax.nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
zeros = jax.nn.initializers.zeros


def bottleneck(
  read: Callable[[Site], jax.Array],
  at: str,
  size: int | Callable[[int], int],
  activation: str,
  down: Callable,
  up: Callable,
  scale: float = 1.0,
) -> Delta:
  """y + scale (act(h W_down + b_down) W_up + b_up), with h = read(site).

  Args:
    read: what the adapter sees, [B, T, D].
    at: regex of '*_out' sites.
    size: width of the bottleneck, or a function of D.
    activation: a key of `efft.models.layers.ACTIVATIONS`.
    down, up: initialisers of the two kernels; biases start at zero.
    scale: fixed factor of the branch.
  """
  if activation not in ACTIVATIONS:
    raise ValueError(f'activation {activation!r} is none of {", ".join(ACTIVATIONS)}')
  act = ACTIVATIONS[activation]

  def init(key, site):
    d = site.y.shape[-1]
    m = size(d) if callable(size) else size
    if m < 1:
      raise ValueError(f'a bottleneck of {m} units for a hidden size of {d}')
    key_down, key_up = jax.random.split(key)
    return {
      'down': down(key_down, (d, m), jnp.float32),
      'down_bias': jnp.zeros(m, jnp.float32),
      'up': up(key_up, (m, d), jnp.float32),
      'up_bias': jnp.zeros(d, jnp.float32),
    }

  def apply(p, site):
    h = read(site)
    m = act(product(h, p['down']) + p['down_bias']).astype(h.dtype)
    return site.y + ((product(m, p['up']) + p['up_bias']) * scale).astype(site.y.dtype)

  return Delta(init, apply, at)


def houlsby(
  size: int = 64, activation: str = 'gelu', at: str = r'layer_\d+/(attention|mlp)_out'
) -> Delta:
  """Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751): two sequential adapters a layer.

  Each block's output F(x) becomes y = F(x) + adapter(F(x)) before the residual sum and norm. Both
  kernels start truncated normal with standard deviation 1e-3, as in the authors' code (the paper
  says 1e-2): nearly, not exactly, the identity. The paper trains the LayerNorms too: that is a
  rule, in configs/houlsby.py. Trains 2 (2 d m + m + d) numbers a layer.
  """
  return bottleneck(lambda site: site.y, at, size, activation, truncated, truncated)


def pfeiffer(
  reduction: int = 16, activation: str = 'relu', at: str = r'layer_\d+/mlp_out'
) -> Delta:
  """Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247): one adapter a layer, after the FFN.

  With F = mlp(x): y = F + adapter(norm(x + F)), then norm(x + y) as ever: the same pretrained
  LayerNorm acts twice, as in AdapterHub's `seq_bn`. Kernels start normal with standard deviation
  0.02, so the start is near the identity only. Trains 2 d (d / reduction) + d / reduction + d
  numbers a layer.
  """
  if reduction < 1:
    raise ValueError(f'reduction {reduction} is below 1')
  return bottleneck(
    lambda site: site.norm(site.x + site.y),
    at,
    lambda d: d // reduction,
    activation,
    normal,
    normal,
  )


def parallel(
  size: int = 64,
  scale: float = 4.0,
  activation: str = 'relu',
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """He et al. 2022 (https://arxiv.org/abs/2110.04366): an adapter that reads the FFN's input.

  y = F(x) + scale adapter(x). W_down starts Kaiming-uniform with a = sqrt(5), which is uniform
  in +-1/sqrt(d), and W_up at zero: the model starts unchanged. Trains 2 d m + m + d numbers a
  layer.
  """
  return bottleneck(lambda site: site.x, at, size, activation, kaiming, zeros, scale)
