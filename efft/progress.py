"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere, train.log always.

Everything goes to standard error; standard output belongs to results.
"""

import collections
import contextlib
import logging
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from efft import files

log = logging.getLogger(__name__)


@contextlib.contextmanager
def logs(path: str | Path | None = None, console: Console | None = None) -> Iterator[Console]:
  """Within the block, efft's log messages go to `path` (appended, with times) and to the console.

  Yields the console, to be given to `Progress`, so that messages stand above the live panel.
  """
  console = console or Console(stderr=True)
  root = logging.getLogger('efft')
  before = root.level, root.propagate
  if console.is_terminal:
    shown = RichHandler(
      console=console,
      show_path=False,
      show_time=False,
      show_level=False,
      highlighter=NullHighlighter(),
    )
    shown.addFilter(lambda record: record.name != __name__)  # the panel shows it already
  else:
    shown = logging.StreamHandler(sys.stderr)
  shown.setFormatter(_Plain())
  handlers = [shown]
  if path is not None:
    with files.disk_errors(path):
      handlers.append(_File(path, encoding='utf-8'))
    handlers[-1].setFormatter(logging.Formatter('%(asctime)s %(levelname)s %(message)s'))
  root.setLevel(logging.INFO)
  root.propagate = False  # absl's handler on the root logger would say everything twice
  for handler in handlers:
    root.addHandler(handler)
  try:
    yield console
  finally:
    for handler in handlers:
      root.removeHandler(handler)
      handler.close()
    root.level, root.propagate = before


class Progress:
  """Loss, examples/s and time left of a run of steps; `every` seconds between plain lines."""

  def __init__(self, console: Console, every: float = 5.0):
    self.console, self.every = console, every
    self._bar = None

  def start(self, step: int, total: int) -> None:
    self._total, self._line = total, time.monotonic()
    # Of the last few updates, so that the compilation of the first steps is soon forgotten.
    self._recent = collections.deque([(self._line, step)], maxlen=8)
    if self.console.is_terminal:
      self._bar = Bar(
        TextColumn('[bold]train'), BarColumn(), MofNCompleteColumn(),
        TextColumn('loss {task.fields[loss]}'), TextColumn('{task.fields[rate]} examples/s'),
        TimeRemainingColumn(elapsed_when_finished=True), console=self.console, transient=True,
      )  # fmt: skip
      self._bar.start()
      self._task = self._bar.add_task('train', total=total, completed=step, loss='...', rate='...')

  def update(self, step: int, *, loss: float, rate: float) -> None:
    """`rate` is in examples per second; nan while there is nothing to tell."""
    shown = dict(loss=f'{loss:.4f}', rate='...' if math.isnan(rate) else f'{rate:.1f}')
    if self._bar:
      self._bar.update(self._task, completed=step, **shown)
    now = time.monotonic()
    self._recent.append((now, step))
    if now - self._line >= self.every or step >= self._total:
      self._line = now
      since, first = self._recent[0]
      left = (now - since) / max(step - first, 1) * (self._total - step)
      log.info(
        'step %d/%d, loss %s, %s examples/s, %s left',
        step,
        self._total,
        shown['loss'],
        shown['rate'],
        clock(left),
      )

  def stop(self) -> None:
    if self._bar:
      self._bar.stop()
      self._bar = None


def clock(seconds: float) -> str:
  """75 -> '1:15', 4000 -> '1:06:40'."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


class _File(logging.FileHandler):
  def handleError(self, record):
    pass  # a full disk is reported, in one line, by whoever cannot do without it


class _Plain(logging.Formatter):
  def format(self, record):
    text = super().format(record)
    return f'{record.levelname.lower()}: {text}' if record.levelno >= logging.WARNING else text
