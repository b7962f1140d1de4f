"""Plots as Vega-Lite specifications (plain dicts), and their pictures by vl-convert."""

import json
import math

import pandas as pd

from efft.errors import EnvironmentProblem
from efft.report import costs, labels, pareto, selection
from efft.report.tables import amount, missing, score

VEGA_LITE = '6'
STATUS = {
  pareto.FRONT: 'front',
  pareto.WITHIN: 'within an interval of it',
  pareto.DOMINATED: 'dominated',
}
MOST_CURVES = 10
# Of the Okabe-Ito palette, which colour-blind readers tell apart.
LIGHT = {
  'text': '#1f2933', 'faint': '#52606d', 'grid': '#e4e7eb', 'paper': '#ffffff',
  'colours': ['#0072b2', '#cc7000', '#9aa5b1'],
}  # fmt: skip
DARK = {
  'text': '#e4e7eb', 'faint': '#9aa5b1', 'grid': '#323f4b', 'paper': '#161b22',
  'colours': ['#56b4e9', '#e69f00', '#8b98a5'],
}  # fmt: skip


def points(rows: pd.DataFrame, axes: list[costs.Cost]) -> list[dict]:
  """A point for each arm and each cost that it was measured in.

  Args:
    rows: of `selection.choose`, of which the largest fraction of each task is taken.
    axes: of `costs.measured`.

  Returns:
    axis, task, arm, x (in the units of the axis' label), y, low, high (y itself without an
    interval), status, label (the words of the status), dx and dy (of `labels.placed`); score,
    cost, seeds and setting are text.
  """
  found = []
  for _, group in selection.largest(rows).groupby('task', sort=True):
    for axis in axes:
      some = group[group[axis.column].notna()]
      if some.empty:
        continue  # of this task nobody has measured it
      panel = []
      sign = some['sign'].to_numpy()
      low, high = some['low'].fillna(some['mean']), some['high'].fillna(some['mean'])
      lower, upper = (low, high) if (sign > 0).all() else (-high, -low)
      status = pareto.front(some[axis.column], sign * some['mean'], lower, upper)
      for standing, (_, row) in zip(status, some.iterrows(), strict=True):
        panel.append(_point(row, axis, standing))
      found += labels.placed(panel, scale([point['x'] for point in panel]))
  return found


def _point(row: pd.Series, axis: costs.Cost, status: str) -> dict:
  bare = missing(row['low'])
  text = score(row['mean'])
  if not bare:
    text += f' ({score(row["low"])} to {score(row["high"])})'
  return {
    'axis': axis.name,
    'task': row['task'],
    'arm': row['arm'],
    'x': row[axis.column] * axis.scale,
    'y': row['mean'],
    'low': row['mean'] if bare else row['low'],
    'high': row['mean'] if bare else row['high'],
    'status': status,
    'label': STATUS[status],
    'score': text,
    'cost': amount(row[axis.column] * axis.scale),
    'seeds': int(row['n']),
    'setting': row['setting'] or '–',
  }


def ticks(values: list[float]) -> list[float]:
  """Round numbers of a logarithmic axis: powers of ten, with 2 and 5 between if they are few."""
  positive = [x for x in values if x > 0]
  first, last = (math.floor(math.log10(f(positive))) for f in (min, max))
  steps = (1, 2, 5) if last - first < 3 else (1,)
  found = [step * 10.0**power for power in range(first, last + 2) for step in steps]
  return [0.0] * (len(positive) < len(values)) + found


def scale(values: list[float]) -> str:
  """How an axis is spaced: 'log' where the values span a factor of 20, 'symlog' with zeros."""
  positive = [x for x in values if x > 0]
  if not positive or max(positive) < 20 * min(positive):
    return 'linear'
  return 'log' if len(positive) == len(values) else 'symlog'


