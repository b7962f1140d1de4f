"""What changed between two sets of runs, arm by arm."""

import math

import pandas as pd

from efft.report import statistics
from efft.report.records import GROUP

NEW, LOST, CHANGED, SAME = 'new', 'lost', 'changed', 'no difference shown'


def changes(new: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
  """The chosen rows of both sides, joined.

  Args:
    new, old: of `selection.choose`.

  Returns:
    task, fraction, arm, change, old, new (means), difference (new - old), low, high (its 95 %
    interval), how (which interval) and note (what else differs between the two). `change` is
    'new' or 'lost' where one side has no such arm, 'changed' where the interval excludes 0, ''
    where nothing can be said, else 'no difference shown'.
  """
  before = {tuple(row[name] for name in GROUP): row for _, row in old.iterrows()}
  after = {tuple(row[name] for name in GROUP): row for _, row in new.iterrows()}
  lines = []
  for key in sorted(before.keys() | after.keys()):
    a, b = before.get(key), after.get(key)
    if a is None or b is None:
      means = [math.nan if row is None else row['mean'] for row in (a, b)]
      change = LOST if b is None else NEW
      lines.append([*key, change, *means, math.nan, math.nan, math.nan, '', ''])
      continue
    if (a['metric'], a['split']) != (b['metric'], b['split']):
      numbers = [a['mean'], b['mean'], math.nan, math.nan, math.nan]
      lines.append([*key, '', *numbers, 'not comparable', _note(a, b)])
      continue
    found, how = _interval(b['values'], a['values'])
    difference = b['mean'] - a['mean']
    change = ''
    if found.method:
      change = SAME if found.low <= 0 <= found.high else CHANGED
    if how.startswith('paired'):
      difference = float(statistics.paired(b['values'], a['values']).mean())
    numbers = [a['mean'], b['mean'], difference, found.low, found.high]
    lines.append([*key, change, *numbers, how, _note(a, b)])
  names = [*GROUP, 'change', 'old', 'new', 'difference', 'low', 'high', 'how', 'note']
  return pd.DataFrame(lines, columns=names)


def _interval(new: dict, old: dict) -> tuple[statistics.Interval, str]:
  d = statistics.paired(new, old)
  if len(d) >= statistics.FEWEST:
    return statistics.interval(d), f'paired, {len(d)} seeds'
  found = statistics.difference_interval(list(new.values()), list(old.values()))
  if found.method:
    return found, f'{len(new)} and {len(old)} seeds'
  return found, f'fewer than {statistics.FEWEST} seeds'


def _note(old: pd.Series, new: pd.Series) -> str:
  notes = []
  for name in ('metric', 'split', 'setting'):
    if old[name] != new[name]:
      notes.append(f'{name}: {old[name] or "-"} before, {new[name] or "-"} now')
  if new['failed'] != old['failed']:
    notes.append(f'failed runs: {old["failed"]} before, {new["failed"]} now')
  return '; '.join(notes)
