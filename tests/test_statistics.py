"""Selection, intervals, paired tests and fronts, against loops, enumeration and scipy."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import records as make
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from efft.errors import InputError
from efft.report import changes, labels, pareto, records, selection, statistics

values = st.lists(st.integers(-8, 8).map(lambda x: x / 8), min_size=1, max_size=9)


def settings(tmp_path, made, split='report'):
  return selection.settings(records.read(make.write(tmp_path, made)), split)


def chosen(tmp_path, made, split='report'):
  rows, notes = selection.choose(settings(tmp_path, made, split))
  return rows.set_index(['task', 'arm']), notes


# Intervals


def test_an_interval_is_scipys_and_holds_the_mean():
  values = [0.81, 0.84, 0.79, 0.88, 0.83, 0.85, 0.8, 0.82, 0.9, 0.78]
  found = statistics.interval(values)
  expected = stats.bootstrap(
    (values,), np.mean, confidence_level=0.95, method='BCa', rng=np.random.default_rng(0)
  ).confidence_interval
  assert found == (expected.low, expected.high, 'BCa')
  assert found.low < np.mean(values) < found.high
  assert statistics.interval(values) == found


@pytest.mark.parametrize('values', [[], [0.5], [0.5, 0.7]])
def test_no_interval_of_fewer_than_three(values):
  found = statistics.interval(values)
  assert math.isnan(found.low) and math.isnan(found.high) and found.method == ''


def test_a_degenerate_bootstrap_falls_back_to_percentiles():
  assert statistics.interval([0.7] * 4) == (0.7, 0.7, 'percentile')
  # The jackknife of two constant samples has no acceleration.
  found = statistics.difference_interval([0.7] * 3, [0.5] * 3)
  assert found.method == 'percentile' and found.low == found.high == pytest.approx(0.2)


def covered(seed: int, n: int, draws: int) -> int:
  """How often the interval of n normal values holds their mean."""
  draw = np.random.default_rng(seed)
  found = (statistics.interval(draw.normal(3.0, 1.0, n)) for _ in range(draws))
  return sum(each.low <= 3.0 <= each.high for each in found)


def test_intervals_cover_the_mean_about_as_often_as_they_say():
  # Narrower than 95 % with 12 values, as is known.
  assert 0.85 * 150 < covered(1, 12, 150) < 0.99 * 150


@pytest.mark.parametrize('n', [3, 5, 9])
def test_intervals_of_few_values_hold_student_s(n):
  values = np.random.default_rng(n).normal(0.8, 0.02, n)
  found = statistics.interval(values)
  low, high = stats.t.interval(0.95, n - 1, np.mean(values), stats.sem(values))
  assert found.low <= low + 1e-12 and found.high >= high - 1e-12 and found.method.endswith(' + t')
  other = values[:3] + [0.1, 0.0, 0.2]
  found = statistics.difference_interval(other, values)
  expected = stats.ttest_ind(other, values, equal_var=False).confidence_interval(0.95)
  assert found.low <= expected.low + 1e-12 and found.high >= expected.high - 1e-12


def test_intervals_of_three_values_cover_the_mean():
  assert covered(2, 3, 100) > 88  # of a bootstrap alone it is 77


def test_a_stratified_interval_is_welchs_and_students():
  a, b = [0.5, 0.7, 0.9, 0.6], [0.2, 0.1, 0.4]
  # The mean of a and -b is half of the difference that Welch's test is of.
  found = statistics.stratified([a, [-x for x in b]])
  expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
  assert found[:2] == pytest.approx((expected.low / 2, expected.high / 2))
  low, high = stats.t.interval(0.95, 3, np.mean(a), stats.sem(a))
  assert statistics.stratified([a])[:2] == pytest.approx((low, high))
  # One value each: the groups are the sample.
  assert statistics.stratified([[x] for x in a])[:2] == pytest.approx((low, high))
  assert statistics.stratified([[0.5, 0.5], [0.7, 0.7]])[:2] == pytest.approx((0.6, 0.6))
  assert statistics.stratified([a[:2]]).method == ''


def test_a_stratified_interval_covers_the_mean_of_its_groups():
  draw = np.random.default_rng(3)
  inside = 0
  for _ in range(400):
    centres = draw.normal(0.0, 5.0, 4)
    found = statistics.stratified([draw.normal(c, 1.0, 3) for c in centres])
    inside += found.low <= centres.mean() <= found.high
  assert 0.92 * 400 < inside < 0.985 * 400


def test_a_difference_of_samples_lies_where_the_means_do():
  new, old = [0.9, 0.92, 0.91, 0.93], [0.8, 0.81, 0.79]
  found = statistics.difference_interval(new, old)
  assert found.low < np.mean(new) - np.mean(old) < found.high and found.low > 0


# Tests


@given(values)
def test_sign_flips_are_enumerated(differences):
  total = abs(sum(differences))
  patterns = itertools.product((1, -1), repeat=len(differences))
  as_large = [
    abs(sum(s * d for s, d in zip(signs, differences, strict=True))) >= total - 1e-12
    for signs in patterns
  ]
  assert statistics.sign_flip(differences) == pytest.approx(np.mean(as_large))


def test_sign_flips_of_equal_sizes_are_wilcoxons_ranks():
  # The ranks of |d| are their sizes, so both tests sum the same numbers.
  d = [1.0, -2.0, 3.0, 4.0, 5.0, -6.0, 7.0]
  assert statistics.sign_flip(d) == pytest.approx(stats.wilcoxon(d, method='exact').pvalue)


def test_many_differences_are_drawn_and_the_same_each_time():
  d = np.random.default_rng(0).normal(0.3, 1, 40)
  assert statistics.sign_flip(d) == statistics.sign_flip(d)
  assert statistics.sign_flip(d) == pytest.approx(stats.ttest_1samp(d, 0).pvalue, abs=0.02)


def test_the_t_test_is_paired():
  new, old = [0.9, 0.92, 0.95, 0.91], [0.88, 0.93, 0.9, 0.89]
  found = statistics.paired_t(np.subtract(new, old))
  assert found == pytest.approx(stats.ttest_rel(new, old).pvalue)
  assert math.isnan(statistics.paired_t([0.1])) and math.isnan(statistics.paired_t([0.1] * 3))
  assert math.isnan(statistics.sign_flip([])) and statistics.sign_flip([0.0, 0.0]) == 1


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p):
  adjusted = statistics.holm(p)
  known = sorted(x for x in p if not math.isnan(x))
  for alpha in (0.01, 0.05, 0.3):
    rejected = 0
    for rank, x in enumerate(known):
      if (len(known) - rank) * x > alpha:
        break
      rejected += 1
    assert sum(a <= alpha for a in adjusted if not math.isnan(a)) == rejected
  for x, a in zip(p, adjusted, strict=True):
    assert math.isnan(x) == math.isnan(a) and (math.isnan(x) or x <= a <= 1)


# Selection


def test_validation_chooses_and_the_other_half_is_shown(tmp_path):
  made = []
  for rate, validation, value in ((1e-3, 0.9, 0.7), (1e-4, 0.8, 0.95)):
    for seed in range(3):
      overrides = {'optim.lr': rate, 'seed': seed}
      made.append(make.record(seed=seed, value=value, validation=validation, overrides=overrides))
  row = chosen(tmp_path, made)[0].loc['sst2', 'full']
  assert (row['setting'], row['settings'], row['n']) == ('optim.lr=0.001', 2, 3)
  assert row['mean'] == pytest.approx(0.7) and row['split'] == 'report'
  row = chosen(tmp_path, made, 'test')[0].loc['sst2', 'full']
  assert row['mean'] == pytest.approx(0.69) and row['setting'] == 'optim.lr=0.001'


def test_held_out_is_the_test_split_of_tasks_all_of_whose_runs_have_it(tmp_path):
  made = [
    make.record(arm, seed, 0.8, task=task)
    for arm in ('full', 'lora')
    for seed in (0, 1)
    for task in ('sst2', 'cola', 'mrpc')
  ]
  for each in made:
    if each['task'] == 'cola' or (each['task'], each['arm'], each['seed']) == ('mrpc', 'lora', 1):
      del each['metrics']['test']
  rows, _ = chosen(tmp_path, made, 'held_out')
  assert {key: (row['split'], round(row['mean'], 2)) for key, row in rows.iterrows()} == {
    ('sst2', 'full'): ('test', 0.79),
    ('sst2', 'lora'): ('test', 0.79),
    ('cola', 'full'): ('report', 0.8),
    ('cola', 'lora'): ('report', 0.8),
    ('mrpc', 'full'): ('report', 0.8),
    ('mrpc', 'lora'): ('report', 0.8),
  }


def test_a_study_is_summarised_as_a_loop_does(tmp_path):
  made = make.study(seeds=range(4), rates=(1e-3, 3e-4, 1e-4))
  rows, _ = chosen(tmp_path, made)
  for (task, arm), row in rows.iterrows():
    best, kept = -math.inf, None
    for rate in (1e-3, 3e-4, 1e-4):
      runs = [
        r for r in made
        if (r['task'], r['arm'], r['overrides']['optim.lr']) == (task, arm, rate)
      ]  # fmt: skip
      mean = sum(r['metrics']['validation']['accuracy'] for r in runs) / len(runs)
      if mean > best:
        best, kept = mean, runs
    scores = [r['metrics']['report']['accuracy'] for r in kept]
    assert row['mean'] == pytest.approx(np.mean(scores))
    assert row['sd'] == pytest.approx(np.std(scores, ddof=1))
    assert row['worst'] == min(scores) and row['worst_seed'] == int(np.argmin(scores))
    assert row['setting'] == f'optim.lr={kept[0]["overrides"]["optim.lr"]}'
    assert row['parameters.trained'] == make.ARMS[arm][1]


def test_less_is_better_where_the_records_say_so(tmp_path):
  made = [
    make.record(
      seed=seed, metric='loss', higher_is_better=False,
      overrides={'optim.lr': rate, 'seed': seed},
      metrics={'validation': {'loss': loss}, 'report': {'loss': loss + 0.1 * seed}},
    )
    for rate, loss in ((1e-3, 0.5), (1e-4, 0.3))
    for seed in range(3)
  ]  # fmt: skip
  row = chosen(tmp_path, made)[0].loc['sst2', 'full']
  assert row['setting'] == 'optim.lr=0.0001'
  assert (row['worst'], row['worst_seed']) == (0.5, 2)


def test_without_a_half_of_its_own_validation_is_shown_and_said_so(tmp_path):
  metrics = {'validation': {'accuracy': 0.8}}
  made = [make.record(seed=s, metrics=metrics) for s in range(3)]
  made += [make.record('lora', seed=s, value=0.7) for s in range(3)]
  found = settings(tmp_path, made)
  rows = found.rows.set_index('arm')
  assert rows.loc['full', 'split'] == 'validation' and rows.loc['lora', 'split'] == 'report'
  assert any('full' in note and 'share their data' in note for note in found.notes)
  rows, _ = selection.choose(found)
  compared = statistics.against_baseline(rows, 'full')
  assert compared.empty, 'scores of different splits are not compared'


def test_a_diverged_setting_is_not_chosen_for_its_survivors(tmp_path):
  made = []
  for seed in range(3):
    low, high = ({'optim.lr': rate, 'seed': seed} for rate in (1e-4, 1e-2))
    made.append(make.record(seed=seed, value=0.8, overrides=low))
    made.append(
      make.record(seed=seed, value=0.9, overrides=high)
      if seed
      else make.failure(seed=seed, status='diverged', overrides=high)
    )
  rows, notes = chosen(tmp_path, made)
  assert rows.loc[('sst2', 'full'), 'setting'] == 'optim.lr=0.0001'
  assert any('diverged' in note for note in notes)


def test_a_setting_without_scores_is_not_chosen_for_the_one_it_has(tmp_path):
  made = []
  for rate, scores in ((1e-4, [0.8, 0.81, 0.8]), (1e-2, [None, None, 0.84])):
    for seed, score in enumerate(scores):
      record = make.record(seed=seed, overrides={'optim.lr': rate, 'seed': seed})
      # What a correlation of constant predictions is recorded as.
      record['metrics'] = {split: {'accuracy': score} for split in ('validation', 'report')}
      made.append(record)
  rows, notes = chosen(tmp_path, made)
  row = rows.loc[('sst2', 'full')]
  assert row['setting'] == 'optim.lr=0.0001' and row['n'] == 3
  assert any('no score' in note for note in notes)


def test_a_run_without_a_score_leaves_its_arm_on_the_reported_half(tmp_path):
  made = [make.record(arm, s, 0.8) for arm in ('full', 'lora') for s in range(3)]
  made[1]['metrics']['report'] = {'accuracy': None, 'loss': None}  # logits that are not finite
  found = settings(tmp_path, made)
  rows = found.rows.set_index('arm')
  assert set(rows['split']) == {'report'} and rows.loc['full', 'n'] == 2
  assert not any('share their data' in note for note in found.notes)


def test_what_has_no_score_counts_as_failed(tmp_path):
  made = [make.record(seed=s) for s in range(3)]
  made[1]['metrics']['report']['accuracy'] = None
  made.append(make.failure(seed=3, error='killed'))
  found = settings(tmp_path, made)
  row = found.rows.iloc[0]
  assert (row['n'], row['failed'], row['scoreless']) == (2, 2, 1)
  assert list(found.failed['status']) == ['failed', 'undefined']
  assert list(found.failed['error'])[0] == 'killed'


def test_settings_without_validation_cannot_be_chosen_between(tmp_path):
  metrics = {'report': {'accuracy': 0.8}}
  made = [make.record(metrics=metrics, overrides={'optim.lr': rate}) for rate in (0.1, 0.2)]
  with pytest.raises(InputError, match='metrics.validation'):
    selection.choose(settings(tmp_path, made))
  rows, _ = chosen(tmp_path / 'one', made[:1])
  assert len(rows) == 1


def test_nothing_that_ended_well_is_refused_with_the_reason(tmp_path):
  with pytest.raises(InputError, match='all failed.*out of memory'):
    settings(tmp_path, [make.failure(seed=s) for s in range(2)])
  made = [make.record(metrics={'validation': {'accuracy': 0.8}})]
  with pytest.raises(InputError, match="'test', which no run has scored"):
    settings(tmp_path, made, 'test')
  with pytest.raises(InputError, match='did you mean'):
    settings(tmp_path, made, 'reprot')


def test_the_baseline_is_full_or_trains_the_most(tmp_path):
  rows, _ = chosen(tmp_path, make.study(seeds=range(1), rates=(1e-3,)))
  rows = rows.reset_index()
  assert selection.baseline(rows) == 'full'
  assert selection.baseline(rows[rows['arm'] != 'full']) == 'pruned + int8'
  assert selection.baseline(rows, 'lora') == 'lora'
  with pytest.raises(InputError, match='did you mean lora?'):
    selection.baseline(rows, 'lorra')


# Comparisons


def test_arms_are_paired_over_common_seeds(tmp_path):
  made = make.study(('full', 'lora', 'head'), ('sst2', 'mrpc'), range(6), (1e-3,))
  made = [r for r in made if (r['arm'], r['seed']) != ('lora', 0)]
  rows = chosen(tmp_path, made)[0].reset_index()
  found = statistics.against_baseline(rows, 'full').set_index(['task', 'arm'])

  def score(task, arm, seed):
    return next(
      r['metrics']['report']['accuracy'] for r in made
      if (r['task'], r['arm'], r['seed']) == (task, arm, seed)
    )  # fmt: skip

  for task in ('sst2', 'mrpc'):
    p = {}
    for arm, seeds in (('lora', range(1, 6)), ('head', range(6))):
      new, old = ([score(task, each, s) for s in seeds] for each in (arm, 'full'))
      row = found.loc[(task, arm)]
      assert row['n'] == len(seeds)
      assert row['difference'] == pytest.approx(np.mean(new) - np.mean(old))
      assert row['p_t'] == pytest.approx(stats.ttest_rel(new, old).pvalue)
      assert row['low'] < row['difference'] < row['high']
      p[arm] = row['p_t']
    least, most = sorted(p, key=p.get)
    assert found.loc[(task, least), 'p_t_holm'] == pytest.approx(min(1, 2 * p[least]))
    expected = max(2 * p[least], p[most])
    assert found.loc[(task, most), 'p_t_holm'] == pytest.approx(min(1, expected))


def test_over_tasks_a_task_counts_once_and_points_upwards(tmp_path):
  made = []
  for task, gain, less in (('a', 0.01, False), ('b', 0.02, False), ('c', -0.03, True)):
    for arm, extra in (('full', 0.0), ('lora', gain)):
      for seed in range(3):
        name = 'loss' if less else 'accuracy'
        score = {name: 0.5 + extra + 0.001 * seed}
        made.append(
          make.record(
            arm, seed, task=task, metric=name, higher_is_better=not less,
            metrics={'validation': score, 'report': score},
          )
        )  # fmt: skip
  rows = chosen(tmp_path, made)[0].reset_index()
  found = statistics.over_tasks(rows, statistics.against_baseline(rows, 'full')).iloc[0]
  assert (found['arm'], found['tasks'], found['better'], found['worse']) == ('lora', 3, 3, 0)
  assert found['difference'] == pytest.approx(0.02)
  assert found['p_t'] == pytest.approx(stats.ttest_1samp([0.01, 0.02, 0.03], 0).pvalue)
  assert found['p_flip'] == pytest.approx(2 / 8)


def test_one_common_seed_is_no_test(tmp_path):
  made = [make.record('full', 0, 0.8), make.record('lora', 0, 0.9), make.record('head', 1, 0.9)]
  rows = chosen(tmp_path, made)[0].reset_index()
  found = statistics.against_baseline(rows, 'full').set_index('arm')
  assert found.loc['lora', 'difference'] == pytest.approx(0.1)
  assert found.loc['head', 'n'] == 0 and math.isnan(found.loc['head', 'difference'])
  assert found[['low', 'p_t', 'p_flip', 'p_t_holm', 'p_flip_holm']].isna().all(axis=None)


def test_changes_between_two_sets_of_runs(tmp_path):
  def runs(folder, shift, arms, seeds):
    made = [
      make.record(arm, s, 0.8 + 0.01 * s + shift.get(arm, 0) + 0.001 * (s % 2))
      for arm in arms for s in seeds
    ]  # fmt: skip
    return selection.choose(settings(tmp_path / folder, made))[0]

  arms = ('full', 'lora', 'head')
  old = runs('old', {}, arms, range(4))
  new = runs('new', {'lora': 0.05}, ('full', 'lora', 'bitfit'), range(4))
  found = changes.changes(new, old).set_index('arm')
  assert dict(found['change']) == {
    'bitfit': 'new', 'head': 'lost', 'full': 'no difference shown', 'lora': 'changed',
  }  # fmt: skip
  assert found.loc['lora', 'difference'] == pytest.approx(0.05)
  assert found.loc['lora', 'how'] == 'paired, 4 seeds'
  # Other seeds: independent means, and a wide interval.
  later = runs('later', {'lora': 0.05}, arms, range(10, 13))
  found = changes.changes(later, old).set_index('arm')
  assert found.loc['lora', 'how'] == '3 and 4 seeds'
  expected = later.set_index('arm')['mean'] - old.set_index('arm')['mean']
  assert found['difference'].to_dict() == pytest.approx(expected.to_dict())
  few = runs('few', {}, arms, range(2))
  found = changes.changes(few, old)
  assert set(found['change']) == {''} and set(found['how']) == {'fewer than 3 seeds'}
  other = old.assign(metric='f1')
  assert set(changes.changes(new, other).set_index('arm').loc[['full', 'lora'], 'how']) == {
    'not comparable'
  }


# Fronts

point = st.tuples(*[st.integers(0, 6)] * 2, st.integers(0, 3), st.integers(0, 3))


@given(st.lists(point, max_size=9))
def test_fronts_are_those_of_all_pairs(points):
  cost = [float(c) for c, *_ in points]
  value = [float(v) for _, v, *_ in points]
  low = [v - down for _, v, down, _ in points]
  high = [v + up for _, v, _, up in points]
  expected = []
  for i in range(len(points)):
    others = [j for j in range(len(points)) if j != i]
    beaten = any(
      cost[j] <= cost[i] and value[j] >= value[i] and (cost[j] < cost[i] or value[j] > value[i])
      for j in others
    )
    surely = any(cost[j] <= cost[i] and low[j] > high[i] for j in others)
    expected.append('front' if not beaten else 'dominated' if surely else 'within')
  assert pareto.front(cost, value, low, high) == expected


def test_arms_without_a_number_are_compared_with_nothing():
  nan = math.nan
  assert pareto.front([1, nan, 2], [0.5, 0.9, nan]) == ['front', '', '']
  assert pareto.front([1, 2], [0.5, 0.4], [nan, nan], [nan, nan]) == ['front', 'dominated']
  assert pareto.front([], []) == []


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0, 1)), min_size=1, max_size=25))
@example([(1.0, 0.0), (1.0, 2.2e-309)])
def test_names_of_points_do_not_cover_each_other(at):
  points = [
    {'x': x, 'y': y, 'low': y, 'high': y, 'arm': f'arm {i}', 'status': 'dominated'}
    for i, (x, y) in enumerate(at)
  ]
  found = labels.placed(points, 'log')
  places = labels._pixels(points, 'log')
  boxes = [
    labels._box(place, (p['dx'], p['dy']), p['arm'])
    for place, p in zip(places, found, strict=True)
    if p['dx']
  ]
  assert boxes, 'there is room for one'
  for a, b in itertools.combinations(boxes, 2):
    apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    assert apart


def test_frames_of_nothing_are_frames():
  rows = pd.DataFrame(columns=['task', 'fraction', 'arm', 'split', 'values', 'sign'])
  empty = statistics.against_baseline(rows, 'full')
  assert empty.empty and statistics.over_tasks(rows, empty).empty
