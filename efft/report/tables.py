"""Tables of a report: as Markdown, as csv, and as what the page sorts and filters."""

import csv
import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from efft.report import costs
from efft.report.selection import Settings


class Column(NamedTuple):
  """`key` of the rows is what a column is sorted by; `text` makes what is read from the row."""

  key: str
  title: str
  text: Callable[[Any], str]
  numeric: bool = True


class Table(NamedTuple):
  """Rows under a heading; `name` is a slug, `about` a line or two of explanation."""

  name: str
  title: str
  about: str
  columns: Sequence[Column]
  rows: list[dict]


def words(key: str, title: str) -> Column:
  return Column(key, title, lambda row: '' if missing(row[key]) else str(row[key]), numeric=False)


def numbers(key: str, title: str, text: Callable[[float], str], scale: float = 1.0) -> Column:
  return Column(key, title, lambda row: '–' if missing(row[key]) else text(scale * row[key]))


def missing(value) -> bool:
  return value is None or (isinstance(value, float) and math.isnan(value))


def score(x: float) -> str:
  return f'{x:.4f}'


def signed(x: float) -> str:
  return f'{x:+.4f}'


def count(x: float) -> str:
  return f'{x:,.0f}'


def amount(x: float) -> str:
  """Three digits; whole numbers from 1000 on."""
  if abs(x) >= 999.5:
    return f'{x:,.0f}' if abs(x) < 1e12 else f'{x:.3g}'
  digits = 2 if x == 0 else max(0, 2 - math.floor(math.log10(abs(x))))
  return f'{x:.{min(digits, 6)}f}'


def probability(p: float) -> str:
  return f'{p:.3f}' if p >= 0.001 else f'{p:.1e}'


def scores(found: Settings, rows: pd.DataFrame) -> Table:
  """Mean, spread, interval and worst seed of every arm."""
  head = [words('task', 'task')] if rows['task'].nunique() > 1 else []
  if (rows['fraction'] < 1).any():
    head.append(numbers('fraction', 'share of data', lambda x: f'{x:g}'))
  metrics = sorted(set(rows['metric']))
  if len(metrics) > 1:
    head.append(words('metric', 'metric'))
  extra = [words('split', 'split')] if rows['split'].nunique() > 1 else []
  title = metrics[0] if len(metrics) == 1 else 'mean'
  columns = [
    *head,
    words('arm', 'arm'),
    numbers('mean', title, score),
    numbers('sd', 'sd', score),
    Column('low', '95 % interval', _interval),
    numbers('n', 'seeds', count),
    Column('worst', 'worst seed', lambda row: f'{score(row["worst"])} ({row["worst_seed"]})'),
    numbers('failed', 'failed', count),
    *extra,
    words('setting', 'setting'),
    numbers('settings', 'settings tried', count),
  ]
  splits = ' and '.join(sorted(set(rows['split'])))
  about = (
    f'Scored on the {splits} split; the setting of each arm was chosen on '
    'validation. Intervals are bootstrapped over seeds, from three seeds on, and of fewer than ten '
    "as wide as Student's t at least. A failed run is in no mean."
  )
  return Table('scores', 'Scores', about, columns, _ordered(rows))


def cost_table(found: Settings, rows: pd.DataFrame) -> Table:
  """What every arm costs: medians over seeds."""
  head = [words('task', 'task')] if rows['task'].nunique() > 1 else []
  columns = [
    *head,
    words('arm', 'arm'),
    numbers('mean', 'mean score', score),
    *(_cost_column(cost) for cost in found.costs),
  ]
  about = 'Medians over seeds of the chosen setting.'
  return Table('costs', 'Costs', about, columns, _ordered(rows))


def compared(rows: pd.DataFrame, baseline: str) -> Table:
  """Each arm against the baseline, of `statistics.against_baseline`."""
  head = [words('task', 'task')] if rows['task'].nunique() > 1 else []
  if (rows['fraction'] < 1).any():
    head.append(numbers('fraction', 'share of data', lambda x: f'{x:g}'))
  columns = [
    *head,
    words('arm', 'arm'),
    numbers('difference', f'difference to {baseline}', signed),
    Column('low', '95 % interval', lambda row: _interval(row, signed)),
    numbers('n', 'seeds in common', count),
    *_tests(),
  ]
  n = int(rows['n'].max()) if len(rows) else 0
  about = (
    f'Paired over the seeds in common. With {n} seeds the permutation test (all signs of the '
    f'differences) cannot go below {2.0 ** (1 - n):.3g}. Holm: corrected for all arms of a task.'
  )
  return Table('compared', f'Against {baseline}', about, columns, rows.to_dict('records'))


def over_tasks(rows: pd.DataFrame, baseline: str) -> Table:
  """Each arm against the baseline over tasks, of `statistics.over_tasks`."""
  columns = [
    words('arm', 'arm'),
    numbers('difference', f'mean difference to {baseline}', signed),
    numbers('tasks', 'tasks', count),
    numbers('better', 'better', count),
    numbers('worse', 'worse', count),
    *_tests(),
  ]
  about = 'A task counts once, with its mean over seeds; more is better. Metrics differ by task.'
  title = f'Against {baseline}, over tasks'
  return Table('over_tasks', title, about, columns, rows.to_dict('records'))


