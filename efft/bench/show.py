"""What a person sees while latency is measured, and the table at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from efft.bench.latency import described
from efft.progress import log  # whose lines do not stand above a bar that says the same

_COLUMNS = {
  'batch': 'batch', 'length': 'length', 'precision': 'precision', 'p50_ms': 'p50 ms',
  'p95_ms': 'p95 ms', 'p99_ms': 'p99 ms', 'examples_per_second': 'examples/s', 'memory_mb': 'MB',
}  # fmt: skip


class Bar:
  """How many of all rows there are: a bar on a terminal, a line for each row elsewhere."""

  def __init__(self, console: Console):
    self.done, self.total = 0, 0
    self._bar = Progress(
      TextColumn('[bold]bench'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
      TextColumn('{task.description}'), console=console, transient=True,
      disable=not console.is_terminal,
    )  # fmt: skip
    self._task = self._bar.add_task('', total=None)

  def __enter__(self) -> 'Bar':
    self._bar.start()
    return self

  def __exit__(self, *exc) -> None:
    self._bar.stop()

  def announce(self, total: int) -> None:
    """Says how many there will be."""
    self.total = total
    self._bar.update(self._task, total=total)

  def row(self, row: Mapping[str, Any]) -> None:
    """Another one was measured."""
    self.done += 1
    self._bar.update(self._task, completed=self.done, description=described(row))
    log.info('%d/%d: %s', self.done, self.total, described(row))


def table(rows: Sequence[Mapping[str, Any]]) -> None:
  """Prints rows as `latency.measure` gives them, and their notes."""
  shown = Table(pad_edge=False)
  for name in _COLUMNS.values():
    shown.add_column(name, justify='left' if name == 'precision' else 'right')
  for row in rows:
    shown.add_row(*(_text(row.get(name)) for name in _COLUMNS))
  console = Console(highlight=False)
  console.print(shown)
  for precision, note in dict.fromkeys((r['precision'], r['note']) for r in rows if 'note' in r):
    console.print(f'{precision}: {note}', markup=False, soft_wrap=True)


def _text(value: Any) -> str:
  if value is None:
    return '-'
  return f'{value:,.1f}' if isinstance(value, float) and value >= 1000 else _short(value)


def _short(value: Any) -> str:
  return f'{value:.4g}' if isinstance(value, float) else str(value)
