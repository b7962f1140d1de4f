"""Bottleneck adapters: two small linear layers beside or behind a block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efft.models.layers import ACTIVATIONS
from efft.peft.base import Delta, Site, product

FAMILY = 'adapters'  # in `efft methods`

truncated = jax.nn.initializers.truncated_normal
normal = jax.nn.initializers.normal(0.02)
kaiming = jax.nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')
zeros = jax.nn.initializers.zeros


def before_norm(site: Site):
  """F(x), the block's own output."""
  return site.y


def after_norm(site: Site):
  """norm(x + F(x)): what leaves the block when no adapter is there."""
  return site.norm(site.x + site.y)


def bottleneck(
  read: Callable[[Site], jax.Array],
  at: str,
  size: int | Callable[[int], int],
  activation: str,
  down: Callable,
  up: Callable,
  scale: float = 1.0,
  learn_scale: str = '',
  depth_dropout: float = 0.0,
) -> Delta:
  """y + scale (act(h W_down + b_down) W_up + b_up), with h = read(site).

  Args:
    read: what the adapter sees, [B, T, D].
    at: regex of sites of [B, T, D].
    size: width of the bottleneck, or a function of D.
    activation: a key of `efft.models.layers.ACTIVATIONS`.
    down, up: initialisers of the two kernels; biases start at zero.
    scale: factor of the branch.
    learn_scale: '' for a fixed factor, 'one' for a learnt number, 'channel' for one a channel,
      which start at `scale`.
    depth_dropout: rate at which a whole example skips the branch while training.
  """
  act = activation_function(activation)

  def init(key, site):
    d = site.y.shape[-1]
    m = size(d) if callable(size) else size
    if m < 1:
      raise ValueError(f'a bottleneck of {m} units for a hidden size of {d}')
    key_down, key_up = jax.random.split(key)
    learnt = (
      {'scale': jnp.full({'one': 1, 'channel': d}[learn_scale], scale)} if learn_scale else {}
    )
    return {
      'down': down(key_down, (d, m), jnp.float32),
      'down_bias': jnp.zeros(m, jnp.float32),
      'up': up(key_up, (m, d), jnp.float32),
      'up_bias': jnp.zeros(d, jnp.float32),
      **learnt,
    }

  def apply(p, site):
    y = branch(p, read(site), act) * p.get('scale', scale)
    if depth_dropout:
      y = y * site.dropout(jnp.ones((y.shape[0], 1, 1)), depth_dropout)
    return site.y + y.astype(site.y.dtype)

  return Delta(init, apply, at)


def branch(p, h, act: Callable):
  """act(h W_down + b_down) W_up + b_up in float32, h [..., D] in the type of the products."""
  m = act(product(h, p['down']) + p['down_bias']).astype(h.dtype)
  return product(m, p['up']) + p['up_bias']


def activation_function(name: str) -> Callable:
  if name not in ACTIVATIONS:
    raise ValueError(f'activation {name!r} is none of {", ".join(ACTIVATIONS)}')
  return ACTIVATIONS[name]


def reduced(reduction: int) -> Callable[[int], int]:
  """d -> d // reduction."""
  if reduction < 1:
    raise ValueError(f'reduction {reduction} is below 1')
  return lambda d: d // reduction


def houlsby(
  size: int = 64, activation: str = 'gelu', at: str = r'layer_\d+/(attention|mlp)_out'
) -> Delta:
  """Houlsby et al. 2019 (https://arxiv.org/abs/1902.00751): two sequential adapters a layer.

  Each block's output F(x) becomes y = F(x) + adapter(F(x)) before the residual sum and norm. Both
  kernels start truncated normal with standard deviation 1e-3, as in the authors' code (the paper
  says 1e-2): nearly, not exactly, the identity. The paper trains the LayerNorms too: that is a
  rule, in configs/houlsby.py. Trains 2 (2 d m + m + d) numbers a layer.
  """
  return bottleneck(before_norm, at, size, activation, truncated(1e-3), truncated(1e-3))


def pfeiffer(
  reduction: int = 16, activation: str = 'relu', at: str = r'layer_\d+/mlp_out'
) -> Delta:
  """Pfeiffer et al. 2020 (https://arxiv.org/abs/2005.00247): one adapter a layer, after the FFN.

  With F = mlp(x): y = F + adapter(norm(x + F)), then norm(x + y) as ever: the same pretrained
  LayerNorm acts twice, as in AdapterHub's `seq_bn`. Kernels start normal with standard deviation
  0.02, so the start is near the identity only. Trains 2 d (d / reduction) + d / reduction + d
  numbers a layer.
  """
  return bottleneck(after_norm, at, reduced(reduction), activation, normal, normal)


