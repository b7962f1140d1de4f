"""The report as one HTML file that needs no network: tables to sort and filter, and a chart.

Its JavaScript is `page.js` and, for the chart, Vega with Vega-Lite and Vega-Embed out of
vl-convert's wheel. A content security policy forbids every request. All text that comes from
records is escaped.
"""

import functools
import html
import json
import re
from pathlib import Path

from efft.report import plots
from efft.report.costs import Cost
from efft.report.tables import Column, Table, missing

FOLDER = Path(__file__).parent
POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
NOTICE = (
  'Vega, Vega-Lite and Vega-Embed: Copyright University of Washington Interactive Data Lab and '
  'contributors, BSD 3-Clause License (https://github.com/vega).'
)


def page(
  title: str,
  about: str,
  notes: list[str],
  tables: list[Table],
  points: list[dict],
  axes: list[Cost],
  metrics: dict[str, str],
  extra: dict[str, dict] | None = None,
) -> str:
  """The whole file.

  Args:
    title, about: heading and the line below it.
    notes: what a reader should know, a paragraph each.
    tables: shown in this order.
    points: of `plots.points`, for the interactive chart.
    axes: the costs that the chart offers.
    metrics: {task: metric}.
    extra: {heading: Vega-Lite specification} of further charts, below the interactive one.
  """
  extra = extra or {}
  data = {
    'points': points,
    'axes': [_axis(axis, [p['x'] for p in points if p['axis'] == axis.name]) for axis in axes],
    'metrics': metrics,
    'layers': plots.layers('X', 'Y', 'linear', 'PAPER'),
    'config': {'light': plots.config(plots.LIGHT), 'dark': plots.config(plots.DARK)},
    'extra': [{k: v for k, v in spec.items() if k != 'config'} for spec in extra.values()],
  }
  sections = [_notes(notes), _chart(points, axes, metrics)]
  sections += [_extra(number, heading) for number, heading in enumerate(extra)]
  sections += [_table(table) for table in tables if table.rows]
  links = ''.join(
    f'<a href="#{table.name}">{_text(table.title)}</a>' for table in tables if table.rows
  )
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{_text(title)}</title>
<style>
{_file('page.css')}</style>
</head>
<body>
<header>
<h1>{_text(title)}</h1>
<p>{_text(about)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{''.join(sections)}</main>
<footer><p>Made by efft. {_text(NOTICE)}</p></footer>
<script type="application/json" id="data">{_json(data)}</script>
<script>{_library() if points or extra else ''}</script>
<script>
{_file('page.js')}</script>
</body>
</html>
"""


def _axis(axis: Cost, values: list[float]) -> dict:
  spaced = plots.scale(values)
  ticks = None if spaced == 'linear' else plots.ticks(values)
  return {'name': axis.name, 'label': axis.label, 'scale': spaced, 'ticks': ticks}


def _notes(notes: list[str]) -> str:
  if not notes:
    return ''
  items = ''.join(f'<li>{_text(note)}</li>' for note in notes)
  return f'<section class="notes" aria-label="Notes"><h2>Notes</h2><ul>{items}</ul></section>\n'


def _chart(points: list[dict], axes: list[Cost], metrics: dict[str, str]) -> str:
  if not points:
    return ''
  measured = {point['axis'] for point in points}
  offered = ''.join(
    f'<option value="{_text(axis.name)}">{_text(axis.label)}</option>'
    for axis in axes
    if axis.name in measured
  )
  tasks = sorted({point['task'] for point in points})
  choice = ''.join(
    f'<option value="{_text(t)}">{_text(t)}, {_text(metrics[t])}</option>' for t in tasks
  )
  hidden = ' hidden' if len(tasks) == 1 else ''
  return f"""<section id="front">
<h2>Score against cost</h2>
<p>The line is the front: nothing scores as well for less. Bars are 95 % intervals over seeds. Drag
to move, scroll with Shift to zoom, double-click to go back; click a standing to see it alone.</p>
<div class="controls">
<label{hidden}>Task <select id="task">{choice}</select></label>
<label>Cost <select id="axis">{offered}</select></label>
<label><input type="checkbox" id="names"> name every arm</label>
</div>
<div class="chart" id="chart" role="img" aria-label="Score of each arm against its cost"></div>
<noscript><p>The chart needs JavaScript; the tables below do not.</p></noscript>
</section>
"""


def _extra(number: int, heading: str) -> str:
  return f"""<section>
<h2>{_text(heading)}</h2>
<div class="chart extra" id="extra-{number}" role="img" aria-label="{_text(heading)}"></div>
</section>
"""


def _table(table: Table) -> str:
  head = ''.join(_header(column) for column in table.columns)
  body = ''.join(
    '<tr>' + ''.join(_cell(column, row) for column in table.columns) + '</tr>\n'
    for row in table.rows
  )
  name = _text(table.name)
  return f"""<section id="{name}">
<h2>{_text(table.title)}</h2>
<p>{_text(table.about)}</p>
<div class="controls">
<label>Filter <input type="search" data-table="{name}-table" placeholder="words of a row"></label>
<span class="found" role="status" id="{name}-table-found">{len(table.rows)} rows</span>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="{_text(table.title)}">
<table id="{name}-table">
<thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
</section>
"""


def _header(column: Column) -> str:
  kind = ' class="number"' if column.numeric else ''
  return (
    f'<th scope="col" aria-sort="none"{kind}>'
    f'<button type="button">{_text(column.title)}<span aria-hidden="true"></span></button></th>'
  )


def _cell(column: Column, row: dict) -> str:
  """A cell, and as data-value what it is sorted by: numbers in full."""
  value = row[column.key]
  shown = _text(column.text(row))
  if column.numeric:
    exact = '' if missing(value) else repr(float(value))
    return f'<td class="number" data-value="{exact}">{shown}</td>'
  if column.key.startswith('status_') and value:
    shown = f'<span class="status {_text(value)}">{shown}</span>'
  return f'<td>{shown}</td>'


def _text(value) -> str:
  return html.escape(str(value), quote=True)


def _json(value) -> str:
  """JSON that can stand inside a script element: no '<', so no end of it."""
  text = json.dumps(value, ensure_ascii=False, allow_nan=False)
  for sign in '<>&\u2028\u2029':
    text = text.replace(sign, f'\\u{ord(sign):04x}')
  return text


@functools.cache
def _library() -> str:
  """Vega for the page; its strings that hold '</script' are written so that they do not end it."""
  code = plots.vl_convert().javascript_bundle()
  return re.sub(r'<(?=/script|!--)', r'\\x3c', code, flags=re.IGNORECASE)


def _file(name: str) -> str:
  return (FOLDER / name).read_text(encoding='utf-8')