def against_cost(some: list[dict], axis: costs.Cost, metrics: dict[str, str]) -> dict:
  """Score against a cost, a panel a task: the front as a line, its arms named, 95 % error bars.

  Args:
    some: the points of one axis.
    axis: what x is.
    metrics: {task: metric}.
  """
  tasks = sorted({point['task'] for point in some})
  x = [point['x'] for point in some]
  spaced = scale(x)
  marks = None if spaced == 'linear' else ticks(x)
  title = metrics[tasks[0]] if len({metrics[t] for t in tasks}) == 1 else 'score'
  values = [{**point, 'panel': f'{point["task"]}, {metrics[point["task"]]}'} for point in some]
  layer = layers(axis.label, title, spaced, LIGHT['paper'], marks)
  return faceted(layer, values, f'{title} against {axis.label}')


def layers(
  x_title: str, y_title: str, spaced: str, paper: str, marks: list[float] | None = None
) -> list[dict]:
  """Error bars, front, points and names; of the fields of `points`."""
  # Room for the names, which stand to the right of their points.
  domain = {'type': spaced, 'nice': spaced == 'linear', 'padding': labels.PADDING}
  domain |= {'zero': False} if spaced == 'linear' else {}
  x = {'field': 'x', 'type': 'quantitative', 'title': x_title, 'scale': domain}
  if spaced != 'linear':
    x['axis'] = {'format': '~s', 'labelOverlap': True, 'values': marks}
  y = {'field': 'y', 'type': 'quantitative', 'title': y_title, 'scale': {'zero': False}}
  words = list(STATUS.values())
  look = {
    'field': 'label', 'type': 'nominal', 'title': None,
    'legend': {'orient': 'bottom', 'symbolOpacity': 1, 'direction': 'horizontal'},
  }  # fmt: skip
  colour = {**look, 'scale': {'domain': words, 'range': 'category'}}
  shape = {**look, 'scale': {'domain': words, 'range': ['circle', 'diamond', 'square']}}
  front = {'filter': f"datum.status === '{pareto.FRONT}'"}
  told = {
    'arm': 'arm', 'score': y_title, 'cost': x_title, 'seeds': 'seeds', 'setting': 'setting',
    'label': 'standing',
  }  # fmt: skip
  shown = [{'field': field, 'title': title} for field, title in told.items()]

  return [
    {
      'mark': {'type': 'rule', 'strokeWidth': 1.5, 'strokeOpacity': 0.55},
      'encoding': {
        'x': x, 'y': {**y, 'field': 'low'}, 'y2': {'field': 'high'}, 'color': colour,
      },
    },
    {
      'transform': [front],
      'mark': {
        'type': 'line', 'interpolate': 'step-after', 'strokeWidth': 1.5, 'strokeOpacity': 0.5,
      },
      'encoding': {'x': x, 'y': y, 'color': {'datum': STATUS[pareto.FRONT]}},
    },
    {
      'mark': {
        'type': 'point', 'filled': True, 'size': 75, 'opacity': 1, 'stroke': paper,
        'strokeWidth': 0.7,
      },
      'encoding': {'x': x, 'y': y, 'color': colour, 'shape': shape, 'tooltip': shown},
    },
    {
      'transform': [{'filter': 'datum.dx !== 0'}],
      'mark': {
        'type': 'text', 'baseline': 'middle', 'fontSize': labels.SIZE, 'limit': labels.LIMIT,
        'align': {'expr': "datum.dx > 0 ? 'left' : 'right'"}, 'dx': {'expr': 'datum.dx'},
        'dy': {'expr': 'datum.dy'},
      },
      'encoding': {'x': x, 'y': y, 'text': {'field': 'arm', 'type': 'nominal'}},
    },
  ]  # fmt: skip


