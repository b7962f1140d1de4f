"""Optimisers over the trainable tree alone, one group of parameters at a time."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efft import tree
from efft.peft import transform


def schedule(kind: str, lr: float, warmup: float, steps: int) -> optax.Schedule:
  """Learning rate by step: linear warm-up from 0 to `lr`, then the decay, as in transformers.

  Args:
    kind: 'linear' (to 0), 'cosine' (half a period, to 0) or 'constant'.
    lr: the peak.
    warmup: share of `steps`, rounded down.
    steps: length of the run.
  """
  warm = int(warmup * steps)
  decays = {
    'linear': lambda done: 1 - done,
    'cosine': lambda done: 0.5 * (1 + jnp.cos(jnp.pi * done)),
    'constant': jnp.ones_like,
  }

  def value(count):
    count = jnp.asarray(count, jnp.float32)
    done = jnp.clip((count - warm) / max(1, steps - warm), 0.0, 1.0)
    return lr * jnp.where(count < warm, count / max(1, warm), decays[kind](done))

  return value


def direction(
  name: str, b1: float = 0.9, b2: float | None = None, eps: float = 1e-8
) -> optax.GradientTransformation:
  """The update before weight decay and learning rate.

  'adamw' and 'lion' as published; 'adafactor' with factored second moments, updates clipped to a
  root mean square of 1, no momentum, and the given learning rate (neither relative steps nor
  scaling by the parameter's size).
  """
  if name == 'adafactor':
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
  if name == 'lion':
    return optax.scale_by_lion(b1, 0.99 if b2 is None else b2)
  return optax.scale_by_adam(b1, 0.999 if b2 is None else b2, eps)


class Selected(NamedTuple):
  """State of an optimiser that moves some numbers of a leaf only."""

  masks: Any
  inner: Any


def select(
  inner: optax.GradientTransformation, masks: Mapping, zero: frozenset = frozenset()
) -> optax.GradientTransformation:
  """Moves the numbers that masks choose.

  Args:
    inner: over all that trains; it sees gradients that are 0 outside of the masks.
    masks: {path: bool array}; leaves without one move as a whole.
    zero: the paths whose numbers outside of the mask become 0; those of the others stay.
  """

  def init(params):
    return Selected(tree.unflatten({p: jnp.array(m) for p, m in masks.items()}), inner.init(params))

  def update(grads, state, params):
    chosen, start = tree.flatten(state.masks), tree.flatten(params)

    def gradient(path, g):
      return jnp.where(chosen[path], g, 0) if path in chosen else g

    def move(path, u):
      if path not in chosen:
        return u
      return jnp.where(chosen[path], u, -start[path] if path in zero else 0)

    updates, after = inner.update(tree.map_paths(gradient, grads), state.inner, params)
    return tree.map_paths(move, updates), Selected(state.masks, after)

  return optax.GradientTransformation(init, update)


def optimizer(
  config: Mapping, groups: Mapping[str, str], steps: int, given: Mapping[str, Mapping] | None = None
):
  """The optax transformation of a run.

  The gradient is clipped by its norm over everything that trains; then each group goes its own
  way through `optax.partition`. Decay is decoupled and acts on matrices only: biases, norms and
  scales (one axis) are left alone. A group's transform (`efft.peft.transform`) may take the place
  of its direction, of all of its update, or choose the numbers that move.

  Args:
    config: the resolved config's 'optim'; its 'groups' overrides lr, weight_decay and schedule.
    groups: {path: group} of every trainable leaf.
    steps: length of the run.
    given: {group: what its transform prepared}, from `efft.training.prepare`.
  """
  transforms, given = transform.build(config), given or {}

  def group(name):
    own = {**config, **config['groups'].get(name, {})}
    change, found = transforms.get(name, transform.Transform()), given.get(name, {})
    towards = direction(own['name'], own['b1'], own['b2'], own['eps'])
    if change.direction is not None:
      towards = change.direction(towards, steps, found)
    whole = optax.chain(
      towards,
      optax.add_decayed_weights(
        own['weight_decay'], mask=lambda t: jax.tree.map(lambda x: jnp.ndim(x) > 1, t)
      ),
      optax.scale_by_learning_rate(schedule(own['schedule'], own['lr'], own['warmup'], steps)),
    )
    return whole if change.wrap is None else change.wrap(whole, steps, found)

  parts = {name: group(name) for name in sorted(set(groups.values()))}
  clip = optax.clip_by_global_norm(config['clip']) if config['clip'] else optax.identity()
  whole = optax.chain(clip, optax.partition(parts, tree.unflatten(groups)))
  outside = {name: t.outside for name, t in transforms.items() if t.outside and name in parts}
  if not outside:
    return whole
  masks = {path: given[name][path] for path, name in groups.items() if name in outside}
  return select(whole, masks, frozenset(p for p in masks if outside[groups[p]] == 'zero'))
