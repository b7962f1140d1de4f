"""Quantisation-aware training: what int8 rounds is rounded while the model trains in floats.

The product of rounded inputs and a rounded kernel is computed from their integers, in floating
point, and then multiplied by both steps. Integers of 8 bits are exact in bfloat16, and so are their
sums in float32 below 2^24: in float32 the merged model, of real integers, has the same ones.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efft import qtensor
from efft.errors import InputError
from efft.peft import lora
from efft.peft.base import Delta
from efft.peft.transform import Transform, leaves, map_group
from efft.peft.updates import kernel_shape

FAMILY = 'quantisation'  # in `efft methods`
COVERED = r'(layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))|pooler)/matmul'
_WORDS = 'embed/words'
_MARK = 2.0**-30  # a power of two, and nothing that a norm of float32 gradients would notice
_LEAST = 1e-3  # of what a learnt step began with


class Steps(NamedTuple):
  """What a step of the integers is worth, for kernels [K, N] and what they multiply.

  Attributes:
    start_weights: (w, top) -> parameters at first; `top` is the largest integer.
    weights: (parameters, w, top) -> float32 [1, N] or [1, 1].
    start_inputs: (x, mask, top) -> parameters at first.
    inputs: (parameters, K, top) -> float32 [].
    watch: (parameters, x, mask) -> x, for its gradient's sake.
    clips: whether what is cut off passes no gradient.
  """

  start_weights: Callable
  weights: Callable
  start_inputs: Callable
  inputs: Callable
  watch: Callable
  clips: bool


def q8bert(
  embeddings: bool = True, rank: int = 0, alpha: float = 16.0, examples: int = 32,
  at: str = COVERED,
) -> tuple[Delta, ...]:  # fmt: skip
  """Q8BERT (Zafrir et al. 2019, https://arxiv.org/abs/1910.06188): int8 with ranges that are seen.

      s_x = range / 127     s_w = max|w| / 127     q(v) = clip(round(v / s), -127, 127)
      y = s_x s_w q(x) q(w)

  in place of x w, one step for a kernel and one for its inputs; the gradients of x and w are those
  of the product of what is rounded, passed straight through rounding and clipping. max|w| is the
  kernel's own at any time. `range` starts as the largest |x| of `examples` training texts and then
  follows the largest of each step; what moves it is `average`, in a group of its own:

      config.rules = (..., ('delta/.*/(range|seen)', 'range'), ...)
      config.optim.groups = {'range': {'transform': {'fn': 'fakequant.average'}}}

  Has two numbers a kernel, and merges into int8 matrices: kernels with 'static' inputs
  (`efft.formats`), whose integers are those trained with, and the table of words. The same numbers
  give the same integers; where norms or sums of the two programs differ in their last bit, one
  between two integers may fall on either side, which `efft merge` sees in the logits: --tolerance.

  It acts before other deltas at its sites, in place of the kernel, and no other delta can be merged
  into what is an integer then; a LoRA of its own name stays beside it. A LoRA that shall be merged
  is one of `rank` inside, which makes W + (alpha / rank) A B what is rounded; W may stay frozen.

  Deviations: the authors' code also rounds what query, key and value give (attention is computed in
  floats here), biases, the tables of positions and types, and takes padding into its ranges; its
  range has seen the batch that it is used on, here those before.

  Args:
    embeddings: whether the table of words is rounded, with one step.
    rank, alpha: of a LoRA inside; 0: none.
    examples: how many texts the first ranges are of.
    at: which kernels.
  """
  _check_examples(examples)

  def weights(p, w, top):
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(w)))
    return jnp.where(largest > 0, largest, 1.0).reshape(1, 1) * (1 / top)

  def start_inputs(x, mask, top):
    return {'range': _largest(x, mask), 'seen': jnp.zeros((), jnp.float32)}

  def inputs(p, width, top):
    return jnp.where(p['range'] > 0, jax.lax.stop_gradient(p['range']), 1.0) * (1 / top)

  def watch(p, x, mask):
    return _watched(x, p['range'], p['seen'], jax.lax.stop_gradient(_largest(x, mask)))

  steps = Steps(lambda w, top: {}, weights, start_inputs, inputs, watch, False)
  kernels = _kernels(steps, 8, 8, at, rank, alpha, examples)
  return (kernels, _words(steps, 8)) if embeddings else (kernels,)


def lsq(
  bits: int = 8, input_bits: int = 8, per_channel: bool = True, embeddings: int = 0,
  rank: int = 0, alpha: float = 16.0, examples: int = 32, at: str = COVERED,
) -> tuple[Delta, ...]:  # fmt: skip
  """LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153): sizes of steps that train.

  With Q = 2^(bits - 1) - 1 and v^ = s clip(round(v / s), -Q, Q), for inputs and kernels,

      dv^/ds = round(v / s) - v / s    where |v / s| < Q, else -Q or Q         (equation 3)
      dv^/dv = 1                       where |v / s| < Q, else 0               (equation 5)

  in place of x w. A kernel has a step for each output, its inputs have one; s starts at
  2 mean|v| / sqrt(Q), of the kernel and of `examples` training texts (padding left out), and its
  gradient is multiplied by 1 / sqrt(n Q), where n numbers share it: K of a kernel [K, N] by
  outputs, and K features of a token.

  What trains is s relative to its start, s = unit x step: the paper has SGD, for which the factor
  balances steps and weights; Adam's updates are as large as the learning rate whatever the factor,
  and a rate means the same for all steps this way. Trains N + 1 numbers a kernel ('w_step' and
  'x_step'); 'w_unit' and 'x_unit' have to be frozen. Merging, and other deltas: as `q8bert`.
  Kernels of fewer bits merge into int8 matrices too, a byte for each number; inputs of other than 8
  bits do not merge.

  Deviations: the smallest integer is -Q, not -Q - 1, and inputs are signed everywhere, which is how
  the merged matrices multiply; a step keeps at least a thousandth of its start.

  Args:
    bits, input_bits: of kernels and inputs, from 2 to 8.
    per_channel: whether each output has a step; False: one for a kernel.
    embeddings: bits of the table of words, with one step; 0: floats. Merged, a number takes four
      bits, or eight where it has more than four.
    rank, alpha: of a LoRA inside of what is rounded; 0: none.
    examples: how many texts the steps of inputs start from.
    at: which kernels.
  """
  _check_examples(examples)
  for name, value in (('bits', bits), ('input_bits', input_bits), ('embeddings', embeddings or 8)):
    if not 2 <= value <= 8:
      raise ValueError(f'{name} {value} is not from 2 to 8')

  def learnt(per_channel):
    def start_weights(w, top):
      mean = jnp.mean(jnp.abs(w), 0 if per_channel else None)
      return {'w_unit': _first(mean, top), 'w_step': jnp.ones(mean.shape, jnp.float32)}

    def weights(p, w, top):
      count = w.size // p['w_step'].size
      return _step(p, 'w', count, top).reshape(1, -1)

    def start_inputs(x, mask, top):
      some = jnp.ones(x.shape[:-1]) if mask is None else mask
      total = jnp.sum(jnp.abs(x.astype(jnp.float32)) * some[..., None])
      mean = total / (jnp.maximum(jnp.sum(some), 1) * x.shape[-1])
      return {'x_unit': _first(mean, top), 'x_step': jnp.ones((), jnp.float32)}

    def inputs(p, width, top):
      return _step(p, 'x', width, top)

    return Steps(start_weights, weights, start_inputs, inputs, lambda p, x, mask: x, True)

  kernels = _kernels(learnt(per_channel), bits, input_bits, at, rank, alpha, examples)
  return (kernels, _words(learnt(False), embeddings)) if embeddings else (kernels,)


def average(decay: float = 0.9999) -> Transform:
  """Moves the ranges of `q8bert` towards what each step has seen.

      range <- range - (1 - decay) (range - mean of max|x| over the step's forward passes)

  One pass a step is the paper's rule; micro-batches (config.train.accumulate) and the two passes of
  config.train.consistency are passes each, so a maximum over micro-batches is the mean of theirs.
  Takes the place of the group's optimiser; learning rate and decay have no effect. The gradients of
  a site's two leaves hold what was seen and how often, 2^-30 times: their ratio counts, which
  clipping leaves alone, and in the norm that clipping goes by they are lost. `seen` counts steps.

  Args:
    decay: in [0, 1).
  """
  if not 0 <= decay < 1:
    raise ValueError(f'decay {decay} is not in [0, 1)')

  def init(params):
    paths = set(leaves(params))
    sites = {path.rpartition('/')[0] for path in paths}
    if paths != {f'{site}/{name}' for site in sites for name in ('range', 'seen')}:
      raise InputError(
        'config.optim.groups', f'{", ".join(sorted(paths)[:4])} to average',
        "'range' and 'seen' of each site, and nothing else",
        "use it for 'delta/.*/(range|seen)' of fakequant.q8bert",
      )  # fmt: skip
    return optax.EmptyState()

  def update(grads, state, params):
    flat = leaves(grads)

    def move(path, g):
      passes = -flat[f'{path.rpartition("/")[0]}/seen']
      some = passes > 0
      if path.endswith('/seen'):
        return some.astype(g.dtype)
      return -(1 - decay) * jnp.where(some, g / jnp.where(some, passes, 1), 0)

    return map_group(move, grads), state

  def wrap(inner, steps, given):
    return optax.GradientTransformation(init, update)

  return Transform(wrap=wrap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def integers(v, step, zero, ends: tuple[int, int], clips: bool):
  """clip(round(v / step) + zero, *ends) - zero, float32: rounded as the int8 product rounds.

  The gradient is that of integers x step with respect to v and step (LSQ's equations 3 and 5),
  divided by step: multiply what it returns, or what a product makes of it, by a step that is held
  fixed, and the gradients of v and step are those of the rounded numbers.

  Args:
    v: [..., D].
    step: float32, broadcast against v.
    zero: the integer of 0.
    ends: the smallest and the largest integer.
    clips: whether what is beyond the ends passes no gradient; with False step has none either.
  """
  return jnp.clip(jnp.round(v.astype(jnp.float32) * (1 / step)) + zero, *ends) - zero


def _forward(v, step, zero, ends, clips):
  return integers(v, step, zero, ends, clips), (v, step, zero)


def _backward(ends, clips, kept, g):
  v, step, zero = kept
  g = g / step
  if not clips:
    return g.astype(v.dtype), jnp.zeros_like(step), None
  units = v.astype(jnp.float32) * (1 / step)
  inside = (units + zero > ends[0]) & (units + zero < ends[1])
  slope = g * (integers(v, step, zero, ends, clips) - jnp.where(inside, units, 0))
  slope = slope.sum(range(slope.ndim - step.ndim))
  shared = tuple(i for i, n in enumerate(step.shape) if n < slope.shape[i])
  return jnp.where(inside, g, 0).astype(v.dtype), slope.sum(shared, keepdims=True), None


integers.defvjp(_forward, _backward)


@jax.custom_vjp
def _watched(x, range_, seen, largest):
  """x; the gradients of `range_` and `seen` are what `average` reads, whatever the loss."""
  return x


_watched.defvjp(
  lambda x, range_, seen, largest: (x, range_ - largest),
  lambda away, g: (g, _MARK * away, jnp.full_like(away, -_MARK), None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _damped(x, factor: float):
  """x, with `factor` times its gradient."""
  return x


_damped.defvjp(lambda x, factor: (x, None), lambda factor, _, g: (factor * g,))


def _kernels(
  steps: Steps, bits: int, input_bits: int, at: str, rank: int, alpha: float, examples: int
) -> Delta:
  if rank < 0:
    raise ValueError(f'rank {rank} is below 0')
  inside = lora.lora(rank, alpha, at=at) if rank else None
  top, x_top = (2 ** (n - 1) - 1 for n in (bits, input_bits))

  def init(key, site):
    kernel_shape(site)
    return {
      **(inside.init(key, site) if inside else {}),
      **steps.start_weights(site.w.astype(jnp.float32), top),
      **steps.start_inputs(site.x, site.mask, x_top),
    }

  def kernel(p, w):
    w = jnp.asarray(w, jnp.float32)
    return inside.merge(p, {'kernel': w})['kernel'] if inside else w

  def rounded(p, w):
    step = steps.weights(p, w, top)
    return integers(w, step, 0, (-top, top), steps.clips), jax.lax.stop_gradient(step)

  def apply(p, site):
    w, step = rounded(p, kernel(p, site.w))
    x_step = steps.inputs(p, w.shape[0], x_top)
    x = steps.watch(p, site.x, site.mask)
    x = integers(x, x_step, 0, (-x_top, x_top), steps.clips).astype(x.dtype)
    # Times one step and then the other, as the int8 product does it.
    return site.contract(x, w) * jax.lax.stop_gradient(x_step) * step

  def merge(p, module):
    w, step = map(np.asarray, rounded(p, kernel(p, module['kernel'])))
    x_step = np.asarray(steps.inputs(p, w.shape[0], x_top), np.float32).reshape(1)
    fields = {'inputs': 'static', 'x_scale': x_step}
    return {**module, 'kernel': qtensor.from_codes(w.astype(np.int8), 'int8', step, **fields)}

  return Delta(init, apply, at, merge if input_bits == 8 else None, examples=examples, first=True)


def _words(steps: Steps, bits: int) -> Delta:
  top = 2 ** (bits - 1) - 1

  def init(key, site):
    # Something has to be there, for the delta to act.
    return {'top': jnp.asarray(top, jnp.int32), **steps.start_weights(site.w, top)}

  def rounded(p, x, w):
    step = steps.weights(p, w, top)
    return integers(x, step[0], 0, (-top, top), steps.clips), jax.lax.stop_gradient(step)

  def apply(p, site):
    x, *rest = site.y
    x, step = rounded(p, x, site.w)
    return (x * step[0], *rest)

  def merge(p, module):
    w = jnp.asarray(module['word']['embedding'], jnp.float32)
    value, step = map(np.asarray, rounded(p, w, w))
    codes = 'int4' if bits <= 4 else 'int8'
    table = qtensor.from_codes(value.astype(np.int8), codes, step, inputs='float')
    return {**module, 'word': {**module['word'], 'embedding': table}}

  return Delta(init, apply, _WORDS, merge, first=True)


def _step(p, name: str, count: int, top: int):
  """A learnt step, its gradient balanced over the `count` numbers that share it."""
  size = jnp.maximum(jnp.abs(p[f'{name}_step']), _LEAST)
  return _damped(p[f'{name}_unit'] * size, 1 / math.sqrt(count * top))


def _first(mean, top: int):
  """LSQ's first step; of zeros it may be anything."""
  return jnp.where(mean > 0, mean, 1.0) * (2 / math.sqrt(top))


def _largest(x, mask):
  """max|x| over real tokens, float32."""
  x = jnp.abs(x.astype(jnp.float32))
  return jnp.max(x if mask is None else jnp.where(mask[..., None], x, 0))


def _check_examples(examples: int) -> None:
  if examples < 1:
    raise ValueError(f'examples {examples} is below 1')
