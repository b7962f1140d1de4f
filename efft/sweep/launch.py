"""The sweep itself: gives runs out to processes, sees to what becomes of them, and tells.

Runs are trained in processes of their own, so that a crash, an out-of-memory kill or a leak stays
in one of them. Who trains a run holds its lock below DIR/locks: several sweeps may share a folder.
"""

import collections
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live

from efft import files, progress
from efft.errors import InputError, Preempted
from efft.sweep import show
from efft.sweep.job import BUSY, Job, clean
from efft.sweep.records import Records
from efft.sweep.study import Planned, Study, load, part, plan

log = logging.getLogger(__name__)
JOB = (sys.executable, '-c', 'import sys; from efft.sweep import job; sys.exit(job.main())')
WAIT = 2.0  # seconds between looks at runs that other processes have


def sweep(
  study, workdir, *, shard: str = '0/1', jobs: int = 1, dry_run: bool = False,
  retry_failed: bool = False,
) -> list[dict]:  # fmt: skip
  """Makes the runs of a study that `workdir`/records.jsonl does not have yet.

  A run is known by its arm and by the hash of its resolved config. Each one is trained in a process
  of its own, measured, and appended to the records, errors and all; its output is in
  `workdir`/logs. Stopped in any way, the same call goes on, runs that had begun included.

  Args:
    study: a Python file; see `efft.sweep.load`.
    workdir: the folder of records.jsonl; several sweeps may share it.
    shard: 'i/n', every n-th run of the study from the i-th.
    jobs: processes at once. On a CPU each gets its share of the cores.
    dry_run: print the runs and what is known of them, and write nothing.
    retry_failed: make runs again that have failed.

  Returns:
    The last record of each run of the shard ([] for a dry run).

  Raises:
    InputError: a study that cannot be read, or a config that cannot be resolved; nothing is run.
    Preempted: SIGTERM; children have saved what they had, and the same call goes on.
  """
  if not isinstance(jobs, int) or jobs < 1:
    raise InputError('--jobs', repr(jobs), 'a whole number from 1', 'correct it')
  asked = load(study)
  runs = part(asked.runs, shard)
  root = Path(workdir)
  records = Records(root / 'records.jsonl')
  records.refresh()
  if dry_run:
    if asked.repeated:
      print(_repeated(asked), file=sys.stderr)
    print(show.listing(runs, records))
    return []
  with files.disk_errors(root):
    (root / 'logs').mkdir(parents=True, exist_ok=True)
  with progress.logs(root / 'sweep.log') as console:
    if asked.repeated:
      log.info(_repeated(asked))
    states = collections.Counter(show.status(run, records) for run in runs)
    told = ', '.join(f'{count} {state}' for state, count in states.items())
    log.info('%s: %d runs: %s', asked.name, len(runs), told or 'none in this shard')
    crew = Crew(asked, root, records, jobs, console)
    crew.work(runs, retry_failed)
  found = [records.get(run.key) or crew.lost[run.key] for run in runs]
  if found:
    print(show.summary(found))
  return found


class Child(NamedTuple):
  """A job under way."""

  process: subprocess.Popen
  runs: list[Planned]
  slot: int
  begin: float


