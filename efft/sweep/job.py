"""A process of a sweep: it trains the runs it is given, measures them and appends their records.

It reads one line of JSON from standard input, and takes the end of that input for the end of the
sweep: then it saves a checkpoint and goes, as on SIGTERM.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from efft import environment, files
from efft.errors import Diverged, EfftError, InputError, Preempted
from efft.sweep.records import Records
from efft.sweep.study import Planned

BUSY = 73  # exit code: other processes have these runs


class Job(NamedTuple):
  """What the process is told.

  seen: how many records each run had when it was given out; more by now means that it is done.
  failure: the error of a process that left none itself; the runs are recorded, not trained.
  """

  study: str
  root: str
  keep: bool
  latency: tuple
  splits: tuple
  cores: list[int]
  runs: list[Planned]
  seen: list[int]
  failure: str = ''

  def to_json(self) -> str:
    return files.to_json(self._asdict() | {'runs': [run._asdict() for run in self.runs]})

  @classmethod
  def from_json(cls, text: str | bytes) -> 'Job':
    given = json.loads(text)
    latency = tuple(map(tuple, given['latency']))
    runs = [Planned(**run) for run in given['runs']]
    given |= {'runs': runs, 'latency': latency, 'splits': tuple(given['splits'])}
    return cls(**given)


def main() -> int:
  job = Job.from_json(sys.stdin.buffer.readline())
  if job.cores and hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, job.cores)
  environment.settle()
  warnings.filterwarnings('ignore', module=r'(?!efft)')
  if not job.failure:
    threading.Thread(target=_end_with_input, daemon=True).start()
  try:
    return carry_out(job)
  except Preempted as error:
    print(f'efft: {error}', file=sys.stderr)
    return error.exit_code


def carry_out(job: Job, make: Callable[[Planned, Job, Path], dict] | None = None) -> int:
  """Makes and records those runs that nobody else has; the exit code.

  `make` takes a run, the job and the run folder, and gives the record; by default it trains.
  """
  root = Path(job.root)
  records = Records(root / 'records.jsonl')
  with contextlib.ExitStack() as locks:
    free = []
    for run, seen in zip(job.runs, job.seen, strict=True):
      try:
        locks.enter_context(files.RunLock(root / 'locks' / run.name))
      except InputError:
        continue  # another process has it
      free.append((run, seen))
    if not free:
      return BUSY
    records.refresh()
    left = [run for run, seen in free if records.count(run.key) <= seen]
    if len(left) > 1 and make is None and not job.failure:
      _together(left, root / 'runs')
    for run in left:
      folder = root / 'runs' / run.name
      record = _outcome(run, job, folder, make or trained)
      record['run'] = f'runs/{run.name}' if job.keep and folder.exists() else ''
      records.add(record)
      clean(folder, job.keep)
  return 0


def _together(runs: list[Planned], folder: Path) -> None:
  """Trains runs as a population. Those that it does not finish train one by one afterwards."""
  from efft import population

  try:
    population.train([run.config for run in runs], [folder / run.name for run in runs])
  except Exception:
    traceback.print_exc()


def trained(run: Planned, job: Job, folder: Path) -> dict:
  """Trains a run, or goes on with it, and measures what came out."""
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.ERROR)  # orbax and jax write through it

  from efft import pipeline
  from efft.bench import record

  results = pipeline.train(run.config, folder)
  known = {'validation': results['metrics']}
  if 'report' in results:
    known['report'] = results['report']
  return record.measure(
    folder, study=job.study, arm=run.arm, overrides=run.overrides,
    root=Path(job.root), latency=job.latency, splits=job.splits, known=known,
  )  # fmt: skip


def clean(folder: Path, keep: bool) -> None:
  """Removes a run folder, or (`keep`) the checkpoints in it."""
  for unwanted in list(folder.rglob('checkpoints')) if keep else [folder]:
    shutil.rmtree(unwanted, ignore_errors=True)


def _outcome(run: Planned, job: Job, folder: Path, make: Callable) -> dict:
  """A run's record, also where there is nothing to tell but the error."""
  status, error = 'failed', job.failure
  if not error:
    try:
      return make(run, job, folder)
    except Preempted:
      raise
    except Exception as problem:
      traceback.print_exc()
      status = 'diverged' if isinstance(problem, Diverged) else 'failed'
      named = isinstance(problem, EfftError)
      error = ' '.join(f'{"" if named else type(problem).__name__ + ": "}{problem}'.split())
  from efft.bench import record

  return record.failed(
    run.config, study=job.study, arm=run.arm, overrides=run.overrides,
    run=folder, root=Path(job.root), status=status, error=error,
  )  # fmt: skip


def _end_with_input() -> None:
  # Not through sys.stdin: its lock, held by this thread, would stop the interpreter from ending.
  while os.read(0, 1 << 16):
    pass
  os.kill(os.getpid(), signal.SIGTERM)
