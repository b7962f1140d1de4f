"""The best measured configuration under constraints, and what each constraint costs."""

import math
import re
import shlex
from os import PathLike
from pathlib import Path

import pandas as pd

from efft import files
from efft.errors import InputError, unknown
from efft.report import constraints, costs, records, selection, statistics
from efft.report.constraints import Constraint, excess
from efft.report.publish import refuse_other
from efft.report.tables import amount, cell, missing, score, signed

SHOWN = 3  # runners-up
_OURS = ('config.json', 'recommendation.json', 'recommendation.md')


def recommend(
  runs,
  *,
  task: str | None = None,
  output: str | PathLike | None = None,
  split: str = 'report',
  max_latency_ms: float | None = None,
  latency_batch: int | None = None,
  latency_length: int | None = None,
  max_size_mb: float | None = None,
  size: str = 'whole',
  max_memory_mb: float | None = None,
  memory: str = 'step',
  max_trained: float | None = None,
  max_train_seconds: float | None = None,
  min_metric: float | None = None,
  min_relative_metric: float | None = None,
) -> dict:
  """Chooses among what was measured.

  Settings that break a limit are put aside; of the others each arm's setting and then the arm are
  chosen by the mean over seeds on validation, so that the score shown, on the other half or the
  test split, is not the maximum of what it was chosen by. Limits on the score are held against the
  score shown. Costs are medians over seeds. Of equal means the one that trains less is taken.

  Args:
    runs: as `records.read` takes them.
    task: of the records; needed where they hold several.
    output: folder to make, with the config, and the recommendation as Markdown and JSON.
    split: 'report', 'test' or 'held_out' (`selection.settings`).
    max_latency_ms: median time of a call on latency_batch examples of latency_length tokens each;
      without these, one example of 128 tokens, or the nearest that was measured.
    max_size_mb: of the whole model on disk, or with size='bundle' of what is beside its base.
    max_memory_mb: of a training step, or with memory= of inference, or the process' peak.
    max_trained, max_train_seconds: trained parameters, seconds of training.
    min_metric: score, as shown. For a metric of which less is better, the most.
    min_relative_metric: share of the best arm's score as shown: 0.97.

  Returns:
    'task', 'metric', 'constraints', 'fits' (whether anything does), 'choice' (arm, setting, mean,
    low, high, n, costs, config), 'words' (sentences), 'runners_up', 'prices' (what each constraint
    costs), 'violated' (where nothing fits), 'commands', 'notes'.

  Raises:
    InputError: no such task or shape, a limit on what no run has measured, a folder in use.
  """
  found = records.read(runs)
  found, task = _of_task(found, task)
  settings = selection.settings(found, split)
  rows = selection.largest(settings.rows)
  rows = rows.assign(**{c.column: rows.get(c.column, math.nan) for c in costs.COSTS})
  limits = constraints.limits(
    rows,
    {'max_latency_ms': max_latency_ms, 'max_size_mb': max_size_mb, 'max_memory_mb': max_memory_mb,
     'max_trained': max_trained, 'max_train_seconds': max_train_seconds, 'min_metric': min_metric,
     'min_relative_metric': min_relative_metric},
    constraints.shape(found.table, latency_batch, latency_length), size, memory,
  )  # fmt: skip
  if output is not None:
    refuse_other(Path(output), _OURS, 'a recommendation')
  candidates = settings._replace(rows=rows)
  best, notes = _pick(candidates, limits)
  fits = best is not None
  choice = _with_interval(best.iloc[0] if fits else _nearest(rows, limits))
  result = {
    'task': task,
    'metric': choice['metric'],
    'split': choice['split'],
    'constraints': [limit.words(choice['sign']) for limit in limits],
    'fits': fits,
    'choice': _described(choice, settings.costs),
    'violated': [] if fits else constraints.violations(choice, limits),
    'runners_up': [_beside(row, choice, limits) for _, row in best.iloc[1:].iterrows()][:SHOWN]
    if fits
    else [],
    'prices': _prices(candidates, limits, choice) if fits else [],
    'notes': [*notes, *constraints.unmeasured(rows, limits)],
  }
  record, folder = _representative(choice, found)
  result['commands'] = _commands(choice, record, folder, output)
  result['words'] = _words(result, choice, best)
  if output is not None:
    if not record.get('config'):
      fix = 'run it again with this efft'
      raise InputError(f'records of {choice["arm"]}', 'no config', 'a resolved config', fix)
    with files.atomic_folder(output) as made:
      files.write_json(made / 'config.json', record['config'])
      files.write_json(made / 'recommendation.json', result)
      files.atomic_write(made / 'recommendation.md', _markdown(result))
  return result