def parallel(
  size: int = 64,
  scale: float = 4.0,
  learn_scale: bool = False,
  activation: str = 'relu',
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """He et al. 2022 (https://arxiv.org/abs/2110.04366): an adapter that reads the FFN's input.

  y = F(x) + scale adapter(x). W_down starts Kaiming-uniform with a = sqrt(5), which is uniform
  in +-1/sqrt(d), and W_up at zero: the model starts unchanged. Trains 2 d m + m + d numbers a
  layer.

  Args:
    size: m, width of the bottleneck.
    scale: factor of the adapter.
    learn_scale: trains it, one more number a layer, from `scale` on (AdapterHub's
      `scaling="learned"` starts at 1).
    activation: of the bottleneck.
    at: which blocks.
  """
  learnt = 'one' if learn_scale else ''
  return bottleneck(lambda site: site.x, at, size, activation, kaiming, zeros, scale, learnt)


def adapter_plus(
  reduction: int = 96,
  activation: str = 'gelu',
  depth_dropout: float = 0.1,
  at: str = r'layer_\d+/output',
) -> Delta:
  """Adapter+ (Steitz and Roth 2024, https://arxiv.org/abs/2406.06820): a scale a channel.

  The output h of a layer becomes h + s * adapter(h), s [d] learnt and 1 at first. Kernels start
  normal with standard deviation 0.01, cut off at two of them: the authors' "Houlsby init", near
  the identity. While training, an example skips a layer's adapter at the rate `depth_dropout`.
  Behind a post-norm layer this is behind its LayerNorm, as in AdapterHub's `AdapterPlusConfig`;
  the authors' vision transformers are pre-norm. Trains 2 d m + m + 2 d numbers a layer with
  m = d / reduction, at least 1.
  """
  size = reduced(reduction)
  init = truncated(1e-2, lower=-2.0, upper=2.0)
  return bottleneck(
    before_norm, at, lambda d: max(1, size(d)), activation, init, init,
    learn_scale='channel', depth_dropout=depth_dropout,
  )  # fmt: skip


def invertible(reduction: int = 2, activation: str = 'relu', at: str = 'embed') -> Delta:
  """Invertible adapter of MAD-X (Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00052).

  A NICE coupling of the two halves of each token's embedding: y1 = x1 + F(x2), y2 = x2 + G(y1),
  with F and G bottlenecks of width (d / 2) / reduction. Kernels start normal with standard
  deviation 0.02 as in AdapterHub, near the identity. MAD-X inverts it before a language model's
  output layer; a classifier has none, so it acts once, on the embeddings. For widths that are
  even it trains 2 (2 (d / 2) m + m + d / 2) numbers in all.
  """
  act = activation_function(activation)
  size = reduced(reduction)

  def init(key, site):
    d = site.y[0].shape[-1]
    halves = {'f': (d - d // 2, d // 2), 'g': (d // 2, d - d // 2)}
    p = {}
    for (name, (d_in, d_out)), own in zip(halves.items(), jax.random.split(key), strict=True):
      m = size(d_in)
      if m < 1:
        raise ValueError(f'a bottleneck of {m} units for half a hidden size of {d_in}')
      key_down, key_up = jax.random.split(own)
      p |= {
        f'{name}_down': normal(key_down, (d_in, m), jnp.float32),
        f'{name}_down_bias': jnp.zeros(m, jnp.float32),
        f'{name}_up': normal(key_up, (m, d_out), jnp.float32),
        f'{name}_up_bias': jnp.zeros(d_out, jnp.float32),
      }
    return p

  def apply(p, site):
    x, mask = site.y

    def half(name, h):
      own = {leaf: p[f'{name}_{leaf}'] for leaf in ('down', 'down_bias', 'up', 'up_bias')}
      return branch(own, h, act).astype(h.dtype)

    x1, x2 = jnp.split(x, [x.shape[-1] // 2], axis=-1)
    y1 = x1 + half('f', x2)
    return jnp.concatenate([y1, x2 + half('g', y1)], -1), mask

  return Delta(init, apply, at)
