"""The parts of an encoder, and the two seams through which everything else acts on it.

Shapes: B batch, T tokens, D hidden, H heads, K head_dim, F mlp width, V vocabulary.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from efft.errors import InputError
from efft.models import dots, quantized
from efft.qtensor import QTensor


def untouched(module: nn.Module, site: str, y, **context):
  """The tap that does nothing."""
  del module, site, context
  return y


def compose(*taps: Callable) -> Callable:
  """The tap that lets taps act one after the other."""

  def tap(module, site, y, **context):
    for one in taps:
      y = one(module, site, y, **context)
    return y

  return tap


@dataclasses.dataclass(frozen=True)
class Hooks:
  """How the model contracts, and who may touch a named value.

  Attributes:
    dot_general: x [..., K], kernel [K, N] -> float32 [..., N], with `lax.dot_general`'s arguments.
      The kernel may be a `efft.qtensor.QTensor`.
    tap: called as `tap(module, site, y, **context)` at each named value; returns the value that
      the model goes on with. `module.path` and `site` name the place: 'layer_0/mlp/act'.

  | site, a path of the model                                | value               | context  |
  |----------------------------------------------------------|---------------------|----------|
  | `embed/words`: word embeddings, before positions         | (x, mask, types)    | ids, w   |
  | `embed`: after norm and dropout                          | (x, mask)           | ids      |
  | `.../matmul`: of every linear layer, before the bias     | y float32 [B, T, N] | x, w     |
  | `layer_i/attention/kv`: k, v [B, T, H, K]                | (k, v, mask)        | x, q     |
  | `layer_i/attention/heads`                                | y [B, T, H, K]      | x        |
  | `layer_i/mlp/act`                                        | y [B, T, F]         | x        |
  | `layer_i/{attention_out,mlp_out}`: before the residual   | y [B, T, D]         | x, norm  |
  | `layer_i/output`                                         | y [B, T, D]         |          |
  | `output`: what is pooled, [B, T, D]                      | (x, mask)           | features |

  Sites inside a layer have the mask [B, T] as context too; q is like k. `features` is the input
  of the first layer and the output of each, L + 1 arrays [B, T, D].

  Linear layers: `layer_i/attention/{query,key,value,out}`, `layer_i/mlp/{up,down}`, `pooler`,
  `head/dense`, `head/out`, `embed/project`, where the architecture has them.
  """

  dot_general: Callable = quantized.dot_general
  tap: Callable = untouched


@jax.custom_jvp
def gelu(x):
  """x Phi(x), the activation of BERT (Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415).

  By erf, as torch has it, in float32. `jax.nn.gelu` takes erfc, which XLA makes several passes over
  the array of on a CPU; and for the gradient it keeps several arrays, here one, the derivative.
  """
  return _gelu(x)[0]


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (tangent,) = primals, tangents
  y, cumulative = _gelu(x)
  wide = x.astype(jnp.float32)
  density = jnp.exp(-0.5 * jnp.square(wide)) * math.sqrt(0.5 / math.pi)
  return y, (cumulative + wide * density).astype(x.dtype) * tangent


def _gelu(x):
  wide = x.astype(jnp.float32)
  cumulative = 0.5 * (1.0 + lax.erf(wide * math.sqrt(0.5)))
  return (wide * cumulative).astype(x.dtype), cumulative


ACTIVATIONS = {
  'gelu': gelu,
  'gelu_new': jax.nn.gelu,
  'gelu_pytorch_tanh': jax.nn.gelu,
  'relu': jax.nn.relu,
  'silu': jax.nn.silu,
  'swish': jax.nn.silu,
  'tanh': jnp.tanh,
}


def dropout_seed(module: nn.Module, rate):
  """uint32 [2] drawn from the 'dropout' stream; None when evaluating (no such stream)."""
  if dots.never(rate) or not module.has_rng('dropout'):
    return None
  return jax.random.bits(module.make_rng('dropout'), (2,), jnp.uint32)


def dropout(module: nn.Module, x, rate):
  """Drops elements of x while training; identity when evaluating."""
  return dots.drop(x, dropout_seed(module, rate), rate)


def parameter(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]):
  """`module.param`; a QTensor as it is, whose parts linen would compare with the shape."""
  value = module.variables.get('params', {}).get(name)
  return value if isinstance(value, QTensor) else module.param(name, init, shape)


class Linear(nn.Module):
  """x [..., K] -> [..., features]; accumulates in float32, returns x's type."""

  features: int
  hooks: Hooks
  init_range: float = 0.02

  @nn.compact
  def __call__(self, x, mask=None):
    """`mask` goes to the tap, where x has an axis of tokens."""
    init = nn.initializers.normal(self.init_range)
    w = parameter(self, 'kernel', init, (x.shape[-1], self.features))
    b = self.param('bias', nn.initializers.zeros, (self.features,))
    y = self.hooks.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))
    y = self.hooks.tap(self, 'matmul', y, x=x, w=w, mask=mask)
    return (y + b.astype(y.dtype)).astype(x.dtype)


class Table(nn.Module):
  """A learnt row for each index: int [...] -> float32 [..., features]."""

  rows: int
  features: int
  init_range: float = 0.02

  @nn.compact
  def __call__(self, index):
    init = nn.initializers.normal(self.init_range)
    return quantized.rows(parameter(self, 'embedding', init, (self.rows, self.features)), index)