def lines(result: dict) -> list[str]:
  """What `recommend` found, as text for a terminal."""
  text = [f'under {limit}' for limit in result['constraints']]
  text += ['', *result['words']] if text else result['words']
  text += ['', *(f'{name}: {amount(x)}' for name, x in result['choice']['costs'].items())]
  if result['commands']:
    text += ['', *result['commands']]
  else:
    text += ['', '--output=DIR writes the config that it takes to train this again.']
  return [*text, *(f'note: {note}' for note in result['notes'])]


def _of_task(found: records.Runs, task: str | None) -> tuple[records.Runs, str]:
  tasks = sorted({*found.table['task'], *found.failed['task']})
  if task is None:
    if len(tasks) > 1:
      raise InputError('--runs', f'{len(tasks)} tasks', 'one', f'pass --task={"|".join(tasks)}')
    task = tasks[0]
  if task not in tasks:
    raise unknown('--task', 'task', task, tasks, 'name a task of the records')
  parts = {name: getattr(found, name) for name in ('table', 'failed', 'latency')}
  kept = {name: part[part['task'] == task] for name, part in parts.items()}
  notes = [note for note in found.notes if not note.startswith('Runs of ') or f' {task} ' in note]
  return found._replace(**kept, notes=notes), task


def _pick(
  settings: selection.Settings, limits: list[Constraint]
) -> tuple[pd.DataFrame | None, list[str]]:
  """Arms with a setting that fits, the best first; None where no arm has one."""
  rows = settings.rows
  good = rows.apply(lambda row: all(excess(row, limit) == 0 for limit in limits), axis=1)
  if not good.any():
    return None, settings.notes
  chosen, notes = selection.choose(settings._replace(rows=rows[good]), intervals=False)
  trained = costs.by_name('trained').column
  key = chosen['sign'] * chosen['validation'].fillna(chosen['mean'])
  order = chosen.assign(key=-key).sort_values(['key', trained, 'arm'], kind='stable')
  return order.drop(columns='key').reset_index(drop=True), notes


def _nearest(rows: pd.DataFrame, limits: list[Constraint]) -> pd.Series:
  """The setting whose worst violation is the smallest share of its limit; then the sum counts."""

  def distance(row):
    broken = [excess(row, limit) for limit in limits]
    broken = [math.inf if math.isnan(each) else each for each in broken]
    return max(broken), sum(broken)

  best = min(rows.index, key=lambda i: (*distance(rows.loc[i]), rows.loc[i, 'arm']))
  return rows.loc[best]


def _with_interval(row: pd.Series) -> pd.Series:
  found = statistics.interval(list(row['values'].values()))
  return pd.concat([row, pd.Series({'low': found.low, 'high': found.high})])


def _prices(settings, limits: list[Constraint], choice: pd.Series) -> list[dict]:
  """What would be chosen without each of the constraints."""
  prices = []
  for limit in limits:
    others = [each for each in limits if each is not limit]
    best, _ = _pick(settings, others)
    prices.append({'constraint': limit.flag, **_beside(best.iloc[0], choice, others)})
  return prices


def _beside(row: pd.Series, choice: pd.Series, limits: list[Constraint]) -> dict:
  """An alternative to the choice; `difference` is its score less the choice's, over seeds."""
  common = statistics.paired(row['values'], choice['values'])
  found = statistics.interval(common)
  difference = float(common.mean()) if len(common) else row['mean'] - choice['mean']
  same = (row['arm'], row['setting']) == (choice['arm'], choice['setting'])
  return {
    'arm': row['arm'],
    'setting': row['setting'],
    'same': same,
    'mean': row['mean'],
    'validation': row['validation'],
    'difference': difference,
    'low': found.low,
    'high': found.high,
    'seeds': len(common),
    'verdict': _verdict(row, choice, difference, found, same),
  }


def _verdict(row, choice, difference: float, found: statistics.Interval, same: bool) -> str:
  if same:
    return 'the same configuration'
  if row['validation'] == choice['validation']:
    tie = 'tied on validation; '
  else:
    tie = ''
  if difference == 0 and (missing(found.low) or found.low == found.high):
    return f'{tie}exactly as good'
  if missing(found.low):
    seeds = len(row['values'].keys() & choice['values'].keys())
    common = f'{seeds} seed{"" if seeds == 1 else "s"} in common'
    return f'{tie}{signed(difference)}, with {common} too few to say more'
  within = f'95 % interval {signed(found.low)} to {signed(found.high)}'
  if found.low <= 0 <= found.high:
    return f'{tie}not told apart: {signed(difference)}, {within}'
  better = difference * row['sign'] > 0
  return f'{tie}{"better" if better else "worse"}: {signed(difference)}, {within}'


