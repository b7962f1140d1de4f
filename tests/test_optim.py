"""Optimisers against loops written by hand, and against the full tree with frozen leaves."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from efft import tree
from efft.training import losses, optim, step

CONFIG = {
  'name': 'adamw',
  'lr': 1e-2,
  'weight_decay': 0.1,
  'schedule': 'linear',
  'warmup': 0.25,
  'clip': 1.0,
  'b1': 0.9,
  'b2': 0.99,
  'eps': 1e-8,
  'groups': {},
}
STEPS = 8


def lr_at(kind, count, warm, steps):
  """transformers' get_{linear,cosine,constant}_schedule_with_warmup, written out."""
  if count < warm:
    return count / max(1, warm)
  if kind == 'linear':
    return max(0.0, (steps - count) / max(1, steps - warm))
  if kind == 'cosine':
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (count - warm) / max(1, steps - warm))))
  return 1.0


@pytest.mark.parametrize('kind', ['linear', 'cosine', 'constant'])
@pytest.mark.parametrize(
  ('warmup', 'steps'), [(0.0, 1), (0.0, 10), (0.06, 50), (0.25, 7), (0.9, 10)]
)
def test_schedules_are_those_of_transformers(kind, warmup, steps):
  found = [float(optim.schedule(kind, 3e-4, warmup, steps)(i)) for i in range(steps + 1)]
  expected = [3e-4 * lr_at(kind, i, int(warmup * steps), steps) for i in range(steps + 1)]
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-10)


def test_schedule_past_the_end_stays_where_it_ended():
  ends = {'linear': 0.0, 'cosine': 0.0, 'constant': 1.0}
  for kind, end in ends.items():
    np.testing.assert_allclose(optim.schedule(kind, 1.0, 0.1, 10)(25), end, atol=1e-6)


RNG = np.random.default_rng(0)
START = {
  'a': {'kernel': RNG.normal(size=(3, 4)), 'bias': RNG.normal(size=4)},
  'b': {'kernel': RNG.normal(size=(4, 2)), 'scale': RNG.normal(size=2)},
}
START = jax.tree.map(np.float32, START)
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype('f4'), START) for _ in range(STEPS)]
GROUPS = {'a/kernel': 'one', 'a/bias': 'one', 'b/kernel': 'two', 'b/scale': 'two'}


def run(config, groups=GROUPS, given=None):
  opt = optim.optimizer(config, groups, STEPS, given)
  params, state, update = START, opt.init(START), jax.jit(opt.update)
  for grads in GRADS:
    updates, state = update(grads, state, params)
    params = optax.apply_updates(params, updates)
  return tree.flatten(params)


def adam(m, v, t, c):
  return (m / (1 - c['b1'] ** t)) / (np.sqrt(v / (1 - c['b2'] ** t)) + c['eps'])


