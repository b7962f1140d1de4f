"""What the optimiser's transforms want to know before the first step."""

import logging
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from efft import mesh, tree
from efft.errors import Diverged, InputError
from efft.peft import transform
from efft.training import optim, step

log = logging.getLogger(__name__)


def prepare(
  config: Mapping,
  groups: Mapping[str, str],
  trainable: Mapping,
  frozen: Mapping,
  *,
  logits: Callable,
  loss: Callable,
  make_step: Callable,
  batches,
  put: Callable,
  examples: int,
  steps: int,
  seed: int,
) -> dict[str, dict[str, np.ndarray]]:
  """{group: what its transform finds out}; a function of its arguments and nothing else.

  Args:
    config: the resolved config's 'optim'.
    groups: {path: group} of every trainable leaf.
    trainable, frozen: the variables at the start.
    logits: (variables, batch) -> [B, C], without dropout.
    loss: (logits, labels) -> [B].
    make_step: (optimizer) -> step function, for transforms that train first.
    batches: `.batch(i)` is the training batch of step i, on the host.
    put: host batch -> what step functions take.
    examples: rows of the training split.
    steps: length of the run.
    seed: of the run.
  """
  found = {}
  for name, change in sorted(transform.build(config).items()):
    if change.prepare is None or name not in groups.values():
      continue
    log.info('preparing the transform of group %s', name)
    mine, rest = tree.split(trainable, lambda path, name=name: groups[path] == name)
    mean = _means(mine, rest, frozen, logits, loss, batches, put, examples)

    def train(count, name=name):
      ends = _train(config, groups, trainable, frozen, make_step, batches, put, count, seed)
      return {path: x for path, x in ends.items() if groups[path] == name}

    problem = transform.Problem(
      leaves=tree.flatten(mine),
      steps=steps,
      seed=seed,
      gradients=lambda count, mean=mean: mean(count, False),
      squares=lambda count, mean=mean: mean(count, True),
      train=train,
    )
    try:
      given = change.prepare(problem)
    except ValueError as error:
      where = f'config.optim.groups.{name}.transform'
      raise InputError(where, str(error), 'options that fit the group', 'correct it') from None
    found[name] = {key: np.asarray(value) for key, value in given.items()}
    if change.outside:
      chosen = sum(int(mask.sum()) for mask in found[name].values())
      log.info('group %s: %d of %d numbers train', name, chosen, tree.count(mine))
  return found


def _means(mine, rest, frozen, logits, loss, batches, put, examples: int) -> Callable:
  """(examples, whether squared) -> {path: mean gradient or mean of each example's square}."""

  def objective(mine, rest, frozen, rows):
    scores = logits(tree.join(mine, rest, frozen), rows)
    return jnp.sum(loss(scores, rows['labels']) * rows['weights'])

  def total(mine, rest, frozen, rows):
    return jax.grad(objective)(mine, rest, frozen, rows)

  def squares(mine, rest, frozen, rows):
    # One example after the other: their gradients side by side would not fit.
    def add(sums, row):
      one = jax.tree.map(lambda x: x[None], row)
      grads = jax.grad(objective)(mine, rest, frozen, one)
      return jax.tree.map(lambda s, g: s + g * g, sums, grads), None

    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, mine), rows)[0]

  functions = {False: jax.jit(total), True: jax.jit(squares)}

  def mean(count: int, squared: bool):
    count = min(count, examples)
    left, index, sums = count, 0, None
    while left > 0:
      rows = batches.batch(index)
      real = min(left, len(rows['weights']))
      rows = {**rows, 'weights': np.float32(np.arange(len(rows['weights'])) < real)}
      part = functions[squared](mine, rest, frozen, put(rows))
      sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
      left, index = left - real, index + 1
    return {path: mesh.gather(x) / np.float32(count) for path, x in tree.flatten(sums).items()}

  return mean


def _train(config, groups, trainable, frozen, make_step, batches, put, count, seed) -> dict:
  plain = {
    group: {key: value for key, value in fields.items() if key != 'transform'}
    for group, fields in config['groups'].items()
  }
  optimizer = optim.optimizer({**config, 'groups': plain}, groups, count)
  state = step.init_state(trainable, optimizer, seed=seed, ema=config['ema'])
  take = make_step(optimizer)
  for index in range(count):
    state, _ = take(state, frozen, put(batches.batch(index)))
  ends = {path: mesh.gather(x) for path, x in tree.flatten(state.trainable).items()}
  if not all(np.isfinite(x).all() for x in ends.values()):
    raise Diverged(f'the {count} steps before the run ended in numbers that are not finite')
  return ends