def normalised(x, eps: float):
  """x with mean 0 and variance 1 over the last axis, float32."""
  y = x.astype(jnp.float32)
  y = y - jnp.mean(y, -1, keepdims=True)
  return y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)


class LayerNorm(nn.Module):
  """Normalises the last axis with float32 statistics, returns `dtype` (default: x's type)."""

  eps: float
  dtype: Any = None

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return (normalised(x, self.eps) * scale + bias).astype(self.dtype or x.dtype)


class Bias(nn.Module):
  """What is left of a linear layer without inputs: x [..., D] -> its bias, in x's shape."""

  @nn.compact
  def __call__(self, x):
    b = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return jnp.broadcast_to(b, x.shape).astype(x.dtype)


class Attention(nn.Module):
  """Multi-head self-attention. x [B, T, D], mask bool [B, T] -> [B, T, D].

  Without heads (pruned) it is the bias of its last linear layer, and has no sites.
  """

  cfg: Any
  hooks: Hooks
  heads: int

  @nn.compact
  def __call__(self, x, mask):
    cfg, hooks, width = self.cfg, self.hooks, self.heads * self.cfg.head_dim
    if not width:
      return Bias(name='out')(x)

    def project(name):
      y = Linear(width, hooks, cfg.initializer_range, name=name)(x, mask)
      return y.reshape(*x.shape[:2], self.heads, cfg.head_dim)

    q, k, v = project('query'), project('key'), project('value')
    k, v, seen = hooks.tap(self, 'kv', (k, v, mask), x=x, mask=mask, q=q)
    bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
    seed = dropout_seed(self, cfg.attention_dropout)
    y = dots.attend(q, k.astype(q.dtype), v.astype(q.dtype), bias, seed, cfg.attention_dropout)
    y = hooks.tap(self, 'heads', y, x=x, mask=mask)
    y = y.reshape(*x.shape[:2], width).astype(x.dtype)
    return Linear(cfg.hidden, hooks, cfg.initializer_range, name='out')(y, mask)


class Mlp(nn.Module):
  """Position-wise feed-forward. x [B, T, D], mask bool [B, T] -> [B, T, D].

  Without units (pruned) it is the bias of its last linear layer, and has no sites.
  """

  cfg: Any
  hooks: Hooks
  width: int

  @nn.compact
  def __call__(self, x, mask):
    cfg, hooks = self.cfg, self.hooks
    if not self.width:
      return Bias(name='down')(x)
    h = Linear(self.width, hooks, cfg.initializer_range, name='up')(x, mask)
    h = hooks.tap(self, 'act', ACTIVATIONS[cfg.activation](h), x=x, mask=mask).astype(x.dtype)
    return Linear(cfg.hidden, hooks, cfg.initializer_range, name='down')(h, mask)


class Layer(nn.Module):
  """One post-norm transformer layer with `heads` heads and an FFN of `width` units."""

  cfg: Any
  hooks: Hooks
  heads: int
  width: int

  @nn.compact
  def __call__(self, x, mask):
    cfg, hooks = self.cfg, self.hooks
    attention = Attention(cfg, hooks, self.heads, name='attention')
    mlp = Mlp(cfg, hooks, self.width, name='mlp')

    def residual(name, rate, block, x):
      norm = LayerNorm(cfg.eps, name=f'{name}_norm')
      y = dropout(self, block(x, mask), rate)
      y = hooks.tap(self, f'{name}_out', y, x=x, norm=norm, mask=mask)
      return norm(x + y.astype(x.dtype))

    x = residual('attention', cfg.attention_out_dropout, attention, x)
    x = residual('mlp', cfg.dropout, mlp, x)
    return hooks.tap(self, 'output', x, mask=mask)


class Embeddings(nn.Module):
  """Words, positions and token types, summed and normalised. ids [B, T] -> ([B, T, D], mask)."""

  cfg: Any
  hooks: Hooks
  dtype: Any

  @nn.compact
  def __call__(self, ids, mask, token_types):
    cfg, hooks = self.cfg, self.hooks

    def table(rows, name):
      return Table(rows, cfg.embed_dim, cfg.initializer_range, name=name)

    words = table(cfg.vocab_size, 'word')
    value = words(ids), mask, token_types
    w = words.variables['params']['embedding']
    x, mask, token_types = hooks.tap(self, 'words', value, ids=ids, w=w)
    if x.shape[1] > cfg.max_length:
      raise InputError(
        'config.model.max_length',
        f'{ids.shape[1]} tokens and {x.shape[1] - ids.shape[1]} that a method puts before them',
        f'at most {cfg.max_length} together, the positions of this encoder',
        'lower it, or the length of the prompt',
      )
    if cfg.positions_from_pad:
      # RoBERTa counts real tokens only, from pad_id + 1; padding sits at pad_id.
      positions = cfg.pad_id + jnp.cumsum(mask, -1, dtype=jnp.int32) * mask
    else:
      positions = jnp.arange(x.shape[1])[None]
    x = x + table(cfg.max_positions, 'position')(positions)
    if cfg.token_types:
      # A table of one row was trained on it alone, whatever its tokenizer says of the second text.
      types = token_types if cfg.token_types > 1 else jnp.zeros_like(token_types)
      x = x + table(cfg.token_types, 'token_type')(types)
    x = dropout(self, LayerNorm(cfg.eps, self.dtype, name='norm')(x), cfg.dropout)
    if cfg.embed_dim != cfg.hidden:
      x = Linear(cfg.hidden, hooks, cfg.initializer_range, name='project')(x)
    return x, mask
