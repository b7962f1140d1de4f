"""Optimisers over the trainable tree alone, one group of parameters at a time."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from efft import tree


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


def optimizer(config: Mapping, groups: Mapping[str, str], steps: int):
  """The optax transformation of a run.

  The gradient is clipped by its norm over everything that trains; then each group goes its own
  way through `optax.partition`. Decay is decoupled and acts on matrices only: biases, norms and
  scales (one axis) are left alone.

  Args:
    config: the resolved config's 'optim'; its 'groups' overrides lr, weight_decay and schedule.
    groups: {path: group} of every trainable leaf.
    steps: length of the run.
  """

  def group(name):
    own = {**config, **config['groups'].get(name, {})}
    return optax.chain(
      direction(own['name'], own['b1'], own['b2'], own['eps']),
      optax.add_decayed_weights(
        own['weight_decay'], mask=lambda t: jax.tree.map(lambda x: jnp.ndim(x) > 1, t)
      ),
      optax.scale_by_learning_rate(schedule(own['schedule'], own['lr'], own['warmup'], steps)),
    )

  parts = {name: group(name) for name in sorted(set(groups.values()))}
  clip = optax.clip_by_global_norm(config['clip']) if config['clip'] else optax.identity()
  return optax.chain(clip, optax.partition(parts, tree.unflatten(groups)))
