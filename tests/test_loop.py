"""The loop on a linear model: records, best, patience, divergence, and resume after every death.

Runs that die do so in processes of a fork server that has jax imported already.
"""

import functools
import json
import math
import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efft import checkpoint, files, trackers
from efft.errors import Diverged, EfftError, Preempted
from efft.training import loop

TOTAL = 23


class State(NamedTuple):
  step: Any
  trainable: Any
  opt_state: Any
  ema: Any


class Batches:
  """Two lengths, as buckets would give; NaN labels at `poison`."""

  def __init__(self, poison=None):
    self.poison = poison

  def batch(self, step):
    rng = np.random.default_rng([1, step])
    x = rng.normal(size=(8, 4 + 2 * (step % 3 == 0))).astype(np.float32)
    y = np.full(8, np.nan, np.float32) if step == self.poison else x.sum(1).astype(np.float32)
    return {'x': x, 'y': y}


tx = optax.adam(0.05)


def start():
  tree = {'w': jnp.zeros((6,)), 'b': jnp.zeros(())}
  return State(jnp.int32(0), tree, tx.init(tree), jax.tree.map(jnp.copy, tree))


@functools.partial(jax.jit, donate_argnums=0)
def step_fn(state, frozen, batch):
  def loss(tree):
    x, width = batch['x'], batch['x'].shape[1]
    keep = jax.random.bernoulli(jax.random.fold_in(frozen, state.step), 0.9, x.shape)
    return jnp.mean(((x * keep) @ tree['w'][:width] + tree['b'] - batch['y']) ** 2)

  value, grads = jax.value_and_grad(loss)(state.trainable)
  updates, opt_state = tx.update(grads, state.opt_state)
  trainable = optax.apply_updates(state.trainable, updates)
  ema = optax.incremental_update(trainable, state.ema, 0.1)
  metrics = {'loss': value, 'grad_norm': jnp.sqrt(jnp.sum(grads['w'] ** 2))}
  return State(state.step + 1, trainable, opt_state, ema), metrics


def evaluate(state):
  return {'score': -abs(float(state.ema['w'][0]) - 0.5), 'other': math.nan}


def fit(workdir=None, state=None, **options):
  options = {
    'step_fn': step_fn,
    'batches': Batches(),
    'total_steps': TOTAL,
    'evaluate': evaluate,
    'eval_every': 7,
    'main_metric': 'score',
    'checkpoint_every': 5,
    'log_every': 3,
  } | options
  state, key = start() if state is None else state, jax.random.key(3)
  if workdir is None:
    return loop.fit(state, key, **options)
  with files.RunLock(workdir), checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    sinks = trackers.make(workdir)
    return loop.fit(state, key, checkpoints=checkpoints, sinks=sinks, **options)


def records(workdir):
  """The lines of metrics.jsonl without the wall time."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k != 'time'} for line in lines]


def equal(a, b):
  return all(
    x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


# Dying.

EVENTS = ('step', 'evaluate', 'append', 'save', 'saved', 'digests', 'sealed', 'rename')


def die_at(event, count, how=signal.SIGKILL):
  """Arranges that this process is killed just before the `count`th `event`."""
  left = iter(range(count - 1, -1, -1))

  def armed(fn):
    def wrapped(*args, **kwargs):
      if next(left, None) == 0:
        os.kill(os.getpid(), how)
      return fn(*args, **kwargs)

    return wrapped

  places = {
    'append': (files, 'append_jsonl'),
    'save': (checkpoint.ocp.CheckpointManager, 'save'),
    'saved': (checkpoint.ocp.CheckpointManager, 'wait_until_finished'),
    'digests': (files, 'digests'),
    'sealed': (checkpoint.files, 'fsync_folder'),
    'rename': (os, 'replace'),
    'step': (Batches, 'batch'),
    'evaluate': (loop, 'judge'),
  }
  owner, name = places[event]
  setattr(owner, name, armed(getattr(owner, name)))


def life(workdir, event=None, count=0, how=signal.SIGKILL, options=None):
  """One sitting of a run, in its own process. Exits with efft's codes."""
  if event == 'time':
    timer = threading.Timer(count / 1000, os.kill, (os.getpid(), how))
    timer.daemon = True
    timer.start()
  elif event:
    die_at(event, count, how)
  try:
    fit(Path(workdir), **(options or {}))
  except EfftError as error:
    print(error, flush=True)
    os._exit(error.exit_code)


@pytest.fixture(scope='module')
def live():
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['jax', 'optax', 'orbax.checkpoint', 'efft.training.loop'])

  def run(*args, **kwargs):
    process = context.Process(target=life, args=args, kwargs=kwargs)
    process.start()
    process.join(120)
    return process.exitcode

  return run


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """An uninterrupted run: (its folder, what fit returned)."""
  workdir = tmp_path_factory.mktemp('whole')
  return workdir, fit(workdir)


def newest(workdir):
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    return checkpoints.restore(checkpoints.latest, start())[0]


