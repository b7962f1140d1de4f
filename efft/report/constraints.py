"""Limits of a recommendation: on costs and on the score."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import pandas as pd

from efft.errors import InputError, unknown
from efft.report import costs, records, selection
from efft.report.tables import amount, missing, score

ROUNDING = 1e-9  # of a mean that equals its limit
MEMORY, SIZE = ('step', 'inference', 'peak'), ('whole', 'bundle')


class Constraint(NamedTuple):
  """A limit: of a cost (at most `limit`), or of the score (`cost` is None)."""

  flag: str
  label: str
  limit: float
  cost: costs.Cost | None = None

  def words(self, sign: int) -> str:
    """'trained parameters <= 100,000'; `sign` is -1 where less of the metric is better."""
    if self.cost is not None:
      return f'{self.label} <= {amount(self.limit)}'
    return f'{self.label} {"<=" if sign < 0 else ">="} {score(self.limit)}'


def shape(table: pd.DataFrame, batch: int | None, length: int | None) -> costs.Cost | None:
  """The latency that was asked for; None where none was measured at all."""
  table = table.dropna(axis=1, how='all')
  measured = records.shapes(table)
  if not measured:
    return None
  if batch is None and length is None:
    return costs.latency(*costs.usual_shape(table))
  some = [s for s in measured if (batch or s[0]) == s[0] and (length or s[1]) == s[1]]
  if not some:
    wanted = ' '.join(f'{n}={v}' for n, v in (('batch', batch), ('length', length)) if v)
    shapes = ', '.join(f'{b} x {n}' for b, n in measured)
    fix = f'{costs.latency(batch or 1, length or 128).measure}'
    raise InputError('--latency_batch, --latency_length', f'no run measured at {wanted}',
                     f'one of {shapes} (batch x length)', fix)  # fmt: skip
  lowest = some[0][0]
  preferred = (lowest, 128)
  shape = preferred if preferred in some else max(s for s in some if s[0] == lowest)
  return costs.latency(*shape)


def limits(
  rows: pd.DataFrame,
  asked: Mapping[str, float | None],
  latency: costs.Cost | None,
  size: str,
  memory: str,
) -> list[Constraint]:
  """The constraints that were asked for.

  Args:
    rows: of `selection.settings`, of one task.
    asked: {flag: limit or None} of all flags of `recommend`.
    latency: what max_latency_ms is about; None where no latency was measured.
    size, memory: which size and memory the limits are about.

  Raises:
    InputError: a limit that is no number above 0, or on what no run has measured.
  """
  for flag, value in asked.items():
    if value is not None and (not math.isfinite(value) or (value <= 0 and flag != 'min_metric')):
      raise InputError(f'--{flag}', repr(value), 'a number above 0', 'correct it')
  for flag, value, known in (('size', size, SIZE), ('memory', memory, MEMORY)):
    if value not in known:
      raise unknown(f'--{flag}', flag, value, known, 'see `efft recommend --help`')
  bounded = {
    'max_latency_ms': latency or costs.latency(1, 128),
    'max_size_mb': costs.by_name(size),
    'max_memory_mb': costs.by_name(f'memory_{memory}'),
    'max_trained': costs.by_name('trained'),
    'max_train_seconds': costs.by_name('seconds'),
  }
  found = []
  for flag, cost in bounded.items():
    if asked[flag] is None:
      continue
    if not costs.has(rows, cost):
      raise InputError(f'--{flag}', f'no run with {cost.column}', 'a measured one', cost.measure)
    found.append(Constraint(flag, cost.label, asked[flag], cost))
  if asked['min_metric'] is not None:
    found.append(Constraint('min_metric', rows['metric'].iloc[0], asked['min_metric']))
  if asked['min_relative_metric'] is not None:
    chosen, _ = selection.choose(selection.Settings(rows, rows.iloc[:0], [], []), intervals=False)
    top = (chosen['sign'] * chosen['mean']).max() * chosen['sign'].iloc[0]
    share = asked['min_relative_metric']
    # Of a loss, 97 % as good is 1 / 0.97 as much; of a correlation below 0, 3 % of it further down.
    limit = top - (1 - share) * abs(top) if chosen['sign'].iloc[0] > 0 else top / share
    found.append(Constraint('min_relative_metric', rows['metric'].iloc[0], limit))
  return found


def excess(row: pd.Series, limit: Constraint) -> float:
  """By what share of the limit a setting breaks it; 0 where it holds, NaN where not measured."""
  if limit.cost is not None:
    value = row[limit.cost.column] * limit.cost.scale
    over = value - limit.limit
  else:
    over = row['sign'] * (limit.limit - row['mean'])
  if missing(over):
    return math.nan
  if over <= ROUNDING * abs(limit.limit):
    return 0.0
  return over / abs(limit.limit) if limit.limit else over


def violations(row: pd.Series, limits: list[Constraint]) -> list[dict]:
  """Which limits a setting breaks, and by how much."""
  broken = []
  for limit in limits:
    over = excess(row, limit)
    if over == 0:
      continue
    value = row['mean'] if limit.cost is None else row[limit.cost.column] * limit.cost.scale
    broken.append({
      'constraint': limit.flag, 'label': limit.label, 'limit': limit.limit, 'value': value,
      'excess': over,
    })  # fmt: skip
  return broken


def unmeasured(rows: pd.DataFrame, limits: list[Constraint]) -> list[str]:
  """Notes on the arms that a limit cannot be held against."""
  notes = []
  for limit in limits:
    if limit.cost is not None:
      arms = sorted(set(rows[rows[limit.cost.column].isna()]['arm']))
      if arms:
        names = ', '.join(arms)
        notes.append(f'{limit.label}: not measured for {names}, which were put aside.')
  return notes
