"""Checkpoints of one run: the newest two and the best, each proven by digests.

A checkpoint holds a pytree of arrays (the trainable tree, the optimiser's state, the step) and a
memo, a small JSON value of the loop. orbax writes and evicts; on top of it stand digests of our
own, because orbax restores a flipped bit silently and takes an empty folder with a higher number
for the latest step.
"""

import contextlib
import json
import logging
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import (
  AnyPreservationPolicy,
  LatestN,
  PreservationPolicy,
)

from efft import files
from efft.errors import Diverged, EnvironmentProblem, InputError

log = logging.getLogger(__name__)

_SEAL = 'digests.json'
_UNFINISHED = 'it was not written to the end'


class Checkpoints:
  """The intact checkpoints of a folder; opening it names damaged ones in the log, sets them aside.

  Kept are the newest two and the best. Two, because the newest is trusted only once its digests are
  written and orbax evicts before that: one would leave nothing to fall back to. The caller names
  the best, because orbax's own `BestN` forgets the metrics when a folder is opened again.

  Only one process may have a folder open (`files.RunLock`); of a multi-host run, all hosts open it
  and save together.
  """

  def __init__(self, folder: str | Path):
    self.folder = Path(folder).absolute()
    with files.disk_errors(self.folder):
      if jax.process_index() == 0:
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(self.folder)
        _set_aside_damaged(self.folder)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('efft.checkpoint.open')
    self._best = _Keep()
    self._manager = ocp.CheckpointManager(
      self.folder,
      item_names=('state', 'memo'),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([LatestN(2), self._best]),
        enable_async_checkpointing=False,
      ),
    )

  @property
  def steps(self) -> list[int]:
    """The steps that can be restored, ascending."""
    return sorted(self._manager.all_steps())

  @property
  def latest(self) -> int | None:
    return max(self.steps, default=None)

  def save(self, step: int, state, memo: dict, best: int | None = None) -> None:
    """Saves, and returns when all is on disk; of older checkpoints `best` and the newest stay.

    Raises Diverged, and writes nothing, where a leaf holds NaN or infinity; EnvironmentProblem
    where the disk refuses.
    """
    bad = _non_finite(state)
    if bad:
      raise Diverged(
        f'step {step}: {bad} is not finite; the last good checkpoint is '
        + (f'step {self.latest}' if self.steps else 'none')
      )
    self._check_space(step, state)
    self._best.step = best
    memo = {'layout': _layout(state), 'memo': memo}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), memo=ocp.args.JsonSave(memo))
    try:
      with _quiet_orbax():
        saved = self._manager.save(step, args=args, force=True)
        self._manager.wait_until_finished()
        self._manager.check_for_errors()
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore's own are ValueErrors
      if jax.process_index() == 0:
        with contextlib.suppress(OSError):
          _remove_unfinished(self.folder)
      reason = str(error).strip().splitlines()[0][:300]
      raise EnvironmentProblem(
        f'{self.folder / str(step)}: cannot write the checkpoint: {reason}'
      ) from error
    if not saved:
      raise EnvironmentProblem(
        f'{self.folder / str(step)}: a checkpoint of this or a later step is already there'
      )
    if jax.process_index() == 0:
      with files.disk_errors(self.folder / str(step)):
        _seal(self.folder / str(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('efft.checkpoint.sealed')

  def restore(self, step: int, like) -> tuple:
    """(state, memo) of a step.

    `like` gives the tree, shapes, dtypes and shardings: arrays or ShapeDtypeStructs. Raises
    InputError with the differences where the checkpoint holds another tree.
    """
    memo = self._manager.restore(step, args=ocp.args.Composite(memo=ocp.args.JsonRestore())).memo
    found, expected = memo['layout'], _layout(like)
    if found != expected:
      lines = [f'- {path} {spec}' for path, spec in expected.items() if found.get(path) != spec]
      lines += [f'+ {path} {spec}' for path, spec in found.items() if expected.get(path) != spec]
      more = f' and {len(lines) - 8} more' if len(lines) > 8 else ''
      raise InputError(
        str(self.folder / str(step)),
        'other leaves (+) than the config gives (-): ' + ', '.join(lines[:8]) + more,
        'the same leaves, shapes and dtypes',
        'use the config that wrote this folder, or another folder',
      )
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    state = self._manager.restore(step, args=args).state
    # The step donates its state; a copy made by XLA owns its buffers, which restored arrays need
    # not (host memory).
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    own = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)
    return own(state), memo['memo']

  def _check_space(self, step: int, state) -> None:
    need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(self.folder).free
    if free < need:
      raise EnvironmentProblem(
        f'{self.folder / str(step)}: cannot write the checkpoint: it takes {need / 1e6:.0f} MB, '
        f'{free / 1e6:.0f} MB are free; free some space'
      )

  def close(self) -> None:
    self._manager.close()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


class _Keep(PreservationPolicy):
  """Preserves one step, which may change."""

  step: int | None = None

  def should_preserve(self, checkpoints, *, context):
    return [checkpoint.step == self.step for checkpoint in checkpoints]


@contextlib.contextmanager
def _quiet_orbax():
  """Drops orbax's log messages: it prints tracebacks of what is then raised anyway."""
  logger = logging.getLogger('absl')
  drop = lambda record: 'orbax' not in record.pathname  # noqa: E731
  logger.addFilter(drop)
  try:
    yield
  finally:
    logger.removeFilter(drop)


def _remove_unfinished(folder: Path, patience: float = 5.0) -> None:
  """Deletes what a save that was killed or that failed left behind.

  A failed save returns with its first error while tensorstore's other writes go on in threads of
  their own, and those make files and folders anew: what is deleted must stay away for a while.
  """
  end = time.monotonic() + patience
  while entries := list(folder.glob('*.orbax-checkpoint-tmp*')):
    for entry in entries:
      last = time.monotonic() > end
      shutil.rmtree(entry, ignore_errors=not last)
    time.sleep(0.3)


def _seal(folder: Path) -> None:
  files.fsync_tree(folder)
  files.write_json(folder / _SEAL, files.digests(folder, skip=(_SEAL,)))
  files.fsync_folder(folder.parent)


def _set_aside_damaged(folder: Path) -> None:
  steps = sorted((int(entry.name), entry) for entry in folder.iterdir() if entry.name.isdecimal())
  for step, entry in steps:
    problem = _problem(entry)
    if problem:
      # Every kill while saving leaves an unfinished one: only the last of those is worth its space.
      aside = entry.with_name('unfinished' if problem == _UNFINISHED else f'damaged-{step}')
      shutil.rmtree(aside, ignore_errors=True)
      entry.rename(aside)
      log.warning('checkpoint %d: %s; it is set aside as %s', step, problem, aside)


def _problem(entry: Path) -> str:
  """Why a checkpoint's folder cannot be believed, or ''."""
  try:
    recorded = json.loads((entry / _SEAL).read_bytes())
    return files.damage(entry, {str(name): str(digest) for name, digest in recorded.items()})
  except (FileNotFoundError, NotADirectoryError):
    return _UNFINISHED
  except (ValueError, AttributeError):
    return f'{_SEAL} is not readable'


def _layout(state) -> dict[str, str]:
  """{'trainable/a/b': 'float32[2,3]'} of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {_name(path): f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]' for path, leaf in leaves}


def _non_finite(state) -> str:
  """The path of the first leaf with NaN or infinity, or ''.

  On the host, where the save needs the values anyway.
  """
  bad = ''
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      continue
    if not all(np.isfinite(np.asarray(shard.data)).all() for shard in leaf.addressable_shards):
      bad = _name(path)
      break
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.asarray(bool(bad))).any():
    return bad or 'a leaf on another host'
  return bad


def _name(path) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
