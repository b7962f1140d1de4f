"""How many of a method's parts stay while it trains."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efft import tree
from efft.errors import InputError
from efft.peft.transform import Transform, leaves

FAMILY = 'low rank'  # in `efft methods`


class Budget(NamedTuple):
  """State of an optimiser that keeps the most important triplets.

  Attributes:
    count: steps taken.
    mean: smoothed sensitivities |w g| of the triplets' leaves.
    spread: smoothed distances of sensitivities from `mean`.
    inner: of the optimiser inside.
  """

  count: Any
  mean: Any
  spread: Any
  inner: Any


def adalora(
  target_rank: int = 8,
  tinit: float = 0.1,
  tfinal: float = 0.5,
  delta_t: int = 10,
  beta1: float = 0.85,
  beta2: float = 0.85,
) -> Transform:
  """AdaLoRA's allocation (Zhang et al. 2023, https://arxiv.org/abs/2303.10512).

  Wraps the optimiser of a group that holds triplets: leaves a [d_in, r], e [r] and b [r, d_out]
  of a site, as `lora.adalora` makes them; other leaves go through. With I = |w g|, at the weights
  at which the gradient g was taken (clipped):

      mean = beta1 mean + (1 - beta1) I
      spread = beta2 spread + (1 - beta2) |I - mean|
      score of triplet i = s(e_i) + mean of s(a[:, i]) + mean of s(b[i]), s = mean x spread

  Every `delta_t` steps the e of all but the best b_t triplets over all sites become 0 after the
  step; they go on training and may come back. b_t is what there is until `tinit`, falls with the
  cube to target_rank a site, and stays there from `tfinal` before the end, where scores stand
  still and the mask holds at every step.

  Deviations from HF PEFT: tinit and tfinal are shares of the run, not steps (the paper's GLUE runs
  come to about 0.1 and 0.5, and delta_t to 1 to 100); |w g| takes w before the step, as in the
  paper, PEFT after it; of equal scores as many stay as the budget allows.

  Args:
    target_rank: average rank of a site at the end; the start is what the delta has.
    tinit: share of the run before the budget falls.
    tfinal: share of the run after it has fallen.
    delta_t: steps between allocations.
    beta1: smoothing of sensitivities.
    beta2: smoothing of their uncertainty.
  """
  if target_rank < 1 or delta_t < 1:
    raise ValueError(f'target_rank {target_rank} or delta_t {delta_t} is below 1')
  if tinit < 0 or tfinal < 0 or tinit + tfinal >= 1:
    raise ValueError(f'tinit {tinit} and tfinal {tfinal} leave no time between them')
  if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
    raise ValueError(f'beta1 {beta1} or beta2 {beta2} is not in [0, 1)')

  def wrap(inner, steps, given):
    first, last = round(tinit * steps), steps - round(tfinal * steps)

    def init(params):
      flat = leaves(params)
      sites = _sites(flat)
      size = sum(flat[f'{site}/e'].shape[0] for site in sites)
      if not sites or target_rank * len(sites) > size:
        raise InputError(
          'config.optim.groups', f'{len(sites)} triplets a, e, b with {size} ranks',
          f'more than target_rank {target_rank} a site', 'use it with lora.adalora',
        )  # fmt: skip
      zeros = {
        path: jnp.zeros_like(x) for path, x in flat.items() if path.rpartition('/')[0] in sites
      }
      mean = tree.unflatten(zeros)
      start = jnp.zeros((), jnp.int32), mean, jax.tree.map(jnp.copy, mean)
      return Budget(*start, inner.init(params))

    def update(grads, state, params):
      count = state.count + 1
      weights, slopes = leaves(params), leaves(grads)
      learning = count < last

      def smooth(old, new, beta):
        return jnp.where(learning, beta * old + (1 - beta) * new, old)

      mean, spread = {}, {}
      before = tree.flatten(state.spread)
      for path, old in tree.flatten(state.mean).items():
        found = jnp.abs(weights[path] * slopes[path])
        mean[path] = smooth(old, found, beta1)
        spread[path] = smooth(before[path], jnp.abs(found - mean[path]), beta2)

      sites = _sites(weights)
      scores = jnp.concatenate([_scores(mean, spread, site) for site in sites])
      left = jnp.clip(1 - (count - first) / max(1, last - first), 0.0, 1.0)
      target = target_rank * len(sites)
      budget = jnp.floor((scores.size - target) * left**3 + target)
      place = jnp.argsort(jnp.argsort(-scores, stable=True))
      due = (count > first) & ((count >= last) | (count % delta_t == 0))
      stays = ~due | (place < budget)

      updates, after = inner.update(grads, state.inner, params)
      flat, start = tree.flatten(updates), 0
      for site in sites:
        path = f'{site}/e'
        end = start + weights[path].shape[0]
        flat[path] = jnp.where(stays[start:end], flat[path], -weights[path])
        start = end
      new = Budget(count, tree.unflatten(mean), tree.unflatten(spread), after)
      return tree.unflatten(flat), new

    return optax.GradientTransformation(init, update)

  return Transform(wrap=wrap, scheduled=True)


def _sites(flat) -> list[str]:
  """Where the group has all of a, e and b."""
  found = {path.rpartition('/')[0] for path in flat if path.endswith('/e')}
  return sorted(s for s in found if f'{s}/a' in flat and f'{s}/b' in flat)


def _scores(mean, spread, site):
  s = {name: mean[f'{site}/{name}'] * spread[f'{site}/{name}'] for name in 'aeb'}
  return s['e'] + s['a'].mean(0) + s['b'].mean(1)