def by_hand(config, before=None, after=None):
  """AdamW or Lion: clipped together, then each group with its own rate, decay and schedule.

  Gradients are multiplied with `before`, {path: mask}, before they are clipped, `after` after.
  """
  before, after = before or {}, after or {}
  params = {path: x.astype(np.float64) for path, x in tree.flatten(START).items()}
  m, v = ({path: 0.0 for path in params} for _ in range(2))
  for t, grads in enumerate(GRADS):
    grads = {path: g * before.get(path, 1) for path, g in tree.flatten(grads).items()}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    for path, g in grads.items():
      c = config | config['groups'].get(GROUPS[path], {})
      g = g * min(1.0, c['clip'] / norm) if c['clip'] else g
      g = g * after.get(path, 1)
      if c['name'] == 'lion':
        towards = np.sign(c['b1'] * m[path] + (1 - c['b1']) * g)
        m[path] = c['b2'] * m[path] + (1 - c['b2']) * g
      else:
        m[path] = c['b1'] * m[path] + (1 - c['b1']) * g
        v[path] = c['b2'] * v[path] + (1 - c['b2']) * g**2
        towards = adam(m[path], v[path], t + 1, c)
      decay = c['weight_decay'] * params[path] if params[path].ndim > 1 else 0.0
      lr = c['lr'] * lr_at(c['schedule'], t, int(c['warmup'] * STEPS), STEPS)
      params[path] = params[path] - lr * (towards + decay)
  return params


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'clip': None, 'schedule': 'cosine', 'warmup': 0.0},
    {'name': 'lion', 'lr': 1e-3},
    {'groups': {'two': {'lr': 1e-3, 'weight_decay': 0.0, 'schedule': 'constant'}}},
  ],
  ids=['adamw', 'unclipped', 'lion', 'groups'],
)
def test_optimizer_is_the_loop_by_hand(changes):
  found, expected = run(CONFIG | changes), by_hand(CONFIG | changes)
  for path in expected:
    np.testing.assert_allclose(found[path], expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


MASKS = {path: RNG.random(tree.flatten(START)[path].shape) < 0.5 for path in ('a/kernel', 'a/bias')}


@pytest.mark.parametrize(
  ('spec', 'outside'),
  [
    ({'fn': 'masks.random'}, lambda start, moved: start),
    ({'fn': 'masks.magnitude', 'prune': True}, lambda start, moved: np.zeros_like(start)),
    ({'fn': 'masks.child_d'}, lambda start, moved: moved),
  ],
  ids=['stays', 'pruned', 'decays'],
)
def test_masks_choose_what_moves(spec, outside):
  """Outside of a mask nothing moves, nor counts in clipping; a masked gradient still decays."""
  config = CONFIG | {'groups': {'one': {'transform': spec}}}
  found = run(config, given={'one': MASKS})
  gradient_only = spec['fn'] == 'masks.child_d'
  moved = by_hand(config, **{'after' if gradient_only else 'before': MASKS})
  for path, start in tree.flatten(START).items():
    mask = MASKS.get(path, np.ones(start.shape, bool))
    np.testing.assert_allclose(found[path][mask], moved[path][mask], rtol=1e-4, atol=1e-5)
    rest = outside(start, moved[path])
    exact = 1e-5 if gradient_only else 0
    np.testing.assert_allclose(found[path][~mask], rest[~mask], rtol=exact, atol=exact)


def test_adafactor_step_has_the_size_of_the_learning_rate():
  """Unfactored at this size: the first step is the sign of the gradient, its mean square 1."""
  config = CONFIG | {'name': 'adafactor', 'warmup': 0.0, 'weight_decay': 0.0, 'clip': None}
  opt = optim.optimizer(config, GROUPS, STEPS)
  updates, _ = opt.update(GRADS[0], opt.init(START), START)
  for update, grad in zip(jax.tree.leaves(updates), jax.tree.leaves(GRADS[0]), strict=True):
    np.testing.assert_allclose(update, -1e-2 * np.sign(grad), rtol=1e-3)
  wide = {'w': jnp.ones((256, 128))}
  opt = optim.optimizer(config, {'w': 'one'}, STEPS)
  assert tree.count(opt.init(wide)) < 1000, 'rows and columns, not the matrix'


def step_over_everything(here, transformation):
  """The other way to freeze: a gradient for every leaf, and updates of zero for most."""

  def objective(variables, batch):
    return losses.single()(here.logits(variables, batch), batch['labels']).mean()

  def take(variables, state, batch):
    loss, grads = jax.value_and_grad(objective)(variables, batch)
    updates, state = transformation.update(grads, state, variables)
    return optax.apply_updates(variables, updates), state, loss

  return jax.jit(take)


@pytest.fixture(scope='module')
def three_ways():
  """LoRA by the gradient of what trains, by masks over the full tree, and full fine-tuning."""
  still = dict.fromkeys(('dropout', 'attention_dropout', 'head_dropout'), 0.0)
  here = tiny.world(tiny.settings('lora'), dataclasses.replace(tiny.SHORT, **still))
  batch = jax.tree.map(jnp.asarray, tiny.batch())
  opt = tiny.optimizer(here, STEPS, **CONFIG)
  state = step.init_state(here.trainable, opt, seed=0)
  take = step.make_step(here.logits, losses.single(), opt)
  ours = take.lower(state, here.frozen, batch).compile()

  c = CONFIG
  trained = optax.chain(
    optax.clip_by_global_norm(c['clip']),
    optax.adamw(
      optim.schedule(c['schedule'], c['lr'], c['warmup'], STEPS),
      *(c[name] for name in ('b1', 'b2', 'eps')),
      weight_decay=c['weight_decay'],
      mask=lambda t: jax.tree.map(lambda x: x.ndim > 1, t),
    ),
  )
  labels = tree.map_paths(lambda path, _: path not in here.groups, here.variables)
  masked = optax.multi_transform({False: trained, True: optax.set_to_zero()}, labels)
  everything = step_over_everything(here, masked)
  partition = everything.lower(here.variables, masked.init(here.variables), batch).compile()

  plain = optax.adamw(1e-3)
  full = step_over_everything(here, plain)
  full = full.lower(here.variables, plain.init(here.variables), batch).compile()
  return here, batch, (ours, state), (partition, masked.init(here.variables)), full


def test_training_the_subtree_equals_masking_the_full_tree(three_ways):
  here, batch, (ours, state), (partition, masked), _ = three_ways
  variables = here.variables
  for _ in range(5):
    state, metrics = ours(state, here.frozen, batch)
    variables, masked, loss = partition(variables, masked, batch)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  whole = tree.flatten(variables)
  for path, x in tree.flatten(state.trainable).items():
    np.testing.assert_allclose(x, whole[path], rtol=1e-4, atol=1e-6, err_msg=path)
  for path, x in tree.flatten(here.frozen).items():
    np.testing.assert_array_equal(x, whole[path])


def test_training_the_subtree_costs_least(three_ways):
  *_, (ours, _), (partition, _), full = three_ways
  flops = [compiled.cost_analysis()['flops'] for compiled in (ours, partition, full)]
  assert flops[0] <= flops[1] * 1.001 and flops[1] < 0.9 * flops[2], flops
