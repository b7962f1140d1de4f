"""Where the loop's records go: metrics.jsonl always, TensorBoard and Weights & Biases when asked
for.

A sink takes lists of records (`efft.training.loop.Sink`). What is optional never ends a run: a
missing package, a missing login or a failing service is warned about once, and that sink takes
nothing more.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from efft import files
from efft.errors import InputError

log = logging.getLogger(__name__)


class Jsonl:
  """metrics.jsonl: one line per step and evaluation, each exactly once however often the run is
  resumed.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path)

  def resume(self, step: int) -> None:
    dropped = len(files.read_jsonl(self.path)) if self.path.exists() else 0
    dropped -= len(files.keep_jsonl(self.path, lambda r: r.get('step', 0) <= step))
    if dropped:
      log.info('%s: dropped %d records after step %d, to be made again', self.path, dropped, step)

  def write(self, records: Sequence[Mapping]) -> None:
    files.append_jsonl(self.path, *records)

  def sync(self) -> None:
    if self.path.exists():
      with files.disk_errors(self.path):
        files.fsync_file(self.path)

  def close(self) -> None:
    pass


class TensorBoard:
  """Event files for TensorBoard, written by tensorboardX."""

  def __init__(self, folder: str | os.PathLike, config: Mapping):
    self.folder, self.writer = Path(folder), None

  def resume(self, step: int) -> None:
    import tensorboardX

    self.writer = tensorboardX.SummaryWriter(
      str(self.folder), purge_step=step + 1 if step else None
    )

  def write(self, records: Sequence[Mapping]) -> None:
    for record in records:
      for name, value in _numbers(record):
        self.writer.add_scalar(name, value, record['step'], walltime=record.get('time'))

  def sync(self) -> None:
    self.writer.flush()

  def close(self) -> None:
    if self.writer:
      self.writer.close()


class Wandb:
  """A Weights & Biases run, named after the run folder and continued with it."""

  def __init__(self, folder: str | os.PathLike, config: Mapping):
    self.folder, self.config, self.run = Path(folder), config, None

  def resume(self, step: int) -> None:
    import wandb

    # Without a terminal wandb would wait for a login for ever; with this it raises, and Optional
    # warns.
    if not (wandb.api.api_key or os.environ.get('WANDB_MODE') in ('offline', 'disabled')):
      raise RuntimeError('no login: run `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline')
    name_file = self.folder / 'wandb-id'
    if not name_file.exists():
      files.atomic_write(name_file, os.urandom(6).hex())
    self.run = wandb.init(
      project='efft', name=self.folder.resolve().name, id=name_file.read_text(), resume='allow',
      dir=str(self.folder), config=dict(self.config),
      reinit='create_new',  # beside those of other members of a population
    )  # fmt: skip

  def write(self, records: Sequence[Mapping]) -> None:
    for record in records:
      self.run.log(dict(_numbers(record)), step=record['step'])

  def sync(self) -> None:
    pass

  def close(self) -> None:
    if self.run:
      self.run.finish()


class Optional:
  """A sink that may fail: the first failure is a warning and the end of it, never the end of the
  run.
  """

  def __init__(self, name: str, sink):
    self.name, self.sink = name, sink

  def _try(self, method: str, *args) -> None:
    if self.sink is None:
      return
    try:
      getattr(self.sink, method)(*args)
    except Exception as error:  # whatever a tracking service throws
      fix = f" (in the checkout of efft, pip install -e '.[{self.name}]')"
      extra = fix if isinstance(error, ImportError) else ''
      log.warning('%s is off for this run: %s%s', self.name, error, extra)
      self.sink = None

  def resume(self, step: int) -> None:
    self._try('resume', step)

  def write(self, records: Sequence[Mapping]) -> None:
    self._try('write', records)

  def sync(self) -> None:
    self._try('sync')

  def close(self) -> None:
    self._try('close')


def make(
  workdir: str | os.PathLike, names: Sequence[str] = (), config: Mapping | None = None
) -> list:
  """The sinks of a run folder: metrics.jsonl, and those of `names` ('tensorboard', 'wandb').

  Raises InputError for another name.
  """
  known = {'tensorboard': TensorBoard, 'wandb': Wandb}
  sinks = [Jsonl(Path(workdir) / 'metrics.jsonl')]
  for name in names:
    if name not in known:
      raise InputError('trackers', repr(name), ' or '.join(map(repr, known)), 'correct the name')
    folder = Path(workdir) / 'tensorboard' if name == 'tensorboard' else workdir
    sinks.append(Optional(name, known[name](folder, config or {})))
  return sinks


def _numbers(record: Mapping):
  event = record.get('event', 'train')
  for name, value in record.items():
    if name not in ('event', 'step', 'time') and isinstance(value, Real):
      yield f'{event}/{name}', float(value)
