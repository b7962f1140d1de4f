"""Differences to the pretrained kernels that trained gates and masks keep sparse."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efft import tree
from efft.errors import InputError
from efft.peft.base import Delta, at_path, product
from efft.peft.movement import largest
from efft.peft.transform import Transform, leaves
from efft.peft.updates import LINEARS

FAMILY = 'masks'  # in `efft methods`
GATES = ('alpha', 'alpha_kernel')  # of each number, of the kernel
SURE = 30.0  # |alpha| of a gate that no draw opens or closes


def diff(
  penalty: float = 1.25e-7,
  start: float = 5.0,
  low: float = -1.5,
  high: float = 1.5,
  structured: bool = True,
  density: float = 1.0,
  at: str = LINEARS,
) -> Delta:
  """Diff pruning (Guo et al. 2021, https://arxiv.org/abs/2012.07463): y + x (z * w).

  w [d_in, d_out] starts at zero, so the model starts unchanged. z is a hard-concrete gate:

      s = sigmoid(alpha + log u - log(1 - u)), u uniform, drawn anew at every step
      z = clip(s (high - low) + low, 0, 1)

  times one gate of the same form for the whole kernel where `structured`. When evaluating, and in
  what merges, u is 1/2. The loss grows by penalty x the expected number of open gates, the sum of
  sigmoid(alpha - log(-low / high)) (x the kernel's). Every alpha starts at `start`.

  Trains 2 d_in d_out numbers a kernel, and one more where structured; what is worth storing is
  the non-zero part of z * w. Merges as W + z * w.

  Deviations: kernels of the layers only (the paper's difference has biases, norms and embeddings
  too: give them a rule if they should train); the cut to the largest differences is made of each
  kernel instead of the whole model, and already before `fixed` makes it for good, whenever there
  are no draws.

  Args:
    penalty: lambda of the paper.
    start: of alpha.
    low, high: the interval to which s is stretched, below 0 and above 1.
    structured: a gate for each kernel besides those of its numbers.
    density: share of each kernel's numbers that keep their difference when evaluating; 1: all.
    at: which kernels.
  """
  if not low < 0 or not high > 1:
    raise ValueError(f'the interval from low {low} to high {high} does not hold 0 and 1 inside')
  if not 0 < density <= 1:
    raise ValueError(f'density {density} is not in (0, 1]')
  if penalty < 0:
    raise ValueError(f'penalty {penalty} is below 0')
  shift = math.log(-low / high)
  gates = GATES if structured else GATES[:1]

  def init(key, site):
    if site.w is None:
      raise ValueError(f'at={at!r}, a site without a kernel')
    w = jnp.zeros(site.w.shape, jnp.float32)
    p = {'w': w, 'alpha': jnp.full_like(w, start)}
    return {**p, 'alpha_kernel': jnp.full((1,), start, jnp.float32)} if structured else p

  def gate(alpha, key):
    draw = 0.0 if key is None else jax.random.logistic(key, alpha.shape)
    return stretched(alpha, draw, low, high)

  def expand(p, path, key):
    value = p['w']
    for number, name in enumerate(name for name in gates if name in p):
      own = None if key is None else jax.random.fold_in(at_path(key, path), number)
      value = value * gate(p[name], own)
    if key is None and density < 1:
      value = jnp.where(_kept(value, density), value, 0)
    return {'w': value}

  def cost(p, path):
    open_gates = [jax.nn.sigmoid(p[name] - shift) for name in gates]
    return penalty * jnp.sum(open_gates[0] if len(gates) == 1 else open_gates[0] * open_gates[1])

  def apply(p, site):
    return site.y + product(site.x, p['w'])

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] + p['w']}

  def pack(p):
    return expand(p, '', None)

  return Delta(init, apply, at, merge, expand=expand, penalty=cost, pack=pack)


class Fixed(NamedTuple):
  """State of an optimiser that cuts once: the steps taken, and of the optimiser inside."""

  count: Any
  inner: Any


def fixed(
  density: float = 0.005,
  share: float = 0.5,
  boost: float = 10.0,
  low: float = -1.5,
  high: float = 1.5,
) -> Transform:
  """Diff pruning's second training, with a fixed mask (Guo et al. 2021, sections 3.2 and 4).

  Wraps the optimiser of a group that holds `diff`'s leaves; others go through. After `share` of the
  run a step takes the place of the optimiser's: of each kernel the share `density` with the largest
  |z w| (gates without draws) keeps w := z w, with a gate that stays open; all else becomes w := 0,
  with a gate that stays closed. From then on gates stand still, and only what was kept trains.

  Deviations: one schedule for both trainings, and steps after the cut are `boost` times as large (1
  in the paper, whose runs are long): a few numbers need the rates of sparse methods, all of them
  together those of full fine-tuning. The cut is made of each kernel, as in `diff`, whose density,
  low and high have to be the same.

  Args:
    density: share of each kernel's numbers that are kept.
    share: of the run before the cut.
    boost: factor of the rate of w after it.
    low, high: of the gates.
  """
  if not 0 < density <= 1:
    raise ValueError(f'density {density} is not in (0, 1]')
  if not 0 < share < 1:
    raise ValueError(f'share {share} is not between 0 and 1')
  if boost <= 0:
    raise ValueError(f'boost {boost} is not above 0')

  def wrap(inner, steps, given):
    last = max(1, round(share * steps))

    def init(params):
      if not _sites(leaves(params)):
        where, found = 'config.optim.groups', 'no leaves w, alpha of one site'
        raise InputError(where, found, 'those of diff.diff', 'use it with diff.diff')
      return Fixed(jnp.zeros((), jnp.int32), inner.init(params))

    def update(grads, state, params):
      updates, after = inner.update(grads, state.inner, params)
      count, values, flat = state.count + 1, leaves(params), tree.flatten(updates)
      for site in _sites(values):
        names = [name for name in ('w', *GATES) if f'{site}/{name}' in values]
        own = {name: values[f'{site}/{name}'] for name in names}
        given = {name: flat[f'{site}/{name}'] for name in names}
        found = jax.lax.cond(count == last, cut, partial(go_on, count > last), own, given)
        flat |= {f'{site}/{name}': found[name] for name in names}
      return tree.unflatten(flat), Fixed(count, after)

    def cut(own, given):
      del given  # this step is the cut's
      w = own['w']
      for name in GATES:  # in the order of `diff`, whose product it is to the bit
        w = w * stretched(own[name], 0.0, low, high) if name in own else w
      kept = _kept(w, density)
      to = {'w': jnp.where(kept, w, 0), 'alpha': jnp.where(kept, SURE, -SURE)}
      to['alpha_kernel'] = SURE
      return {name: to[name] - x for name, x in own.items()}

    def go_on(over, own, given):
      factors = {'w': jnp.where(over, jnp.where(own['alpha'] > 0, boost, 0.0), 1.0)}
      return {name: factors.get(name, jnp.where(over, 0.0, 1.0)) * u for name, u in given.items()}

    return optax.GradientTransformation(init, update)

  return Transform(wrap=wrap, share=density, scheduled=True)


def stretched(alpha, draw, low: float, high: float):
  """The hard-concrete gate of `alpha`, with the logistic noise `draw` or without (0)."""
  return jnp.clip(jax.nn.sigmoid(alpha + draw) * (high - low) + low, 0.0, 1.0)


def _kept(value, density: float):
  """bool: the share `density` with the largest size; of equals those that come first."""
  return largest(jnp.abs(value).astype(jnp.float32), max(1, round(density * value.size)))


def _sites(flat) -> list[str]:
  """Where the group has w and alpha."""
  found = {path.rpartition('/')[0] for path in flat if path.endswith('/alpha')}
  return sorted(site for site in found if f'{site}/w' in flat)


def threshold_mask(
  tau: float = 0.01,
  init_sparsity: float = 0.0,
  width: float = 0.6,
  at: str = LINEARS,
) -> Delta:
  """Masking (Zhao et al. 2020, https://arxiv.org/abs/2004.12406): y + x ((m - 1) * W).

  That is x (m * W): the pretrained kernel W [d_in, d_out] with some of its numbers left out, none
  of them changed. m = 1 where the scores S are above tau, 0 elsewhere, and the gradient of m goes
  straight through to S. The scores start uniform in an interval of length `width` whose share
  `init_sparsity` lies below tau; by default the model starts unchanged.

  Trains d_in d_out scores a kernel, of which a bundle stores a bit each. Merges as m * W.

  Deviations: the authors' code has the interval begin at -0.02 and takes 0.03 / init_sparsity for
  its length, which is 0.6 at a sparsity of 5 % and cannot be 0. It leaves the two lowest layers of
  BERT-base whole, at=r'layer_([2-9]|1\\d)/...', and masks the pooler ('pooler/matmul') and the
  classifier where asked to. By default the kernels of all layers are masked, so that any depth
  will do, and the head trains.

  Args:
    tau: the threshold, at least 0 and below 1.
    init_sparsity: share of each kernel that is left out at first.
    width: of the scores at first: how far learning rates have to carry them.
    at: which kernels.
  """
  if not 0 <= tau < 1:
    raise ValueError(f'tau {tau} is not in [0, 1)')
  if not 0 <= init_sparsity < 1:
    raise ValueError(f'init_sparsity {init_sparsity} is not in [0, 1)')
  if width <= 0:
    raise ValueError(f'width {width} is not above 0')

  def init(key, site):
    if site.w is None:
      raise ValueError(f'at={at!r}, a site without a kernel')
    # In (0, 1]: a score of exactly tau would be closed.
    place = 1 - jax.random.uniform(key, site.w.shape, jnp.float32)
    return {'scores': tau + width * (place - init_sparsity)}

  def expand(p, path, key):
    scores = p['scores']
    # The difference is 0 and brings the gradient: the mask stays exactly 0 and 1.
    return {'mask': (scores > tau).astype(scores.dtype) + (scores - jax.lax.stop_gradient(scores))}

  def apply(p, site):
    return site.y + product(site.x, (p['mask'] - 1) * site.w)

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] * p['mask']}

  def pack(p):
    # Read as scores of 0 and 1, which are on the same sides of tau.
    return {'scores': p['scores'] > tau}

  return Delta(init, apply, at, merge, expand=expand, pack=pack)