def check_same(workdir, whole):
  reference, fitted = whole
  assert records(workdir) == records(reference)
  assert equal(newest(workdir), newest(reference))
  again = fit(workdir)  # nothing left to do: gives back the best
  assert equal(again.state, fitted.state) and again.best_step == fitted.best_step
  assert records(workdir) == records(reference)


def test_each_step_and_evaluation_is_recorded_once(whole):
  workdir, fitted = whole
  steps = [r['step'] for r in records(workdir) if r['event'] == 'train']
  evals = [r['step'] for r in records(workdir) if r['event'] == 'eval']
  assert steps == list(range(1, TOTAL + 1)) and evals == [7, 14, 21, TOTAL]
  scores = {r['step']: r['score'] for r in records(workdir) if r['event'] == 'eval'}
  assert fitted.best_step == max(scores, key=scores.get) and fitted.last_step == TOTAL
  assert int(fitted.state.step) == fitted.best_step
  assert fitted.metrics['score'] == scores[fitted.best_step]
  assert fitted.examples_per_second > 0 and fitted.seconds > 0 and fitted.compile_seconds > 0


@pytest.mark.parametrize('event', EVENTS)
def test_killed_at_any_point_it_ends_in_the_same_bits(tmp_path, live, whole, event):
  """Killed again and again at later and later occurrences of an event, until one life suffices."""
  rng = random.Random(event)
  deaths = 0
  while (code := live(tmp_path, event, rng.randint(1, 4) * 2**deaths)) != 0:
    assert code == -signal.SIGKILL
    deaths += 1
    assert deaths < 9
  assert deaths
  check_same(tmp_path, whole)


def test_killed_at_random_times_it_ends_in_the_same_bits(tmp_path, live, whole):
  rng = random.Random(0)
  for _ in range(6):
    live(tmp_path, 'time', rng.randint(100, 900))
  assert live(tmp_path) == 0
  check_same(tmp_path, whole)


def test_sigterm_saves_at_that_step_and_the_same_command_goes_on(tmp_path, live, whole):
  assert live(tmp_path, 'step', 4, signal.SIGTERM) == Preempted.exit_code == 75
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['4']
  assert [r['step'] for r in records(tmp_path)] == [1, 2, 3, 4]
  assert live(tmp_path, 'evaluate', 2, signal.SIGTERM) == 75
  assert live(tmp_path) == 0
  check_same(tmp_path, whole)


def test_sigterm_is_the_callers_again_afterwards(whole):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(Preempted, match='stopped by SIGTERM, nothing saved'):
    fit(evaluate=lambda state: os.kill(os.getpid(), signal.SIGTERM) or {'score': 0})
    fit(put=lambda batch: os.kill(os.getpid(), signal.SIGTERM) or batch)
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_damaged_newest_checkpoint_costs_steps_but_no_bits(tmp_path, live, whole, caplog):
  assert live(tmp_path, 'step', 18) == -signal.SIGKILL
  names = sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir())
  newest_file = max((tmp_path / 'checkpoints' / str(names[-1]) / 'state').glob('d/*'))
  newest_file.write_bytes(newest_file.read_bytes()[:-9])
  fit(tmp_path)
  assert f'checkpoint {names[-1]}: ' in caplog.text and 'damaged-' in caplog.text
  check_same(tmp_path, whole)


def test_a_damaged_best_checkpoint_is_said_and_the_next_best_taken(tmp_path, caplog):
  falling = lambda state: {'score': -int(state.step)}  # noqa: E731
  first = fit(tmp_path, evaluate=falling, total_steps=21)
  assert first.best_step == 7
  seal = tmp_path / 'checkpoints' / '7' / 'digests.json'
  seal.write_bytes(seal.read_bytes().replace(b'a', b'b', 1))
  again = fit(tmp_path, evaluate=falling)
  assert 'the best checkpoint (step 7, -7) is gone' in caplog.text
  assert again.best_step == TOTAL and again.metrics == {'score': -TOTAL}


def test_patience_counts_over_sittings(tmp_path):
  scores = {7: 0.5, 14: math.nan, 21: 0.5, 28: 0.4, 35: 0.9}
  options = {
    'evaluate': lambda state: {'score': scores[int(state.step)]},
    'patience': 3,
    'total_steps': 100,
  }

  def interrupted(state):
    if int(state.step) == 21:
      raise KeyboardInterrupt
    return options['evaluate'](state)

  with pytest.raises(KeyboardInterrupt):
    fit(tmp_path, **options | {'evaluate': interrupted})
  fitted = fit(tmp_path, **options)
  assert (fitted.best_step, fitted.last_step) == (7, 28)
  assert fitted.metrics == {'score': 0.5} and int(fitted.state.step) == 7
  assert [r['best'] for r in records(tmp_path) if r['event'] == 'eval'] == [True] + [False] * 3
  assert fit(tmp_path, **options).last_step == 28


