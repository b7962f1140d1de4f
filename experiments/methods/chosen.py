"""Which of the records of run.py count: those at the best rate, by the half that chooses."""

import math
import statistics

TASKS = ('stsb', 'cola')
SEEDS = (0, 1, 2)
HEAD = 'head'
NOISE = 0.03  # of a mean over the seeds on half a validation split: less is no difference


def score(record: dict) -> float:
  """On the half that chooses; a run without a score counts as -1."""
  return -1.0 if record['chosen'] is None else record['chosen']


def rates(records: list[dict]) -> dict:
  """{(config, task): {(factor of its rate, the head's own rate or None): {seed: record}}}."""
  cells: dict = {}
  for record in records:
    cell = cells.setdefault((record['config'], record['task']), {})
    cell.setdefault((record['factor'], record.get('head_lr')), {})[record['seed']] = record
  return cells


def mean(found: dict) -> float | None:
  """Of the scores of `found` {seed: record}; None before there are all seeds."""
  if len(found) < len(SEEDS):
    return None
  return statistics.mean(score(r) for r in found.values())


def final(records: list[dict]) -> dict:
  """{(config, task): its records at the rate that counts, by seed}.

  Those with the best mean over all seeds; before there are all seeds, what is best with seed 0.
  """

  def rank(found):
    whole = mean(found)
    first = score(found[0]) if 0 in found else -math.inf
    # Losses decide between equal scores.
    loss = sum(r.get('chosen_loss', math.inf) for r in found.values())
    return whole is not None, first if whole is None else whole, -loss

  best = {key: max(cell.values(), key=rank) for key, cell in rates(records).items()}
  return {key: [found[seed] for seed in sorted(found)] for key, found in best.items()}