def data_curves(rows: pd.DataFrame) -> dict | None:
  """Score against the share of the training data, a line an arm; None where only one was run.

  Of more than ten arms the ten best at the largest share are drawn.
  """
  several = rows.groupby(['task', 'arm'])['fraction'].transform('nunique') > 1
  rows = rows[several]
  if rows.empty:
    return None
  whole = selection.largest(rows)
  rank = (whole['sign'] * whole['mean']).groupby(whole['task']).rank(ascending=False)
  best = rank.groupby(whole['arm']).mean().sort_values(kind='stable').index[:MOST_CURVES]
  rows = rows[rows['arm'].isin(best)]
  values = [
    {
      'task': row['task'], 'panel': f'{row["task"]}, {row["metric"]}', 'arm': row['arm'],
      'x': 100 * row['fraction'], 'y': row['mean'],
      'low': row['mean'] if missing(row['low']) else row['low'],
      'high': row['mean'] if missing(row['high']) else row['high'],
    }
    for _, row in rows.iterrows()
  ]  # fmt: skip
  shares = sorted({value['x'] for value in values})
  spaced = 'log' if max(shares) > 5 * min(shares) else 'linear'
  x = {
    'field': 'x', 'type': 'quantitative', 'title': 'share of the training data, %',
    'scale': {'type': spaced, 'domain': [min(shares), max(shares)], 'nice': False, 'padding': 14},
    'axis': {'values': shares, 'format': '~r', 'labelFlush': False},
  }  # fmt: skip
  y = {'field': 'y', 'type': 'quantitative', 'title': 'score', 'scale': {'zero': False}}
  arms = {'field': 'arm', 'type': 'nominal', 'title': None, 'legend': {'orient': 'right'}}
  colour = {**arms, 'scale': {'scheme': 'tableau10'}}
  layer = [
    {
      'mark': {'type': 'rule', 'strokeOpacity': 0.5, 'strokeWidth': 1.5},
      'encoding': {'x': x, 'y': {**y, 'field': 'low'}, 'y2': {'field': 'high'}, 'color': colour},
    },
    {
      'mark': {'type': 'line', 'point': {'size': 50}, 'strokeWidth': 1.8},
      'encoding': {'x': x, 'y': y, 'color': colour},
    },
  ]
  return faceted(layer, values, 'score against the share of the training data')


def config(theme: dict) -> dict:
  """Vega-Lite's `config` in the colours of LIGHT or DARK."""
  faint, grid, text = theme['faint'], theme['grid'], theme['text']
  return {
    'background': theme['paper'],
    'font': 'DejaVu Sans, Liberation Sans, Arial, sans-serif',
    'axis': {
      'labelColor': faint, 'titleColor': text, 'gridColor': grid, 'domainColor': faint,
      'tickColor': faint, 'titleFontWeight': 'normal', 'titlePadding': 8, 'labelFontSize': 11,
      'titleFontSize': 12,
    },
    'legend': {'labelColor': text, 'titleColor': text, 'labelFontSize': 12, 'labelLimit': 240},
    'title': {'color': text, 'fontSize': 14, 'fontWeight': 600, 'anchor': 'start', 'offset': 12},
    'header': {'labelColor': text, 'labelFontSize': 13, 'labelFontWeight': 600},
    'text': {'color': text},
    'view': {'stroke': None},
    'range': {'category': theme['colours']},
  }  # fmt: skip


def pictures(spec: dict) -> tuple[bytes, str]:
  """(PNG, SVG) of a specification; the same one gives the same bytes. No network is used."""
  convert = vl_convert()
  text = json.dumps(spec)
  png = convert.vegalite_to_png(text, scale=2, allowed_base_urls=[])
  return png, convert.vegalite_to_svg(text, allowed_base_urls=[])


def vl_convert():
  """The module; EnvironmentProblem where it is not installed."""
  try:
    import vl_convert as module
  except ImportError:
    fix = "in the checkout of efft, pip install -e '.[report]'"
    raise EnvironmentProblem(f'plots need vl-convert-python; {fix}') from None
  return module


def faceted(layer: list[dict], values: list[dict], title: str) -> dict:
  """One chart, or one for each panel, each with its own y."""
  panels = sorted({value['panel'] for value in values})
  spec = {
    '$schema': f'https://vega.github.io/schema/vega-lite/v{VEGA_LITE}.json',
    'title': title[0].upper() + title[1:],
    'config': config(LIGHT),
    'padding': 14,
  }
  spec['data'] = {'values': values}
  if len(panels) == 1:
    return spec | {'width': 560, 'height': 360, 'layer': layer}
  return spec | {
    'facet': {'field': 'panel', 'type': 'nominal', 'title': None},
    'columns': 2,
    'spec': {'width': 380, 'height': 260, 'layer': layer},
    'resolve': {'scale': {'y': 'independent'}},
    'spacing': 30,
  }