def _described(row: pd.Series, measured: list[costs.Cost]) -> dict:
  return {
    'arm': row['arm'],
    'setting': row['setting'],
    'mean': row['mean'],
    'sd': row['sd'],
    'low': row['low'],
    'high': row['high'],
    'seeds': int(row['n']),
    'validation': row['validation'],
    'worst': row['worst'],
    'failed': int(row['failed']),
    'costs': {
      cost.label: row[cost.column] * cost.scale
      for cost in measured
      if not missing(row[cost.column])
    },
  }


def _representative(row: pd.Series, found: records.Runs) -> tuple[dict, Path]:
  """The run of a setting that did best on validation, and the folder its `run` is relative to."""
  ranked = {
    seed: -math.inf if missing(value) else row['sign'] * value
    for seed, value in row['validations'].items()
  }
  index = row['records'][max(ranked, key=lambda seed: (ranked[seed], -seed))]
  return found.records[index], found.folders[index]


def _commands(row: pd.Series, record: dict, folder: Path, output) -> list[str]:
  slug = re.sub(r'[^a-z0-9]+', '-', row['arm'].lower()).strip('-') or 'best'
  workdir = f'runs/{slug}'
  lines = []
  kept = folder / record['run'] if record.get('run') else None
  source = Path(output) / 'config.json' if output is not None else None
  if source is None and kept is not None and (kept / 'config.json').is_file():
    source = kept / 'config.json'
  if source is not None:
    lines.append(f'efft train --config={shlex.quote(str(source))} --workdir={workdir}')
    lines.append(f'efft export --run={workdir} --output={workdir}-whole')
  if kept is not None and (kept / 'bundle').is_dir():
    run = shlex.quote(str(kept))
    lines.append(f'efft export --run={run} --output={workdir}-whole  # as it was measured')
  return lines


def _words(result: dict, choice: pd.Series, best: pd.DataFrame | None) -> list[str]:
  chosen = result['choice']
  name = f'{chosen["arm"]} ({chosen["setting"]})' if chosen['setting'] else chosen['arm']
  spread = f'{score(chosen["mean"])}'
  if not missing(chosen['low']):
    spread += f' (95 % interval {score(chosen["low"])} to {score(chosen["high"])}'
  else:
    spread += ' (no interval'
  spread += f', {chosen["seeds"]} seed{"" if chosen["seeds"] == 1 else "s"})'
  where = f'{result["metric"]} of {spread} on the {result["split"]} split of {result["task"]}'
  if not result['fits']:
    lines = [f'Nothing that was measured fits. The nearest is {name}: {where}.']
    for broken in result['violated']:
      if missing(broken['value']):
        lines.append(f'{broken["label"]}: not measured.')
        continue
      text = score if broken['constraint'].startswith('min_') else amount
      value, limit = text(broken['value']), text(broken['limit'])
      share = f'{100 * broken["excess"]:.3g} %'
      lines.append(f'{broken["label"]}: {value}, where {limit} was asked for; off by {share}.')
    return lines
  lines = [f'{name}: {where}.']
  if chosen['failed']:
    lines.append(f'{chosen["failed"]} of its runs did not end well.')
  close = [
    r for r in result['runners_up'] if 'not told apart' in r['verdict'] or 'as good' in r['verdict']
  ]
  for other in result['runners_up']:
    lines.append(f'Next: {_named(other)}, {score(other["mean"])}; {other["verdict"]}.')
  if close:
    names = ', '.join(other['arm'] for other in close)
    lines.append(
      f'These runs do not tell {chosen["arm"]} from {names}: take what is cheaper to you.'
    )
  if len(best) == 1:
    lines.append('Nothing else fits.')
  for price in result['prices']:
    if price['same']:
      lines.append(f'Without --{price["constraint"]} the choice is the same: it costs nothing.')
    else:
      without = f'Without --{price["constraint"]}: {_named(price)}, {score(price["mean"])}'
      lines.append(f'{without}; {price["verdict"]}.')
  return lines


def _named(other: dict) -> str:
  return f'{other["arm"]} ({other["setting"]})' if other['setting'] else other['arm']


def _markdown(result: dict) -> str:
  lines = [f'# {cell(result["choice"]["arm"])} for {cell(result["task"])}', '']
  if result['constraints']:
    lines += [*(f'- {cell(text)}' for text in result['constraints']), '']
  for text in result['words']:
    lines += [cell(text), '']
  lines += ['| cost | |', '|---|--:|']
  lines += [f'| {cell(name)} | {amount(x)} |' for name, x in result['choice']['costs'].items()]
  lines += ['', *(f'    {command}' for command in result['commands']), '']
  lines += [f'- {cell(note)}' for note in result['notes']]
  return '\n'.join(lines).rstrip() + '\n'
