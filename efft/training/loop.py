"""The training loop: steps, records, evaluations, checkpoints, and a resume exact to the bit.

It knows nothing of models, methods or tasks: a state goes through `step_fn` with one batch after
another. Everything a resumed run needs is the checkpointed state, the batch's number and the `Memo`
saved beside it.

One step costs no synchronisation with the device: its metrics stay there until the next flush,
every `log_every` steps. jax dispatches asynchronously, so the next batch is made while the device
is busy; a thread for that would gain nothing.
"""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.experimental import multihost_utils

from efft.checkpoint import Checkpoints
from efft.errors import Diverged, Preempted

log = logging.getLogger(__name__)


class Batches(Protocol):
  """Training data: batch i is a pure function of i."""

  def batch(self, step: int) -> Mapping[str, np.ndarray]: ...


class Sink(Protocol):
  """Takes records: {'event': 'train' or 'eval', 'step': n, 'time': unix time, metric: value}."""

  def resume(self, step: int) -> None: ...  # forget what came after `step`
  def write(self, records: list[dict]) -> None: ...
  def sync(self) -> None: ...  # make it durable
  def close(self) -> None: ...


class Progress(Protocol):
  """What watches the run; see efft.progress."""

  def start(self, step: int, total: int) -> None: ...
  def update(self, step: int, **values: float) -> None: ...
  def stop(self) -> None: ...


class Fit(NamedTuple):
  """What `fit` did."""

  state: Any  # at the best evaluation (the last state where there is none), or the last: `keep`
  best_step: int  # the step `state` is of
  last_step: int  # the last step trained, < total_steps where patience ran out
  metrics: dict[str, float]  # of the evaluation at best_step
  seconds: float  # of training steps alone, in all sittings of the run together
  compile_seconds: float  # of the first step of each batch shape, likewise
  examples_per_second: float  # in this sitting, compilation excluded; nan where nothing was trained


@dataclasses.dataclass
class Memo:
  """What the loop itself remembers from one sitting to the next; saved with each checkpoint."""

  best: float | None = None  # the main metric at the best evaluation
  best_step: int | None = None
  best_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  last_metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  worse: int = 0  # evaluations since then
  seconds: float = 0.0
  compile_seconds: float = 0.0


def fit(
  state: Any,
  frozen: Any,
  *,
  step_fn: Callable[[Any, Any, Any], tuple[Any, Mapping[str, jax.Array]]],
  batches: Batches,
  total_steps: int,
  put: Callable[[Mapping[str, np.ndarray]], Any] = lambda batch: batch,
  evaluate: Callable[[Any], Mapping[str, float]] | None = None,
  eval_every: int = 0,
  main_metric: str = 'loss',
  higher_is_better: bool = True,
  patience: int = 0,
  keep: str = 'best',
  checkpoints: Checkpoints | None = None,
  checkpoint_every: int = 0,
  sinks: Iterable[Sink] = (),
  log_every: int = 10,
  progress: Progress | None = None,
) -> Fit:
  """Trains from `state`, or from the newest checkpoint, up to `total_steps`.

  Args:
    state: a pytree with a `.step`, whole in what it determines: state and batch give the next
      state. It is donated.
    frozen: passed through to `step_fn`.
    step_fn: (state, frozen, batch) -> (state, {'loss': scalar, ...}); its scalars may stay on the
      device.
    batches: `.batch(i)` feeds the step from i to i + 1.
    total_steps: the step to stop at.
    put: host batch -> what `step_fn` takes (sharding happens here).
    evaluate: state -> metrics, called every `eval_every` steps (0: never but at the end) and at the
      end.
    main_metric: which of them decides on best and patience.
    keep: 'best' or 'last': whose weights are returned.
    patience: stop after so many evaluations in a row without a better one (0: never).
    checkpoints: where to save and resume; None neither saves nor resumes, and returns the last
      state.
    checkpoint_every: save also every so many steps (0: at evaluations and at the end only).
    sinks: where records go, one per step and one per evaluation; closed at the end.
    log_every: fetch metrics from the device every so many steps.

  Raises:
    Diverged: a loss, gradient norm or leaf is not finite. The last good checkpoint stays.
    Preempted: SIGTERM came; the state is saved and the same call continues.
  """
  sinks = list(sinks)
  memo = Memo()
  if checkpoints and checkpoints.latest is not None:
    state, memo = _resume(checkpoints, state)
  step = int(state.step)
  for sink in sinks:
    sink.resume(step)
  clock, pending, shapes = Clock(), [], set()

  def flush():
    """Fetches and records the pending steps; their metrics are finite when it returns."""
    values = jax.device_get([metrics for _, metrics in pending])
    clock.stop()
    now = time.time()
    records = [
      {'event': 'train', 'step': number, **{k: float(v) for k, v in metrics.items()}, 'time': now}
      for (number, _), metrics in zip(pending, values, strict=True)
    ]
    pending.clear()
    bad = next((i for i, r in enumerate(records) if not finite(r)), None)
    records = records if bad is None else records[: bad + 1]
    for sink in sinks:
      sink.write(records)
    if bad is not None:
      raise Diverged(_diverged(records[bad], checkpoints))
    if progress and records:
      progress.update(step, loss=records[-1]['loss'], rate=clock.rate())

  def save():
    if checkpoints is None:
      return
    for sink in sinks:
      sink.sync()  # records first: a checkpoint must never be ahead of them
    total = dataclasses.replace(
      memo,
      seconds=memo.seconds + clock.seconds,
      compile_seconds=memo.compile_seconds + clock.compile_seconds,
    )
    checkpoints.save(step, state, dataclasses.asdict(total), memo.best_step)

  if progress:
    progress.start(step, total_steps)
  try:
    with _Sigterm() as stop:
      while step < total_steps and not (patience and memo.worse >= patience):
        batch = put(batches.batch(step))
        shape = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if shape not in shapes:  # the first step of a shape compiles: not counted as training
          shapes.add(shape)
          if pending:
            jax.block_until_ready(pending[-1])
          clock.stop()
          with clock.compiling():
            state, metrics = jax.block_until_ready(step_fn(state, frozen, batch))
        else:
          clock.start()
          state, metrics = step_fn(state, frozen, batch)
          clock.examples += shape[0][0] if shape and shape[0] else 0
        step += 1
        pending.append((step, metrics))

        last = step == total_steps
        evaluating = evaluate and (last or (eval_every and step % eval_every == 0))
        saving = last or (checkpoint_every and step % checkpoint_every == 0)
        flushing = evaluating or saving or step % log_every == 0
        # Hosts of one run must stop at the same step: they compare notes when they flush anyway.
        preempted = _any_host(stop.is_set()) if flushing or jax.process_count() == 1 else False
        if flushing or preempted:
          flush()
        if evaluating:
          judge(evaluate, state, step, memo, main_metric, higher_is_better, sinks)
        if evaluating or saving or preempted:
          save()
        if preempted:
          where = f'saved at step {step}' if checkpoints else 'nothing saved'
          raise Preempted(f'stopped by SIGTERM, {where}; run the same command again to go on')
  finally:
    if progress:
      progress.stop()
    for sink in sinks:
      sink.close()
  best = step
  if keep == 'best' and checkpoints and memo.best_step not in (None, step):
    best = memo.best_step
    state, _ = checkpoints.restore(best, state)
  return Fit(
    state=state,
    best_step=best,
    last_step=step,
    metrics=memo.best_metrics if best == memo.best_step else memo.last_metrics,
    seconds=memo.seconds + clock.seconds,
    compile_seconds=memo.compile_seconds + clock.compile_seconds,
    examples_per_second=clock.rate(),
  )


