"""What a run costs: the quantities that metrics are set against."""

from typing import NamedTuple

import pandas as pd

from efft.report import records


class Cost(NamedTuple):
  """A quantity of which less is better.

  Attributes:
    name: short, for file names and flags.
    column: of `records.Runs.table`.
    label: for axes and headings, with its unit.
    scale: the record's number times this is in that unit.
    measure: how to measure it where it is absent.
    plotted: whether it gets a plot of its own.
  """

  name: str
  column: str
  label: str
  scale: float = 1.0
  measure: str = 'train again: `efft sweep` records it'
  plotted: bool = True


BENCH = 'measure it: `efft bench --run=RUN'
COSTS = (
  Cost('trained', 'parameters.trained', 'trained parameters'),
  Cost('bundle', 'bytes.bundle', 'size of the bundle, MB', 1e-6),
  Cost('whole', 'bytes.whole', 'size of the whole model, MB', 1e-6),
  Cost('memory_step', 'memory_mb.step', 'memory of a training step, MB'),
  Cost('memory_inference', 'memory_mb.inference', 'memory of inference, MB'),
  Cost('memory_peak', 'memory_mb.peak', 'peak memory of the process, MB', plotted=False),
  Cost('seconds', 'train.seconds', 'training time, s'),
  Cost('step_ms', 'train.step_ms', 'training step, ms', plotted=False),
  Cost('flops_step', 'flops.step', 'FLOPs of a training step', plotted=False),
  Cost('flops_example', 'flops.example', 'FLOPs of inference, per example', plotted=False),
)


def by_name(name: str) -> Cost:
  return next(cost for cost in COSTS if cost.name == name)


def latency(batch: int, length: int, plotted: bool = True) -> Cost:
  """The median time of one call on `batch` examples of `length` tokens."""
  return Cost(
    f'latency_{batch}x{length}',
    records.shape_column(batch, length),
    f'latency of {batch} × {length} tokens, ms',
    1.0,
    f'{BENCH} --batch={batch} --length={length}`',
    plotted,
  )


def usual_shape(table: pd.DataFrame) -> tuple[int, int] | None:
  """The measured (batch, length) that stands for all: one example, 128 tokens, where measured.

  Else the smallest batch, and of its lengths the longest.
  """
  measured = records.shapes(table)
  if not measured or (1, 128) in measured:
    return (1, 128) if measured else None
  batch = measured[0][0]
  return max(shape for shape in measured if shape[0] == batch)


def measured(table: pd.DataFrame) -> list[Cost]:
  """Those that some run of `table` has a number for; one shape's latency is plotted."""
  usual = usual_shape(table)
  shapes = [latency(*shape, plotted=shape == usual) for shape in records.shapes(table)]
  return [cost for cost in (*COSTS, *shapes) if has(table, cost)]


def has(table: pd.DataFrame, cost: Cost) -> bool:
  return cost.column in table and bool(table[cost.column].notna().any())
