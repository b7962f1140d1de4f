"""Checkpoints: what is kept, what is believed, what is refused."""

import errno
import shutil
from typing import Any, NamedTuple

import disk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efft import checkpoint
from efft.errors import Diverged, EnvironmentProblem, InputError


class State(NamedTuple):
  step: Any
  trainable: Any
  opt_state: Any
  ema: Any


def state_at(step, shape=(3, 2), dtype=jnp.float32):
  tree = {'head': {'kernel': jax.random.normal(jax.random.key(step), shape, dtype)}}
  return State(jnp.int32(step), tree, optax.adam(0.1).init(tree), None)


def equal(a, b):
  same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
  return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(same))


def fill(folder, steps, best=None):
  with checkpoint.Checkpoints(folder) as checkpoints:
    for step in steps:
      checkpoints.save(step, state_at(step), {'worse': step}, best)
    return checkpoints.steps


def biggest(folder):
  return max((p for p in folder.glob('state/**/*') if p.is_file()), key=lambda p: p.stat().st_size)


def test_the_best_and_the_newest_two_are_kept_over_sittings(tmp_path):
  assert fill(tmp_path, [1, 2, 3], best=1) == [1, 2, 3]
  assert fill(tmp_path, [4, 5, 6], best=1) == [1, 5, 6]
  assert fill(tmp_path, [7, 8], best=7) == [7, 8]
  assert fill(tmp_path, [9], best=7) == [7, 8, 9]


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_restore_gives_back_every_bit_and_can_be_donated(tmp_path, dtype):
  state = state_at(7, dtype=dtype)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(7, state, {'best': 0.1 + 0.2})
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    restored, memo = checkpoints.restore(checkpoints.latest, state_at(0, dtype=dtype))
  assert equal(restored, state) and memo == {'best': 0.1 + 0.2}
  donate = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
  donate(restored)
  assert restored.trainable['head']['kernel'].is_deleted()


def flip(step):
  path = biggest(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(step):
  path = biggest(step)
  path.write_bytes(path.read_bytes()[:-1])


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


def unsealed(step):
  (step / 'digests.json').unlink()


def garbled_seal(step):
  (step / 'digests.json').write_text('{"a')


@pytest.mark.parametrize(
  'break_it, aside',
  [
    (flip, 'damaged-3'),
    (truncate, 'damaged-3'),
    (garbled_seal, 'damaged-3'),
    (empty, 'unfinished'),
    (unsealed, 'unfinished'),
  ],
)
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
  tmp_path, caplog, break_it, aside
):
  fill(tmp_path, [1, 2, 3])
  break_it(tmp_path / '3')
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.latest == 2
    restored, memo = checkpoints.restore(2, state_at(0))
    assert equal(restored, state_at(2)) and memo == {'worse': 2}
    assert 'checkpoint 3: ' in caplog.text and aside in caplog.text and (tmp_path / aside).is_dir()
    checkpoints.save(3, state_at(3), {})  # the set-aside one is not in the way
    assert checkpoints.steps == [2, 3]


def test_an_empty_folder_with_a_higher_number_is_not_the_latest(tmp_path):
  fill(tmp_path, [1, 2])
  (tmp_path / '999').mkdir()
  assert fill(tmp_path, [3]) == [2, 3]


@pytest.mark.parametrize('value', [np.nan, np.inf])
@pytest.mark.parametrize('field', ['trainable', 'opt_state'])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, value, field):
  bad = jax.tree.map(
    lambda x: x + value if jnp.issubdtype(x.dtype, jnp.floating) else x,
    getattr(state_at(2), field),
  )
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, state_at(1), {})
    with pytest.raises(Diverged, match=f'step 2: {field}/.*kernel is not finite.*step 1'):
      checkpoints.save(2, state_at(2)._replace(**{field: bad}), {}, best=2)
    assert checkpoints.steps == [1]


def test_another_tree_is_refused_with_the_difference(tmp_path):
  fill(tmp_path, [1])
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    with pytest.raises(InputError) as error:
      checkpoints.restore(1, state_at(0, shape=(3, 4)))
  assert '- trainable/head/kernel float32[3,4]' in str(error.value)
  assert '+ trainable/head/kernel float32[3,2]' in str(error.value)


def test_a_failed_save_whose_writers_go_on_is_cleared_away(tmp_path, monkeypatch):
  fill(tmp_path, [1])
  left = tmp_path / '2.orbax-checkpoint-tmp'
  (left / 'state').mkdir(parents=True)
  rmtree, calls = shutil.rmtree, []

  def contested(path, ignore_errors=False):
    """A writer adds something while the first call deletes, and just after the second."""
    if path != left:
      return rmtree(path, ignore_errors)
    calls.append(ignore_errors)
    if len(calls) == 1 and not ignore_errors:
      raise OSError(errno.ENOTEMPTY, 'Directory not empty')
    if len(calls) > 1:
      rmtree(path)
    if len(calls) == 2:
      (left / 'state').mkdir(parents=True)

  monkeypatch.setattr(shutil, 'rmtree', contested)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps == [1]
  assert len(calls) == 3 and not left.exists()


# A callback of tensorstore's failed write finds orbax's event loop closed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_a_full_disk_and_an_unwritable_place_are_the_machines_problem(tmp_path, monkeypatch):
  state = state_at(2, shape=(500, 500))
  with checkpoint.Checkpoints(tmp_path / 'a') as checkpoints:
    checkpoints.save(1, state, {})
    with disk.full(100_000):
      with pytest.raises(EnvironmentProblem, match='/2: cannot write the checkpoint'):
        checkpoints.save(2, state, {})
  with checkpoint.Checkpoints(tmp_path / 'a') as checkpoints:
    assert checkpoints.steps == [1]
    assert [p.name for p in (tmp_path / 'a').iterdir() if 'tmp' in p.name] == []
    checkpoints.save(2, state, {})
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(EnvironmentProblem, match='it takes 3 MB, 0 MB are free'):
      checkpoints.save(3, state, {})
  (tmp_path / 'file').write_text('')
  with pytest.raises(EnvironmentProblem, match='Not a directory'):
    checkpoint.Checkpoints(tmp_path / 'file' / 'below')