def fronts(points: list[dict], axes: list[costs.Cost]) -> Table:
  """Where each arm stands for each cost; `points` as `plots.points` gives them."""
  rows: dict[tuple, dict] = {}
  for point in points:
    row = rows.setdefault((point['task'], point['arm']), {'task': point['task'], **point})
    row[f'status_{point["axis"]}'] = point['status']
  head = [words('task', 'task')] if len({task for task, _ in rows}) > 1 else []
  columns = [*head, words('arm', 'arm'), numbers('y', 'mean score', score)]
  for axis in axes:
    columns.append(words(f'status_{axis.name}', axis.label.partition(',')[0]))
    for row in rows.values():
      row.setdefault(columns[-1].key, '')
  about = (
    'front: nothing scores as well for less. within: something does, but nothing that costs no '
    'more has an interval wholly above. dominated: the rest.'
  )
  return Table('fronts', 'Fronts', about, columns, list(rows.values()))


def latency(frame: pd.DataFrame, rows: pd.DataFrame) -> Table:
  """Measured shapes of the chosen settings: medians over seeds."""
  chosen = {index for values in rows['records'] for index in values.values()}
  frame = frame[frame['record'].isin(chosen)]
  names = ['task', 'arm', 'batch', 'length', 'precision', 'merged']
  measured = ['p50_ms', 'p95_ms', 'p99_ms', 'examples_per_second']
  numeric = frame.astype(dict.fromkeys(measured, 'float64'))
  medians = numeric.groupby(names, dropna=False)[measured].median().reset_index()
  medians['merged'] = ['merged' if merged else 'beside' for merged in medians['merged']]
  columns = [
    *([words('task', 'task')] if medians['task'].nunique() > 1 else []),
    words('arm', 'arm'),
    numbers('batch', 'batch', count),
    numbers('length', 'tokens', count),
    words('precision', 'precision'),
    *([words('merged', 'deltas')] if frame['merged'].any() else []),
    *(numbers(name, f'{name.partition("_")[0]}, ms', amount) for name in measured[:3]),
    numbers('examples_per_second', 'examples a second', amount),
  ]
  about = 'Medians over seeds of the chosen setting; one call on a batch of that many tokens each.'
  return Table('latency', 'Latency', about, columns, medians.to_dict('records'))


def failed(frame: pd.DataFrame) -> Table:
  """Runs that did not end well."""
  names = ('task', 'arm', 'setting', 'seed', 'status', 'error')
  columns = [numbers(n, n, count) if n == 'seed' else words(n, n) for n in names]
  about = 'In no mean above.'
  return Table('failed', 'Failed runs', about, columns, frame.to_dict('records'))


def changed(frame: pd.DataFrame) -> Table:
  """What `changes.changes` found."""
  shares = [numbers('fraction', 'share of data', lambda x: f'{x:g}')]
  columns = [
    words('task', 'task'),
    *(shares if (frame['fraction'] < 1).any() else []),
    words('arm', 'arm'),
    words('change', 'change'),
    numbers('old', 'before', score),
    numbers('new', 'now', score),
    numbers('difference', 'difference', signed),
    Column('low', '95 % interval', lambda row: _interval(row, signed)),
    words('how', 'how'),
    words('note', 'note'),
  ]
  about = (
    'Paired over seeds where both sides have at least three in common, else of independent means.'
  )
  return Table('changes', 'What changed', about, columns, frame.to_dict('records'))


def markdown(table: Table) -> str:
  """A heading, what it is about, and a pipe table."""
  lines = [f'## {cell(table.title)}', '', cell(table.about), '']
  lines.append('| ' + ' | '.join(cell(column.title) for column in table.columns) + ' |')
  lines.append('|' + '|'.join('--:' if column.numeric else '---' for column in table.columns) + '|')
  for row in table.rows:
    lines.append('| ' + ' | '.join(cell(column.text(row)) for column in table.columns) + ' |')
  return '\n'.join(lines) + '\n'


def cell(text: str) -> str:
  """Text that Markdown shows as it is, on one line."""
  text = html.escape(' '.join(str(text).split()), quote=False)
  for sign in '\\|`*_[]':
    text = text.replace(sign, '\\' + sign)
  return text


def to_csv(frame: pd.DataFrame) -> str:
  """A frame in full precision; None and NaN are empty."""
  out = io.StringIO()
  writer = csv.writer(out, lineterminator='\n')
  writer.writerow(frame.columns)
  for row in frame.itertuples(index=False):
    writer.writerow(['' if _absent(value) else _plain(value) for value in row])
  return out.getvalue()


def summary_csv(rows: pd.DataFrame) -> str:
  """The chosen settings with all of their numbers, the value of each seed included."""
  frame = rows.drop(columns=['values', 'validations', 'records'])
  frame.insert(
    frame.columns.get_loc('mean') + 1,
    'values',
    [' '.join(f'{seed}:{value!r}' for seed, value in v.items()) for v in rows['values']],
  )
  return to_csv(frame)


def _ordered(rows: pd.DataFrame) -> list[dict]:
  """By task, the largest share of data first, and of each the best."""
  rows = rows.assign(share=-rows['fraction'], rank=-rows['sign'] * rows['mean'])
  return rows.sort_values(['task', 'share', 'rank', 'arm']).to_dict('records')


def _cost_column(cost: costs.Cost) -> Column:
  text = count if cost.name == 'trained' else amount
  return numbers(cost.column, cost.label, text, cost.scale)


def _tests() -> list[Column]:
  return [
    numbers('p_t', 'p, t test', probability),
    numbers('p_t_holm', 'Holm', probability),
    numbers('p_flip', 'p, permutations', probability),
    numbers('p_flip_holm', 'Holm', probability),
  ]


def _interval(row: dict, text: Callable[[float], str] = score) -> str:
  if missing(row['low']):
    return '–'
  return f'{text(row["low"])} to {text(row["high"])}'


def _absent(value) -> bool:
  return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _plain(value):
  if hasattr(value, 'item'):
    value = value.item()
  if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
    return int(value)
  return value
