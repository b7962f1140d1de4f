"""Intervals and paired tests over seeds and over tasks."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
FEWEST = 3  # values that an interval is drawn from
# Below this many values a bootstrap covers too little: 77 % of the time with 3 or 4 of a normal
# distribution, 87 % with 5.
FEW = 10
EXACT = 16  # differences whose 2^n signs are all counted; of more, RESAMPLES are drawn


class Interval(NamedTuple):
  """A confidence interval of a mean; `method` says how: BCa, percentile, t, or '' for none."""

  low: float = math.nan
  high: float = math.nan
  method: str = ''


def interval(values: Sequence[float]) -> Interval:
  """The 95 % interval of the mean of `values` [n]; none of fewer than 3.

  Bootstrapped: bias-corrected and accelerated (Efron 1987, as in scipy), by percentiles where that
  is degenerate; of fewer than ten values wide enough to hold Student's t interval as well (`method`
  has '+ t'). The same values give the same interval.
  """
  x = np.asarray(values, np.float64)
  return _bootstrap((x,), np.mean, [(1.0, x)])


def difference_interval(new: Sequence[float], old: Sequence[float]) -> Interval:
  """The interval of mean(new) - mean(old), of independent samples [n] and [m], likewise."""

  def difference(a, b, axis=-1):
    return a.mean(axis=axis) - b.mean(axis=axis)

  a, b = np.asarray(new, np.float64), np.asarray(old, np.float64)
  return _bootstrap((a, b), difference, [(1.0, a), (-1.0, b)])


def stratified(groups: Sequence[Sequence[float]]) -> Interval:
  """The 95 % interval of the mean of the groups' means, for these very groups.

  Groups (tasks, say) are not drawn anew, only the values within them (seeds): nothing is said of
  other groups. Where a group has a single value and so no spread, the groups' means are the sample.
  Of fewer than 3 values in all there is none. By Welch's t (Welch 1947, for a linear combination).
  """
  samples = [np.asarray(group, np.float64) for group in groups]
  if any(len(x) < 2 for x in samples):
    samples = [np.asarray([x.mean() for x in samples])]
  if sum(map(len, samples)) < FEWEST:
    return Interval()
  return Interval(*_welch([(1 / len(samples), x) for x in samples]), 't')


def _bootstrap(samples: tuple[np.ndarray, ...], statistic, parts) -> Interval:
  if min(map(len, samples)) < FEWEST:
    return Interval()
  if all(np.ptp(sample) == 0 for sample in samples):
    value = float(statistic(*samples))
    return Interval(value, value, 'percentile')
  for method in ('BCa', 'percentile'):
    with warnings.catch_warnings(), np.errstate(all='ignore'):
      warnings.simplefilter('ignore')  # of degenerate data: it is looked at below
      found = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method=method,
        rng=np.random.default_rng(0), vectorized=True,
      ).confidence_interval  # fmt: skip
    if math.isfinite(found.low) and math.isfinite(found.high):
      break
  low, high = float(found.low), float(found.high)
  if min(map(len, samples)) >= FEW:
    return Interval(low, high, method)
  least = _welch(parts)
  return Interval(min(low, least[0]), max(high, least[1]), f'{method} + t')


def _welch(parts: Sequence[tuple[float, np.ndarray]]) -> tuple[float, float]:
  """The t interval of sum(weight * mean(x)) over independent samples (weight, x [n > 1])."""
  middle = math.fsum(weight * x.mean() for weight, x in parts)
  shares = np.asarray([weight**2 * x.var(ddof=1) / len(x) for weight, x in parts])
  if not (total := shares.sum()):
    return middle, middle
  sizes = np.asarray([len(x) for _, x in parts])
  freedom = total**2 / (shares**2 / (sizes - 1)).sum()
  half = stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(total)
  return middle - half, middle + half


def paired_t(differences: Sequence[float]) -> float:
  """Two-sided p of the paired t test; NaN of fewer than two, or of equal differences."""
  d = np.asarray(differences, np.float64)
  if len(d) < 2 or _constant(d):
    return math.nan
  return float(stats.ttest_1samp(d, 0).pvalue)


def sign_flip(differences: Sequence[float]) -> float:
  """Two-sided p of the paired permutation test: the share of sign patterns with as large a mean.

  Exact up to 16 differences (all 2^n patterns), drawn from then on. With n differences no p is
  below 2^(1-n). NaN of none.
  """
  d = np.asarray(differences, np.float64)
  if not len(d):
    return math.nan
  if len(d) == 1 or not d.any():
    return 1.0
  exact = len(d) <= EXACT
  found = stats.permutation_test(
    (d,), np.mean, permutation_type='samples', vectorized=True,
    n_resamples=np.inf if exact else RESAMPLES, rng=np.random.default_rng(0),
  )  # fmt: skip
  return min(1.0, float(found.pvalue))


def holm(p: Sequence[float]) -> list[float]:
  """p adjusted for as many comparisons as there are (Holm 1979); NaN is no comparison."""
  p = np.asarray(p, np.float64)
  adjusted = np.full(p.shape, np.nan)
  order = [i for i in np.argsort(p, kind='stable') if not np.isnan(p[i])]
  highest = 0.0
  for rank, i in enumerate(order):
    highest = max(highest, min(1.0, (len(order) - rank) * p[i]))
    adjusted[i] = highest
  return adjusted.tolist()


def paired(new: Mapping[int, float], old: Mapping[int, float]) -> np.ndarray:
  """new - old, float64, of the seeds that both have, in their order."""
  return np.asarray([new[seed] - old[seed] for seed in sorted(new.keys() & old.keys())], np.float64)


def against_baseline(rows: pd.DataFrame, baseline: str) -> pd.DataFrame:
  """Each arm against the baseline arm over their common seeds, a row a (task, fraction, arm).

  Args:
    rows: of `selection.choose`.
    baseline: an arm; tasks that lack it are left out, and so are arms shown on another split.

  Returns:
    task, fraction, arm, n, difference (arm - baseline), low, high, p_t, p_flip and both after
    Holm's correction for the arms of that task. Where only one seed is common, no test.
  """
  lines = []
  for (task, fraction), group in rows.groupby(['task', 'fraction'], sort=True):
    base = group[group['arm'] == baseline]
    if base.empty:
      continue
    base = base.iloc[0]
    for _, row in group.iterrows():
      if row['arm'] != baseline and row['split'] == base['split']:
        d = paired(row['values'], base['values'])
        mean = float(d.mean()) if len(d) else math.nan
        found = interval(d)
        lines.append([task, fraction, row['arm'], len(d), mean, found.low, found.high, *_tests(d)])
  names = ['task', 'fraction', 'arm', 'n', 'difference', 'low', 'high', 'p_t', 'p_flip']
  frame = pd.DataFrame(lines, columns=names)
  return _corrected(frame, frame.groupby(['task', 'fraction'], sort=False))


def over_tasks(rows: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
  """Each arm against the baseline with the task as the unit.

  A task counts once, with its mean difference over seeds; the sign is turned where lower is
  better, so that more is better everywhere. Only the largest fraction of each task counts.

  Args:
    rows: of `selection.choose`.
    compared: of `against_baseline`.

  Returns:
    arm, tasks, better, worse, difference (mean over tasks), p_t, p_flip, and both after Holm's
    correction; arms that share fewer than two tasks with the baseline are left out.
  """
  sign = dict(zip(rows['task'], rows['sign'], strict=True))
  largest = compared.groupby('task')['fraction'].transform('max') if len(compared) else None
  whole = compared[(compared['fraction'] == largest) & (compared['n'] > 0)]
  lines = []
  for arm, group in whole.groupby('arm', sort=True):
    d = np.asarray([sign[t] * x for t, x in zip(group['task'], group['difference'], strict=True)])
    if len(d) > 1:
      better, worse = int((d > 0).sum()), int((d < 0).sum())
      lines.append([arm, len(d), better, worse, float(d.mean()), *_tests(d)])
  names = ['arm', 'tasks', 'better', 'worse', 'difference', 'p_t', 'p_flip']
  frame = pd.DataFrame(lines, columns=names)
  return _corrected(frame, [(None, frame)])


def _tests(d: np.ndarray) -> tuple[float, float]:
  return paired_t(d), sign_flip(d) if len(d) > 1 else math.nan


def _corrected(frame: pd.DataFrame, groups) -> pd.DataFrame:
  for name in ('p_t', 'p_flip'):
    adjusted = pd.Series(np.nan, frame.index, np.float64)
    for _, group in groups:
      adjusted[group.index] = holm(group[name])
    frame[f'{name}_holm'] = adjusted
  return frame


def _constant(d: np.ndarray) -> bool:
  """Equal but for rounding, where t would be a quotient of rounding errors."""
  return bool(np.ptp(d) <= 1e-12 * max(1.0, np.abs(d).max()))
