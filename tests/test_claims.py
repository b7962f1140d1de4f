"""Verdicts on claims, against what each pattern of differences must give."""

import pytest

from efft.errors import InputError
from efft.report import claims

ABOVE, BELOW, AROUND = [1.0, 2.0, 3.0, 2.0], [-1.0, -2.0, -3.0, -2.0], [-4.0, 5.0, -3.0, 4.0]
SMALL = [0.1, -0.1, 0.2, -0.2]


@pytest.mark.parametrize(
  ('differences', 'expected', 'margin', 'verdict'),
  [
    (ABOVE, 'more', 0.0, claims.AGREES),
    (ABOVE, 'less', 0.0, claims.DISAGREES),
    (BELOW, 'less', 0.5, claims.AGREES),
    (BELOW, 'less', 5.0, claims.DISAGREES),
    (BELOW, 'less', 2.0, claims.OPEN),
    (ABOVE, 'more', 2.0, claims.OPEN),
    (ABOVE, 'same', 0.5, claims.DISAGREES),
    (ABOVE, 'same', 5.0, claims.AGREES),
    (BELOW, 'more', 0.0, claims.DISAGREES),
    (BELOW, 'less', 0.0, claims.AGREES),
    (BELOW, 'same', 0.5, claims.DISAGREES),
    (AROUND, 'more', 0.0, claims.OPEN),
    (AROUND, 'less', 0.0, claims.OPEN),
    (AROUND, 'same', 0.5, claims.OPEN),
    (SMALL, 'same', 0.5, claims.AGREES),
    (ABOVE, 'not less', 0.0, claims.AGREES),
    (BELOW, 'not less', 0.5, claims.DISAGREES),
    (BELOW, 'not less', 5.0, claims.AGREES),
    (AROUND, 'not less', 0.5, claims.OPEN),
    (BELOW, 'not more', 0.0, claims.AGREES),
    (ABOVE, 'not more', 0.5, claims.DISAGREES),
    (ABOVE, 'not more', 5.0, claims.AGREES),
    (AROUND, 'not more', 0.5, claims.OPEN),
    (ABOVE[:2], 'more', 0.0, claims.OPEN),
    ([], 'more', 0.0, claims.OPEN),
  ],
)
def test_a_verdict_follows_from_where_the_interval_is(differences, expected, margin, verdict):
  found = claims.judge('text', {'sst2': differences}, expected, margin=margin)
  assert found.verdict == verdict


def test_the_numbers_are_the_mean_and_its_interval():
  found = claims.judge('BitFit is better', {'sst2': [2.0, 2.0, 2.0]}, 'more', unit=' points')
  assert found == ('BitFit is better', '+2.0 points (+2.0 to +2.0, n = 3)', claims.AGREES)
  assert claims.markdown([found]).splitlines()[2].startswith('| BitFit is better | +2.0 points')


def test_tasks_count_alike_and_are_counted():
  found = claims.judge('text', {'a': [1.0, 1.0, 1.0, 1.0], 'b': [-3.0, -3.0], 'c': []}, 'less')
  assert found[1:] == ('-1.0 (-1.0 to -1.0, n = 6, 1 of 2 tasks)', claims.AGREES)


def test_seeds_of_one_task_do_not_stand_for_others():
  # One value a task: four tasks that disagree tell nothing, however many decimals they have.
  found = claims.judge('text', {'a': [4.0], 'b': [5.0], 'c': [-1.0], 'd': [2.0]}, 'more')
  assert found.verdict == claims.OPEN and '3 of 4 tasks' in found.found


def test_one_value_has_no_spread():
  assert claims.spread([81.23]) == '81.2' and claims.spread([]) == '-'
  assert claims.spread([81.0, 83.0]) == '82.0 ± 1.4'


def test_an_unknown_expectation_is_refused():
  with pytest.raises(InputError, match='bigger'):
    claims.judge('text', {'a': ABOVE}, 'bigger')
