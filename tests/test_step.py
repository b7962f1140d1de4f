"""The training step, on a model of one matrix: what it computes, not what the encoder does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efft.models import dots
from efft.training import losses, step

B, D, C = 12, 5, 3
RNG = np.random.default_rng(0)
W = RNG.normal(size=(D, C)).astype(np.float32)
TRAINABLE = {'params': {'w': W}}
FROZEN = {'params': {'shift': RNG.normal(size=(1, C)).astype(np.float32)}}


def batch(rows=B, seed=1):
  rng = np.random.default_rng(seed)
  return {
    'x': rng.normal(size=(rows, D)).astype(np.float32),
    'labels': rng.integers(0, C, rows).astype(np.int32),
    'weights': np.ones(rows, np.float32),
  }


def scores(rate):
  def logits(variables, batch, rngs):
    p = variables['params']
    x = dots.drop(batch['x'], jax.random.bits(rngs['dropout'], (2,), jnp.uint32), rate)
    return x @ p['w'] + p['shift']

  return logits


def run(
  batches, rate=0.0, opt=None, ema=None, seed=0, trainable=TRAINABLE, frozen=FROZEN, **fields
):
  """States and metrics after each batch; states as host arrays, for the step takes them away."""
  opt = opt or optax.adam(0.1)
  take = step.make_step(scores(rate), losses.single(), opt, ema=ema, **fields)
  state, history = step.init_state(trainable, opt, seed=seed, ema=ema), []
  for rows in batches:
    state, metrics = take(state, frozen, rows)
    history.append(jax.tree.map(np.array, (state, metrics)))
  return history


def losses_of(history):
  return [float(metrics['loss']) for _, metrics in history]


def weights_of(history):
  return history[-1][0].trainable['params']['w']


def gradient_by_hand(w, rows, weights):
  """(loss, gradient) of the weighted mean cross-entropy."""
  z = rows['x'] @ w + FROZEN['params']['shift']
  p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  weights = weights / weights.sum()
  loss = -(weights * np.log(p[np.arange(len(p)), rows['labels']])).sum()
  return loss, rows['x'].T @ ((p - np.eye(C)[rows['labels']]) * weights[:, None])


@pytest.mark.parametrize('weighted', [False, True])
def test_step_is_the_formula(weighted):
  rows = batch()
  rows['weights'][-3:] = [0.5, 2.0, 0.0]
  classes = np.array([1.0, 3.0, 0.25], np.float32) if weighted else None
  own = rows['weights'] * (classes[rows['labels']] if weighted else 1)
  loss, grad = gradient_by_hand(W, rows, own)
  [(state, metrics)] = run([rows], opt=optax.sgd(0.5), class_weights=classes)
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-5)
  np.testing.assert_allclose(metrics['grad_norm'], np.linalg.norm(grad), rtol=1e-5)
  np.testing.assert_allclose(state.trainable['params']['w'], W - 0.5 * grad, rtol=1e-4, atol=1e-6)
  assert state.step == 1


def test_class_weights_are_those_of_torch():
  torch = pytest.importorskip('torch')
  rows, classes = batch(), np.array([1.0, 3.0, 0.25], np.float32)
  [(_, metrics)] = run([rows], class_weights=classes)
  z = torch.tensor(rows['x'] @ W + FROZEN['params']['shift'])
  expected = torch.nn.functional.cross_entropy(
    z, torch.tensor(rows['labels']).long(), weight=torch.tensor(classes)
  )
  np.testing.assert_allclose(metrics['loss'], expected.item(), rtol=1e-5)


@pytest.mark.parametrize('pieces', [2, 3, 12])
def test_accumulation_equals_the_uncut_step(pieces):
  """Also where the pieces carry unequal weight."""
  batches = [batch(seed=i) for i in range(4)]
  for rows in batches:
    rows['weights'][:5] = [0.0, 0.0, 0.5, 3.0, 0.0]
  classes = np.array([1.0, 3.0, 0.25], np.float32)
  whole = run(batches, class_weights=classes)
  cut = run(batches, class_weights=classes, accumulate=pieces)
  np.testing.assert_allclose(losses_of(cut), losses_of(whole), rtol=1e-5)
  np.testing.assert_allclose(weights_of(cut), weights_of(whole), rtol=1e-4, atol=1e-5)


def test_accumulated_pieces_drop_differently():
  """Equal rows in equal pieces would otherwise all lose the same inputs."""
  rows = {name: np.repeat(x[:1], B, axis=0) for name, x in batch().items()}
  grads = [run([rows], rate=0.5, opt=optax.sgd(1.0), accumulate=n) for n in (1, B)]
  one_piece, many = (weights_of(h) - W for h in grads)
  assert not np.allclose(one_piece, many)
  one_row = {name: x[:1] for name, x in rows.items()}
  single = weights_of(run([one_row], rate=0.5, opt=optax.sgd(1.0))) - W
  assert not np.allclose(many, single)


def test_average_of_the_weights():
  history = run([batch(seed=i) for i in range(5)], ema=0.8)
  average = W
  for state, _ in history:
    average = 0.8 * average + 0.2 * state.trainable['params']['w']
    np.testing.assert_allclose(state.ema['params']['w'], average, rtol=1e-5)
    assert state.weights is state.ema
  without = run([batch()])[0][0]
  assert without.ema is None and without.weights is without.trainable


def test_padded_rows_do_not_change_the_step():
  rows = batch()
  padded = {name: np.concatenate([x, x[:4]]) for name, x in rows.items()}
  padded['weights'][B:] = 0
  whole, more = run([rows]), run([padded])
  np.testing.assert_allclose(losses_of(more), losses_of(whole), rtol=1e-6)
  np.testing.assert_allclose(weights_of(more), weights_of(whole), rtol=1e-5)


def test_a_batch_without_weight_takes_no_step():
  rows = batch() | {'weights': np.zeros(B, np.float32)}
  [(state, metrics)] = run([rows], opt=optax.sgd(1.0))
  assert metrics['loss'] == 0
  np.testing.assert_array_equal(state.trainable['params']['w'], W)


def test_dropout_is_a_function_of_seed_and_step():
  rows = batch()
  still = {'rate': 0.5, 'opt': optax.sgd(0.0)}
  first, again, other = (run([rows] * 3, seed=seed, **still) for seed in (0, 0, 1))
  assert losses_of(first) == losses_of(again)
  assert len(set(losses_of(first) + losses_of(other))) == 6


def test_a_run_continues_from_its_state_alone():
  """Stopped after two steps and started in a new process, so to speak: bit for bit the same."""
  batches = [batch(seed=i) for i in range(4)]
  whole = run(batches, rate=0.3, ema=0.9)
  state = jax.tree.map(jnp.asarray, run(batches[:2], rate=0.3, ema=0.9)[-1][0])
  take = step.make_step(scores(0.3), losses.single(), optax.adam(0.1), ema=0.9)
  for rows in batches[2:]:
    state, _ = take(state, FROZEN, rows)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.array, state), whole[-1][0])


def test_frozen_integers_are_fine():
  codes = np.arange(C, dtype=np.int8).reshape(1, C)
  frozen = {'params': {'shift': codes}}
  [(state, metrics)] = run([batch()], frozen=frozen)
  assert np.isfinite(metrics['loss']) and not np.array_equal(state.trainable['params']['w'], W)


def test_the_state_is_donated_and_the_callers_arrays_are_not():
  opt = optax.adam(0.1)
  trainable = jax.tree.map(jnp.asarray, TRAINABLE)
  frozen, rows = jax.tree.map(jnp.asarray, (FROZEN, batch()))
  take = step.make_step(scores(0.0), losses.single(), opt, ema=0.9)
  first = step.init_state(trainable, opt, seed=0, ema=0.9)
  second, _ = take(first, frozen, rows)
  assert all(x.is_deleted() for x in jax.tree.leaves(first))
  assert not any(x.is_deleted() for x in jax.tree.leaves((trainable, frozen, rows, second)))


def test_one_program_for_all_steps():
  take = step.make_step(scores(0.1), losses.single(), optax.adam(0.1))
  state = step.init_state(TRAINABLE, optax.adam(0.1), seed=0)
  for i in range(3):
    state, _ = take(state, FROZEN, batch(seed=i))
  assert take._cache_size() == 1


def test_half_precision_weights_train_in_float32():
  half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), TRAINABLE)
  [(state, _)] = run([batch()], trainable=half)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(state.trainable))
