"""What a paper claims, set against records: agrees, disagrees, or cannot be told.

A claim is about the mean of some differences: that it is above 0, below 0, within a margin of it,
or not beyond it on one side. Differences come in groups, one a task, of a value for each seed;
tasks count alike. The claim is judged by the 95 % interval of that mean for these tasks
(`statistics.stratified`), so that few or scattered differences decide nothing; what is found says
too in how many tasks the mean has the sign of the whole.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import pandas as pd

from efft.errors import unknown
from efft.report import statistics
from efft.report.tables import cell

AGREES, DISAGREES, OPEN = 'agrees', 'disagrees', 'cannot be told'
EXPECTED = ('more', 'less', 'same', 'not less', 'not more')


class Claim(NamedTuple):
  """What was claimed, what the records say in numbers, and AGREES, DISAGREES or OPEN."""

  text: str
  found: str
  verdict: str


def judge(
  text: str,
  differences: Mapping[str, Sequence[float]],
  expected: str,
  *,
  margin: float = 0.0,
  unit: str = '',
) -> Claim:
  """Judges a claim about the mean of `differences` {task: [a value for each seed]}.

  'more' agrees where the whole interval is above `margin` and disagrees where all of it is below,
  'less' the other way round with -margin; 'same' agrees where the interval is within `margin` of 0
  and disagrees where the two do not meet. 'not less' agrees where the whole interval is above
  -margin and disagrees where all of it is below that; 'not more' the other way round. Of fewer than
  three differences nothing can be told.

  Raises:
    InputError: an expectation that there is not.
  """
  if expected not in EXPECTED:
    raise unknown('expected', 'expectation', expected, EXPECTED, 'correct it')
  groups = [list(group) for group in differences.values() if len(group)]
  if not groups:
    return Claim(text, 'no runs', OPEN)
  means = [math.fsum(group) / len(group) for group in groups]
  mean, (low, high, _) = math.fsum(means) / len(means), statistics.stratified(groups)
  sizes = f'n = {sum(map(len, groups))}'
  if len(groups) > 1:
    alike = sum(math.copysign(1, mean) == math.copysign(1, each) for each in means)
    sizes += f', {alike} of {len(groups)} tasks'
  if math.isnan(low):
    return Claim(text, f'{mean:+.1f}{unit} ({sizes})', OPEN)
  found = f'{mean:+.1f}{unit} ({low:+.1f} to {high:+.1f}, {sizes})'
  agrees, disagrees = {
    'more': (low > margin, high < margin),
    'less': (high < -margin, low > -margin),
    'same': (-margin <= low and high <= margin, high < -margin or low > margin),
    'not less': (low >= -margin, high < -margin),
    'not more': (high <= margin, low > margin),
  }[expected]
  return Claim(text, found, AGREES if agrees else DISAGREES if disagrees else OPEN)


def markdown(claims: Sequence[Claim]) -> str:
  """A pipe table."""
  lines = ['| claim | here | |', '|---|---|---|']
  lines += ['| ' + ' | '.join(map(cell, claim)) + ' |' for claim in claims]
  return '\n'.join(lines) + '\n'


def spread(values: Sequence[float], digits: int = 1) -> str:
  """'81.2 ± 0.4': mean and standard deviation; of one value that alone, '-' of nothing."""
  if not values:
    return '-'
  mean = f'{fmean(values):.{digits}f}'
  return f'{mean} ± {stdev(values):.{digits}f}' if len(values) > 1 else mean


def table(head: Sequence[str], rows: Iterable[Sequence], words: int) -> str:
  """A pipe table whose first `words` columns are not numbers."""
  lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * words + '--:|' * (len(head) - words)]
  return '\n'.join([*lines, *('| ' + ' | '.join(map(str, row)) + ' |' for row in rows)])


def flat(row) -> bool:
  """Whether all seeds of a row of `selection.choose` score alike, or none above 0: one class."""
  values = list(row['values'].values())
  return len(values) > 1 and (max(values) <= 0 or max(values) == min(values))


def scores(rows: pd.DataFrame, arm: str, tasks: Iterable[str], mark: str = '') -> list[str]:
  """Cells of a table: the arm's mean and sd on each task, x 100, and the average where it has all.

  Args:
    rows: of `selection.choose`.
    arm: one of theirs, or one that has no runs yet.
    tasks: the columns.
    mark: behind scores that are `flat`.
  """
  own, cells, tasks = rows[rows['arm'] == arm].set_index('task'), [], list(tasks)
  for task in tasks:
    if task in own.index:
      row = own.loc[task]
      text = spread([100 * x for x in row['values'].values()])
      cells.append(text + mark if flat(row) else text)
    else:
      cells.append('-')
  return [*cells, '-' if '-' in cells else f'{100 * own.loc[tasks, "mean"].mean():.1f}']


def pictures(folder: Path) -> str:
  """Markdown that shows the plots of a report in folder/report; nothing where there is none."""
  found = sorted((folder / 'report' / 'plots').glob('*.svg'))
  return '\n'.join(f'![{file.stem}](report/plots/{file.name})' for file in found)


def page(
  parts: Sequence[str],
  judged: Sequence[Claim],
  about: str,
  notes: Sequence[str],
  failed: int,
  *,
  heading: str = 'What the paper says',
) -> str:
  """A study's page in Markdown: its parts, what was claimed, notes, and how many runs failed."""
  end = [f'- {note}' for note in notes]
  if failed:
    end.append(f'{failed} runs failed or diverged.')
  sections = [*parts, f'## {heading}', markdown(judged), about, *end]
  return '\n\n'.join(section.strip('\n') for section in sections if section) + '\n'
