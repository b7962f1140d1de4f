"""Fronts: which arms nothing beats at once in score and in cost."""

from collections.abc import Sequence

import numpy as np

FRONT, WITHIN, DOMINATED = 'front', 'within', 'dominated'


def front(
  cost: Sequence[float],
  value: Sequence[float],
  low: Sequence[float] | None = None,
  high: Sequence[float] | None = None,
) -> list[str]:
  """Where each of n arms stands, by less cost and more value.

  Args:
    cost: [n], less is better.
    value: [n], more is better.
    low, high: [n], the interval of each value; NaN or None where there is none, which counts as
      the value itself.

  Returns:
    'front': no arm is at least as good in both and better in one. 'within': there is such an arm,
    but none that costs no more has an interval wholly above this arm's. 'dominated': else. '' for
    an arm whose cost or value is NaN, which is compared with nothing.
  """
  cost, value = np.asarray(cost, np.float64), np.asarray(value, np.float64)
  low = value if low is None else np.where(np.isnan(low), value, low)
  high = value if high is None else np.where(np.isnan(high), value, high)
  status = [''] * len(cost)
  known = np.flatnonzero(~np.isnan(cost) & ~np.isnan(value))
  best = sure = -np.inf  # the highest value, and lower end, of what costs less
  order = known[np.argsort(cost[known], kind='stable')]
  for same in np.split(order, np.flatnonzero(np.diff(cost[order])) + 1):
    if not len(same):
      continue
    top = value[same].max()
    sure = max(sure, low[same].max())
    for i in same:
      if value[i] == top > best:
        status[i] = FRONT
      else:
        status[i] = WITHIN if high[i] >= sure else DOMINATED
    best = max(best, top)
  return status