def _resume(checkpoints: Checkpoints, like) -> tuple[Any, Memo]:
  step = checkpoints.latest
  state, memo = checkpoints.restore(step, like)
  memo = Memo(**memo)
  log.info('resuming from step %d', step)
  if memo.best_step is not None and memo.best_step not in checkpoints.steps:
    log.warning(
      'the best checkpoint (step %d, %.4g) is gone: the best from here on is kept',
      memo.best_step,
      memo.best,
    )
    memo = dataclasses.replace(memo, best=None, best_step=None, best_metrics={})
  return state, memo


def judge(evaluate, state, step, memo, main_metric, higher_is_better, sinks) -> None:
  """Evaluates, records, and brings `memo` up to date."""
  metrics = {name: float(value) for name, value in evaluate(state).items()}
  memo.last_metrics = metrics
  value = metrics[main_metric]
  sign = 1 if higher_is_better else -1
  better = math.isfinite(value) and (memo.best is None or sign * value > sign * memo.best)
  if better:
    memo.best, memo.best_step, memo.best_metrics, memo.worse = value, step, metrics, 0
  else:
    memo.worse += 1
  record = {'event': 'eval', 'step': step, **metrics, 'best': better, 'time': time.time()}
  for sink in sinks:
    sink.write([record])
  shown = ', '.join(f'{name} {value:.4f}' for name, value in metrics.items())
  log.info('step %d: %s%s', step, shown, ' (best so far)' if better else '')


def finite(record: dict) -> bool:
  return all(math.isfinite(record[name]) for name in ('loss', 'grad_norm') if name in record)


def _diverged(record: dict, checkpoints) -> str:
  name = 'loss' if not math.isfinite(record['loss']) else 'grad_norm'
  good = checkpoints.latest if checkpoints else None
  kept = (
    'no checkpoint was written before' if good is None else f'the checkpoint of step {good} is kept'
  )
  return f'step {record["step"]}: {name} is {record[name]}; {kept}; lower the learning rate or clip'


def _any_host(flag: bool) -> bool:
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


class _Sigterm(threading.Event):
  """While entered, SIGTERM sets this event instead of ending the process."""

  def __enter__(self):
    self._main = threading.current_thread() is threading.main_thread()
    if self._main:
      self._before = signal.signal(signal.SIGTERM, lambda *_: self.set())
    return self

  def __exit__(self, *exc):
    if self._main:
      signal.signal(signal.SIGTERM, self._before)


class Clock:
  """Seconds of steady training and of compilation; stopped while evaluating and saving."""

  def __init__(self):
    self.seconds = self.compile_seconds = 0.0
    self.examples = 0
    self._since = None

  def start(self):
    if self._since is None:
      self._since = time.perf_counter()

  def stop(self):
    if self._since is not None:
      self.seconds += time.perf_counter() - self._since
      self._since = None

  @contextlib.contextmanager
  def compiling(self):
    begin = time.perf_counter()
    yield
    self.compile_seconds += time.perf_counter() - begin

  def rate(self) -> float:
    return self.examples / self.seconds if self.seconds else math.nan
