"""Which setting of each arm is shown, and on which half.

The validation split chooses hyper-parameters; what is reported comes from the other half of it
(`metrics.report`) or from the test split, which chose nothing.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from efft.errors import InputError, unknown
from efft.report import costs, statistics
from efft.report.records import GROUP, Runs

MEASURED = ('report', 'test')
SPLITS = (*MEASURED, 'held_out')


class Settings(NamedTuple):
  """All measured settings.

  Attributes:
    rows: a row a (task, fraction, arm, setting): split, metric, sign (-1 where lower is better),
      validation (mean over seeds), n, mean, sd, worst, worst_seed (of the reported split), values
      ({seed: value}), validations ({seed: value}), records ({seed: index}), failed (runs that did
      not end well), scoreless (those of them that diverged or have no score), and the medians of
      all measured costs by their columns.
    failed: runs that did not end well, or have no score: task, fraction, arm, setting, seed,
      status, error.
    costs: what was measured.
    notes: in words.
  """

  rows: pd.DataFrame
  failed: pd.DataFrame
  costs: list[costs.Cost]
  notes: list[str]


def settings(runs: Runs, split: str = 'report') -> Settings:
  """Means over seeds of every setting.

  Args:
    runs: what was read.
    split: 'report', the half of the validation split that chose nothing, or 'test', or 'held_out':
      'test' for tasks all of whose runs have it, else 'report'. An arm without metrics.report is
      shown on the validation split itself, and a note says so.

  Raises:
    InputError: no run has ended well, or none has a score on the test split.
  """
  if split not in SPLITS:
    raise unknown('--split', 'split', split, SPLITS, 'see `efft report --help`')
  _refuse_nothing(runs, split)
  measured, notes, lines = costs.measured(runs.table), list(runs.notes), []
  failed = runs.failed[_FAILED].to_dict('records')
  shared, untested, key = {}, [], [*GROUP, 'setting']
  scores = _scores(runs)
  tested = scores.groupby('task')['has test'].all()
  for group, arm in scores.groupby(GROUP, sort=True):
    asked = ('test' if tested[group[0]] else 'report') if split == 'held_out' else split
    shown = _split_of(arm, asked)
    if shown is None:
      untested.append(f'{group[2]} on {group[0]}')
      continue
    if shown == 'validation':
      shared.setdefault(group[0], {})[group[2]] = None
    for setting, some in arm.groupby('setting', sort=True):
      scored, unscored = _scored(some, shown)
      failed += unscored
      if len(scored):
        lines.append(_line((*group, setting), shown, scored))
  frame = pd.DataFrame(lines)
  if frame.empty:
    raise InputError('--runs', 'no run with a score', 'finished runs', 'see their errors')
  columns = [cost.column for cost in measured]
  if columns:
    medians = runs.table.astype(dict.fromkeys(columns, np.float64)).groupby(key)[columns].median()
    frame = frame.merge(medians, left_on=key, right_index=True, how='left')
  lost = pd.DataFrame(failed, columns=_FAILED)
  scoreless = lost[lost['status'].isin(('diverged', 'undefined'))]
  for name, counted in (('failed', lost), ('scoreless', scoreless)):
    sizes = counted.groupby(key).size().to_dict()
    frame[name] = [sizes.get(tuple(row), 0) for row in frame[key].itertuples(index=False)]
  for task, arms in shared.items():
    notes.append(
      f'{task}: {_list(arms)} shown on the validation split: choosing and reporting share their '
      'data, so these scores are too good. config.task.halves=True keeps one half for reporting.'
    )
  if untested:
    notes.append(f'No score on the test split, and left out: {_list(untested)}.')
  return Settings(frame, lost.reset_index(drop=True), measured, notes)


def choose(found: Settings, intervals: bool = True) -> tuple[pd.DataFrame, list[str]]:
  """The setting of each (task, fraction, arm) with the best mean over seeds on validation.

  Settings with a run that diverged, or whose score does not exist (a correlation of constant
  predictions), are passed over where there are others: the mean of the seeds that survived flatters
  them. Of equal means the first by name is taken.

  Returns:
    The rows of `found` that were chosen, with `settings` (how many there were), low, high and
    interval (the 95 % interval of `mean` and its method); and notes, those of `found` first.
  """
  rows, notes = [], list(found.notes)
  for (task, _, arm), group in found.rows.groupby(GROUP, sort=True):
    scored = group['scoreless'] == 0
    candidates = group[scored] if scored.any() else group
    where = f'{arm} on {task}'
    if len(candidates) < len(group):
      gone = len(group) - len(candidates)
      why = 'a run diverged or has no score'
      notes.append(f'{where}: {gone} of {len(group)} settings were passed over: {why}.')
    if len(group) > 1 and group['n'].nunique() > 1:
      notes.append(f'{where}: settings were compared over different numbers of seeds.')
    rank = (candidates['sign'] * candidates['validation']).to_numpy()
    if len(candidates) > 1 and np.isnan(rank).all():
      fix = 'record metrics.validation'
      raise InputError(where, 'no metrics.validation', 'a score to choose settings by', fix)
    best = 0 if np.isnan(rank).all() else int(np.nanargmax(rank))
    rows.append({**candidates.iloc[best].to_dict(), 'settings': len(group)})
  frame = pd.DataFrame(rows)
  if intervals:
    found_intervals = [statistics.interval(list(v.values())) for v in frame['values']]
    for name, column in (('low', 'low'), ('high', 'high'), ('method', 'interval')):
      frame[column] = [getattr(each, name) for each in found_intervals]
  return frame, notes


def largest(rows: pd.DataFrame) -> pd.DataFrame:
  """Of each task the rows with its largest share of the training data."""
  return rows[rows['fraction'] == rows.groupby('task')['fraction'].transform('max')]


def baseline(rows: pd.DataFrame, name: str | None = None) -> str:
  """The arm that others are compared with: `name`, else 'full', else what trains the most.

  Raises:
    InputError: no arm of that name.
  """
  arms = sorted(set(rows['arm']))
  if name:
    if name not in arms:
      raise unknown('--baseline', 'arm', name, arms, 'name an arm of the records')
    return name
  if 'full' in arms:
    return 'full'
  column = costs.by_name('trained').column
  trained = rows.groupby('arm')[column].max() if column in rows else pd.Series(dtype=float)
  trained = trained.dropna()
  return min(trained[trained == trained.max()].index) if len(trained) else arms[0]


_FAILED = [*GROUP, 'setting', 'seed', 'status', 'error']


def _refuse_nothing(runs: Runs, split: str) -> None:
  if runs.table.empty:
    errors = sorted({str(error) for error in runs.failed['error'] if error})
    found = f'{len(runs.failed)} runs, all failed' + (f' ({errors[0]})' if errors else '')
    raise InputError('--runs', found, 'a run that ended well', 'mend and run again')
  if split == 'test' and not any(name.startswith('metrics.test.') for name in runs.table):
    fix = 'drop --split=test, or run on a task whose test split has labels'
    raise InputError('--split', "'test', which no run has scored", 'metrics.test', fix)


def _scores(runs: Runs) -> pd.DataFrame:
  """What selection looks at: for each split the run's metric, and whether it was scored at all.

  A null is a score, too: of predictions that have none.
  """
  table = runs.table
  frame = table[[*_FAILED, 'metric', 'higher_is_better']].copy()
  for split in ('validation', *MEASURED):
    prefix = f'metrics.{split}.'
    frame[f'has {split}'] = [
      bool((runs.records[index].get('metrics') or {}).get(split)) for index in table.index
    ]
    values = pd.Series(np.nan, table.index, np.float64)
    for metric, some in table.groupby('metric'):
      if prefix + metric in some:
        values[some.index] = some[prefix + metric].astype(np.float64)
    frame[split] = values
  return frame


def _split_of(group: pd.DataFrame, split: str) -> str | None:
  """The split on which an arm is shown: `split` where all of its runs have it."""
  if group[f'has {split}'].all():
    return split
  return 'validation' if split == 'report' else None


def _scored(group: pd.DataFrame, split: str) -> tuple[pd.DataFrame, list[dict]]:
  """(runs that have their metric, rows of `_FAILED` for those that do not)."""
  needed = [split] + ['validation'] * bool(group['has validation'].any())
  good = ~np.isnan(group[needed].to_numpy(np.float64)).any(axis=1)
  if good.all():
    return group, []
  lost = []
  for _, row in group[~good].iterrows():
    missing = next(name for name in needed if pd.isna(row[name]))
    error = f'no metrics.{missing}.{row["metric"]}: not measured, or not a number'
    lost.append({**row[_FAILED], 'status': 'undefined', 'error': error})
  return group[good], lost


def _line(key: tuple, split: str, runs: pd.DataFrame) -> dict:
  runs = runs.sort_values('seed')
  sign = 1 if runs['higher_is_better'].iloc[0] else -1
  seeds = [int(seed) for seed in runs['seed']]
  values, validation = runs[split].to_numpy(), runs['validation'].to_numpy()
  worst = int(np.argmin(sign * values))
  return {
    **dict(zip([*GROUP, 'setting'], key, strict=True)),
    'split': split,
    'metric': runs['metric'].iloc[0],
    'sign': sign,
    'validation': float(validation.mean()),
    'n': len(values),
    'mean': float(values.mean()),
    'sd': float(values.std(ddof=1)) if len(values) > 1 else math.nan,
    'worst': float(values[worst]),
    'worst_seed': seeds[worst],
    'values': dict(zip(seeds, values.tolist(), strict=True)),
    'validations': dict(zip(seeds, validation.tolist(), strict=True)),
    'records': dict(zip(seeds, map(int, runs.index), strict=True)),
  }


def _list(names) -> str:
  names = list(names)
  return (
    ', '.join(names) if len(names) <= 6 else f'{", ".join(names[:5])} and {len(names) - 5} more'
  )
