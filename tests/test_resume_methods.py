"""Methods that remember or draw something go on from a checkpoint as if nothing had happened.

Without dropout, so that what differs between steps is the method's own.
"""

import jax
import numpy as np
import pytest
import tiny

from efft import assemble, checkpoint, finetune, mesh
from efft.peft import budget, diff, galore, masks, movement
from efft.training import loop, losses, optim, step

TOTAL, BROKEN = 8, 3
# What a transform of these keeps in the optimiser's state, beside that of the optimiser inside.
MEMORIES = (
  budget.Budget, diff.Fixed, galore.Projected, masks.Drawn, movement.Scheduled, optim.Selected,
)  # fmt: skip
# Options of the transform that make something happen within so few steps, and after the break.
METHODS = {
  'adalora': {'tinit': 0.1, 'tfinal': 0.25, 'delta_t': 2},
  'adapterdrop_robust': {},
  'adamix': {},
  'diff_pruning': {'share': 0.6},
  'dylora': {},
  'child_f': {},
  'galore': {'update_proj_gap': 4},
  'lt_sft': {},
  'fish': {},
  'movement': {'warmup': 0.0, 'cooldown': 0.25},
  'cofi': {'warmup': 0.0, 'cooldown': 0.25},
  'l0': {},
}
PREPARED = ('child_f', 'lt_sft', 'fish')


def settings(method):
  resolved = tiny.settings(method)
  for fields in resolved['optim']['groups'].values():
    if 'transform' in fields:
      fields['transform'] |= METHODS[method]
  resolved['optim'] |= {'lr': 1e-2, 'warmup': 0.0}
  return resolved


def built(resolved, cfg, devices, file, prepared):
  """(world, optimiser, first state), all made anew, `file` read where it is there."""
  here = tiny.world(resolved, assemble.with_dropout(cfg, 0.0))
  fields = resolved['optim']
  given = finetune._given(file, lambda: prepared(here, fields), True)
  optimizer = optim.optimizer(fields, here.groups, TOTAL, given)
  state = step.init_state(here.trainable, optimizer, seed=4)
  return here, optimizer, mesh.replicate(state, devices)


def forgotten(state, start):
  """`state` without the method's memory: its part of the optimiser's state, or the step."""
  found = []

  def reset(now, first):
    if not isinstance(now, MEMORIES):
      return now
    found.append(now)
    if isinstance(now, movement.Scheduled):
      return first
    if isinstance(now, optim.Selected):
      return now._replace(masks=jax.tree.map(np.ones_like, now.masks))
    return first._replace(inner=now.inner)

  after = jax.tree.map(
    reset, state.opt_state, start.opt_state, is_leaf=lambda x: isinstance(x, MEMORIES)
  )
  return state._replace(opt_state=after) if found else state._replace(step=start.step)


@pytest.mark.parametrize('method', METHODS)
def test_an_interrupted_run_ends_in_the_same_bits(method, tmp_path):
  resolved, devices = settings(method), mesh.make(1)
  # Of one layer, none could be left out.
  cfg = tiny.CFG if method == 'adapterdrop_robust' else tiny.SHORT
  feed, file = tiny.Feed(cfg), tmp_path / 'prepared.npz'

  def put(rows):
    return mesh.put_batch(rows, devices)

  here, optimizer, state = built(
    resolved, cfg, devices, file, lambda here, fields: tiny.prepared(here, fields, TOTAL)
  )
  assert file.exists() == (method in PREPARED)
  weight = resolved['train']['consistency']
  take = step.make_step(
    here.logits, losses.single(), optimizer, penalty=here.penalty,
    consistency=losses.divergence('single', weight) if weight else None,
  )  # fmt: skip
  start = jax.tree.map(np.asarray, state)

  def fit(state, frozen, steps, checkpoints=None):
    frozen = mesh.place(frozen, devices)
    return loop.fit(
      state, frozen, step_fn=take, batches=feed, total_steps=steps, put=put, checkpoints=checkpoints
    ).state

  whole = jax.tree.map(np.asarray, fit(state, here.frozen, TOTAL))
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    fit(mesh.replicate(start, devices), here.frozen, BROKEN, checkpoints)

  # Masks and seeds are read, not found again, and nothing but the disk knows any number.
  again, _, state = built(
    resolved, cfg, devices, file,
    lambda here, fields: pytest.fail('prepared again') if method in PREPARED else {},
  )  # fmt: skip
  blank = mesh.replicate(jax.tree.map(np.zeros_like, state), devices)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints') as checkpoints:
    middle, _ = checkpoints.restore(BROKEN, blank)
    resumed = fit(blank, again.frozen, TOTAL, checkpoints)
  assert int(middle.step) == BROKEN and int(resumed.step) == TOTAL
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)

  other = mesh.replicate(forgotten(middle, start), devices)
  for i in range(BROKEN, TOTAL):
    other, _ = take(other, mesh.place(again.frozen, devices), put(feed.batch(i)))
  same = jax.tree.map(np.array_equal, other.trainable, whole.trainable)
  assert not all(jax.tree.leaves(same)), 'what was forgotten would have made no difference'