def test_lower_can_be_better_and_the_last_can_be_asked_for(tmp_path):
  rising = lambda state: {'loss': float(state.step)}  # noqa: E731
  options = {'evaluate': rising, 'main_metric': 'loss', 'higher_is_better': False}
  assert fit(tmp_path / 'best', **options).best_step == 7
  last = fit(tmp_path / 'last', keep='last', **options)
  assert last.best_step == TOTAL == int(last.state.step) and last.metrics == {'loss': TOTAL}


@pytest.mark.parametrize('poison', [16, 17, TOTAL - 1])
def test_a_non_finite_loss_stops_with_its_step_and_keeps_the_last_good(tmp_path, poison):
  with pytest.raises(Diverged, match=rf'step {poison + 1}: loss is nan; the checkpoint of step'):
    fit(tmp_path, batches=Batches(poison))
  written = records(tmp_path)
  assert written[-1]['step'] == poison + 1 and written[-1]['loss'] is None
  state = newest(tmp_path)
  assert int(state.step) <= poison and np.isfinite(state.trainable['w']).all()
  with pytest.raises(Diverged):  # and again: the same bits diverge at the same step
    fit(tmp_path, batches=Batches(poison))
  assert records(tmp_path) == written


def test_weights_that_are_not_finite_under_a_finite_loss_are_not_saved(tmp_path):
  def broken(state, frozen, batch):
    state, metrics = step_fn(state, frozen, batch)
    bad = jnp.where(state.step >= 9, jnp.inf, 0.0)
    return state._replace(ema=jax.tree.map(lambda x: x + bad, state.ema)), metrics

  with pytest.raises(Diverged, match='step 10: ema/.* is not finite.*step 7'):
    fit(tmp_path, step_fn=broken)


def test_metrics_are_fetched_once_per_window_and_shapes_compiled_once(monkeypatch):
  fetched = []
  get = jax.device_get
  monkeypatch.setattr(jax, 'device_get', lambda tree: fetched.append(len(tree)) or get(tree))
  step_fn.clear_cache()
  fitted = fit(evaluate=None, checkpoint_every=0, log_every=10)
  assert fetched == [10, 10, 3]
  assert step_fn._cache_size() == 2
  assert fitted.last_step == fitted.best_step == TOTAL and fitted.metrics == {}


def test_put_stands_between_batches_and_step():
  seen = []
  fit(put=lambda batch: seen.append(batch['x'].shape) or jax.device_put(batch))
  assert len(seen) == TOTAL and set(seen) == {(8, 4), (8, 6)}


# Two hosts.


def host(workdir, index, port, sigterm_at):
  jax.config.update('jax_num_cpu_devices', 2)
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.distributed.initialize(f'localhost:{port}', 2, index)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  whole, rows = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ('data',))
  )

  def put(batch):
    if sigterm_at is not None and index == 1 and seen[0] == sigterm_at:
      os.kill(os.getpid(), signal.SIGTERM)  # one host alone is told
    seen[0] += 1
    return {k: jax.make_array_from_callback(v.shape, rows, v.__getitem__) for k, v in batch.items()}

  seen = [0]
  state = jax.jit(start, out_shardings=whole)()
  try:
    with checkpoint.Checkpoints(Path(workdir) / 'checkpoints') as checkpoints:
      fitted = loop.fit(
        state,
        jax.jit(lambda: jax.random.key(3), out_shardings=whole)(),
        step_fn=step_fn,
        batches=Batches(),
        total_steps=TOTAL,
        put=put,
        evaluate=lambda state: {'score': int(state.step)},
        eval_every=7,
        main_metric='score',
        checkpoints=checkpoints,
        sinks=trackers.make(workdir) if index == 0 else (),
        log_every=5,
      )
  except EfftError as error:
    os._exit(error.exit_code)
  np.save(Path(workdir) / f'w{index}.npy', np.asarray(fitted.state.trainable['w']))


def test_two_hosts_stop_together_and_end_as_one_does(tmp_path, whole):
  context = multiprocessing.get_context('forkserver')

  def both(sigterm_at):
    import socket

    with socket.socket() as free:
      free.bind(('localhost', 0))
      port = free.getsockname()[1]
    hosts = [context.Process(target=host, args=(tmp_path, i, port, sigterm_at)) for i in range(2)]
    for process in hosts:
      process.start()
    for process in hosts:
      process.join(120)
    return [process.exitcode for process in hosts]

  assert both(sigterm_at=11) == [75, 75]
  assert (tmp_path / 'checkpoints' / '14').is_dir()  # the next common flush
  assert both(sigterm_at=None) == [0, 0]
  weights = [np.load(tmp_path / f'w{i}.npy') for i in range(2)]
  np.testing.assert_array_equal(*weights)
  np.testing.assert_allclose(weights[0], newest(whole[0]).trainable['w'], atol=1e-5)
  assert [r['step'] for r in records(tmp_path) if r['event'] == 'train'] == list(
    range(1, TOTAL + 1)
  )