class Crew:
  """The processes of one sweep, at most `jobs` at once.

  Attributes:
    lost: records of runs that failed and could not be recorded, by key.
  """

  def __init__(self, study: Study, root: Path, records: Records, jobs: int, console: Console):
    self.study, self.root, self.records, self.console = study, root, records, console
    self.lost: dict[tuple[str, str], dict] = {}
    self._cores = shares(jobs)
    self._children: list[Child] = []
    self._seconds: list[float] = []  # of runs that ended well

  def work(self, runs: Sequence[Planned], retry_failed: bool) -> None:
    """Returns when each run has a record, or is in `lost`."""
    states = {run.key: show.status(run, self.records) for run in runs}
    to_do = [r for r in runs if states[r.key] != 'done' and (retry_failed or not self._has(r))]
    self._seen = {run.key: self.records.count(run.key) for run in runs}
    self._runs, self._to_do = list(runs), {run.key for run in to_do}
    for run in runs:
      if run.key not in self._to_do:
        self._tidy(run)
    self._queue = collections.deque(self._plan(to_do))
    self._aside: list[Planned] = []  # other processes have them
    self._waiting = False  # for those, and this has been said
    with _signals() as stopped, self._live() as live:
      try:
        self._loop(stopped, live)
      finally:
        for child in self._children:
          child.process.terminate()
        for child in self._children:
          child.process.wait()
    if stopped:
      left = sum(not self._settled(run) for run in to_do)
      log.info('stopped with %d runs left; the same command goes on', left)
      if stopped[0] == signal.SIGINT:
        raise KeyboardInterrupt
      raise Preempted(f'stopped with {left} runs left; run the same command again to go on')

  def _tidy(self, run: Planned) -> None:
    """Removes what a process that was killed between record and removal has left of a run."""
    if not (self.root / 'runs' / run.name).exists():
      return
    # Another sweep may be trying the run again.
    with contextlib.suppress(InputError), files.RunLock(self.root / 'locks' / run.name):
      self.records.refresh()
      record = self.records.get(run.key)
      if record and not record.get('run'):
        clean(self.root / 'runs' / run.name, keep=False)

  def _loop(self, stopped: list[int], live: Live | None) -> None:
    told, looked = 0, time.monotonic()
    while self._children or (not stopped and (self._queue or self._aside)):
      for child in [c for c in self._children if c.process.poll() is not None]:
        self._children.remove(child)
        self._ended(child, bool(stopped))
      if len(stopped) > told:
        told = len(stopped)
        for child in self._children:
          # The second time, whoever asks does not want to wait for checkpoints.
          child.process.send_signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
      while not stopped and self._queue and len(self._children) < len(self._cores):
        self._start(self._queue.popleft())
      if not stopped and self._aside and time.monotonic() - looked > WAIT:
        looked = time.monotonic()
        self._queue.extend(self._plan(self._aside))
        self._aside = []
      if live:
        live.update(self._panel())
      time.sleep(0.05)

  def _start(self, group: list[Planned]) -> None:
    self.records.refresh()
    group = [run for run in group if not self._settled(run)]
    busy = [run for run in group if self._held(run)]
    self._aside += busy
    if busy and not self._waiting and not self._queue and not self._children:
      self._waiting = True
      log.info('waiting for %d runs that other processes have', len(self._aside))
    group = [run for run in group if run not in busy]
    if not group:
      return
    slot = min(set(range(len(self._cores))) - {child.slot for child in self._children})
    with files.disk_errors(self._log(group)), open(self._log(group), 'ab') as output:
      process = subprocess.Popen(
        JOB, stdin=subprocess.PIPE, stdout=output, stderr=output, env=self._environment(),
        # An interrupt from the keyboard is for the sweep, which lets its children finish.
        start_new_session=True,
      )  # fmt: skip
    self._children.append(Child(process, group, slot, time.monotonic()))
    # The pipe stays open: its end is the end of the sweep.
    with contextlib.suppress(BrokenPipeError):
      process.stdin.write(self._job(group, slot).to_json().encode() + b'\n')
      process.stdin.flush()

  def _ended(self, child: Child, stopping: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
      child.process.stdin.close()
    self.records.refresh()
    code = child.process.returncode
    left = [run for run in child.runs if not self._settled(run)]
    if left and not stopping:
      if code in (BUSY, Preempted.exit_code):
        self._aside += left
      elif len(child.runs) > 1:
        self._queue.extend([run] for run in left)  # one by one: whose fault it was is not known
      else:
        self._failed(left[0], self._reason(code, child.runs))
    for run in child.runs:
      if not self._settled(run):
        continue
      record = self.records.get(run.key) or self.lost[run.key]
      if record.get('status') == 'ok':
        self._seconds.append((time.monotonic() - child.begin) / len(child.runs))
      log.info('%s: %s; %s', run.name, show.outcome(record), self._counts())

  def _failed(self, run: Planned, error: str) -> None:
    """Records the failure of a process that could not do it, by another: jax stays out of here."""
    job = self._job([run], 0)._replace(failure=error)
    code = None
    with contextlib.suppress(subprocess.TimeoutExpired), open(self._log([run]), 'ab') as output:
      code = subprocess.run(
        JOB, input=job.to_json().encode() + b'\n', stdout=output, stderr=output,
        env=self._environment(), timeout=300, start_new_session=True,
      ).returncode  # fmt: skip
    self.records.refresh()
    if code == BUSY:
      self._aside.append(run)
    elif not self._settled(run):
      self.lost[run.key] = {
        'arm': run.arm, 'overrides': run.overrides, 'config': run.config,
        'config_hash': run.hash, 'status': 'failed', 'error': f'{error} (not recorded)',
      }  # fmt: skip

  def _reason(self, code: int, group: list[Planned]) -> str:
    if code < 0:
      name = signal.Signals(-code).name if -code in list(signal.Signals) else f'signal {-code}'
      return f'killed by {name}' + (' (out of memory?)' if -code == signal.SIGKILL else '')
    return f'exit code {code}: {_last_line(self._log(group))[:300]}'

  def _job(self, group: list[Planned], slot: int) -> Job:
    seen = [self._seen[run.key] for run in group]
    study, cores = self.study, self._cores[slot]
    root = str(self.root.resolve())
    return Job(study.name, root, study.keep, study.latency, study.splits, cores, group, seen)

  def _environment(self) -> dict[str, str]:
    here = str(Path(__file__).resolve().parents[2])  # so that the child runs this very efft
    paths = os.pathsep.join(filter(None, [here, os.environ.get('PYTHONPATH')]))
    # On a GPU the first process would take most of the memory.
    shared = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if len(self._cores) > 1 else {}
    return shared | os.environ | {'PYTHONPATH': paths}

  def _plan(self, runs: Sequence[Planned]) -> list[list[Planned]]:
    return plan(runs, self.study.populations, len(self._cores))

  def _has(self, run: Planned) -> bool:
    return self.records.get(run.key) is not None

  def _settled(self, run: Planned) -> bool:
    """Whether nothing is left to do for a run."""
    if run.key not in self._to_do or run.key in self.lost:
      return True
    return self.records.count(run.key) > self._seen[run.key]

  def _held(self, run: Planned) -> bool:
    try:
      with files.RunLock(self.root / 'locks' / run.name):
        return False
    except InputError:
      return True

  def _log(self, group: list[Planned]) -> Path:
    return self.root / 'logs' / f'{group[0].name}.log'

  def _counts(self) -> str:
    states = collections.Counter(
      'left' if not self._settled(run)
      else 'failed' if run.key in self.lost or show.status(run, self.records) != 'done' else 'done'
      for run in self._runs
    )  # fmt: skip
    running = sum(not self._settled(run) for child in self._children for run in child.runs)
    left = states['left'] - running
    told = f'{states["done"]} done, {running} running, {states["failed"]} failed, {left} left'
    if self._seconds and states['left']:
      mean = sum(self._seconds) / len(self._seconds)
      told += f', about {progress.clock(mean * states["left"] / len(self._cores))}'
    return told

  def _panel(self):
    now = time.monotonic()
    running = [
      (run.name, now - child.begin, _last_line(self._log(child.runs)))
      for child in self._children
      for run in child.runs
    ]
    return show.panel(f'{self.study.name}: {self._counts()}', running)

  def _live(self):
    if not self.console.is_terminal:
      return contextlib.nullcontext()
    return Live(console=self.console, refresh_per_second=2, transient=True)


def shares(jobs: int) -> list[list[int]]:
  """Cores for each of `jobs` processes: its share of this process's own; [] where it may have all.

  With more processes than cores, several get the same one.
  """
  if jobs == 1 or not hasattr(os, 'sched_getaffinity'):
    return [[] for _ in range(jobs)]
  cores = sorted(os.sched_getaffinity(0))
  if jobs >= len(cores):
    return [[cores[i % len(cores)]] for i in range(jobs)]
  return [cores[i * len(cores) // jobs : (i + 1) * len(cores) // jobs] for i in range(jobs)]


def _repeated(study: Study) -> str:
  return f'{study.repeated} runs are there more than once (same arm and config): made once'


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """Within the block, SIGTERM, SIGINT and SIGHUP are added to the list and do nothing else.

  One that was ignored before still is.
  """
  came: list[int] = []
  if threading.current_thread() is not threading.main_thread():
    yield came
    return
  handlers = {}
  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) in (signal.SIG_IGN, None):
      continue  # under nohup
    handlers[number] = signal.signal(number, lambda number, _: came.append(number))
  try:
    yield came
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def _last_line(path: Path) -> str:
  """Of a log that may be long: what stands last in it."""
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
      lines = file.read().decode(errors='replace').split('\n')
  except OSError:
    return ''
  return next((line.strip() for line in reversed(lines) if line.strip()), '')
