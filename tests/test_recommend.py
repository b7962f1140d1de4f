"""What is recommended under limits, against a loop over everything that was measured."""

import itertools
import math

import pytest
import records as make

from efft import config, files
from efft.errors import InputError
from efft.main import main
from efft.report import recommend as module
from efft.report.recommend import recommend

TRAINED = {arm: numbers[1] for arm, numbers in make.ARMS.items()}
MS = {arm: numbers[2] for arm, numbers in make.ARMS.items()}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  made = make.study(tasks=('sst2',), seeds=range(4))
  for record in made:  # the lower rate of lora is a smaller one
    if record['arm'] == 'lora' and record['overrides']['optim.lr'] < 1e-3:
      record['parameters'] = {'trained': 9_000}
  return make.write(tmp_path_factory.mktemp('runs'), made).parent


def brute(runs, max_ms=math.inf, max_trained=math.inf, min_metric=-math.inf):
  """(arm, setting) of the best mean on validation of what fits, or None."""
  found = {}
  for record in files.read_jsonl(runs / 'records.jsonl'):
    setting = f'optim.lr={record["overrides"]["optim.lr"]}'
    found.setdefault((record['arm'], setting), []).append(record)
  best = None
  for key, group in found.items():
    ms = next(row['p50_ms'] for row in group[0]['latency'] if row['length'] == 128)
    shown, chosen = (
      sum(r['metrics'][half]['accuracy'] for r in group) / len(group)
      for half in ('report', 'validation')
    )
    fits = ms <= max_ms and group[0]['parameters']['trained'] <= max_trained
    if fits and shown >= min_metric and (best is None or chosen > best[0]):
      best = chosen, key
  return best and best[1]


@pytest.mark.parametrize(
  'ms, trained, metric',
  list(itertools.product((2.0, 3.0, 9.5, 100.0), (1e3, 1e4, 1e6, 1e9), (0.5, 0.84))),
)
def test_the_choice_is_the_best_on_validation_of_what_fits(runs, ms, trained, metric):
  expected = brute(runs, ms, trained, metric)
  found = recommend(runs, max_latency_ms=ms, max_trained=trained, min_metric=metric)
  assert found['fits'] == (expected is not None)
  if expected is None:
    assert found['violated'] and 'Nothing that was measured fits' in found['words'][0]
  else:
    assert (found['choice']['arm'], found['choice']['setting']) == expected
    assert found['choice']['low'] <= found['choice']['mean'] <= found['choice']['high']
    assert expected[0] in found['words'][0]


def test_a_smaller_setting_of_an_arm_is_found_where_its_best_is_too_large(runs):
  found = recommend(runs, max_trained=10_000)
  assert (found['choice']['arm'], found['choice']['setting']) == ('lora', 'optim.lr=0.0003')


def test_what_each_constraint_costs_is_the_choice_without_it(runs):
  limits = {'max_latency_ms': 8.0, 'max_trained': 2e7, 'min_metric': 0.6}
  found = recommend(runs, **limits)
  assert [price['constraint'] for price in found['prices']] == list(limits)
  for price in found['prices']:
    others = {name: limit for name, limit in limits.items() if name != price['constraint']}
    without = recommend(runs, **others)['choice']
    assert (price['arm'], price['setting']) == (without['arm'], without['setting'])
    assert price['mean'] == without['mean']
    assert price['difference'] == pytest.approx(without['mean'] - found['choice']['mean'])
  assert found['prices'][2]['same'] and any('costs nothing' in word for word in found['words'])


def test_runners_up_and_what_is_not_told_apart(tmp_path):
  made = []
  for arm, values in (('full', [0.80, 0.82, 0.84]), ('lora', [0.81, 0.81, 0.84]),
                      ('head', [0.70, 0.71, 0.72])):  # fmt: skip
    for seed, value in enumerate(values):
      chosen = {'full': 0.9, 'lora': 0.89, 'head': 0.5}[arm]
      made.append(make.record(arm, seed, value, chosen))
  found = recommend(make.write(tmp_path, made))
  assert found['choice']['arm'] == 'full'
  assert [other['arm'] for other in found['runners_up']] == ['lora', 'head']
  near, far = found['runners_up']
  assert near['verdict'].startswith('not told apart') and far['verdict'].startswith('worse')
  assert any('do not tell full from lora' in word for word in found['words'])


def test_ties_go_to_what_trains_less_and_are_said(tmp_path):
  made = [make.record(arm, seed, 0.8) for arm in ('full', 'lora', 'head') for seed in range(3)]
  found = recommend(make.write(tmp_path, made))
  assert found['choice']['arm'] == 'head'
  assert [other['arm'] for other in found['runners_up']] == ['lora', 'full']
  assert all('tied' in r['verdict'] and 'as good' in r['verdict'] for r in found['runners_up'])


def test_one_seed_says_that_it_is_one(tmp_path):
  made = [make.record('full', 0, 0.8), make.record('lora', 0, 0.7)]
  found = recommend(make.write(tmp_path, made))
  assert math.isnan(found['choice']['low']) and '1 seed' in found['words'][0]
  assert '1 seed in common too few' in found['runners_up'][0]['verdict']


def test_the_nearest_breaks_its_limits_by_the_least_share(runs):
  limits = {'max_latency_ms': 2.5, 'max_trained': 500}
  found = recommend(runs, **limits)
  # Within 20 % and 2,199,900 % (pruned) or 260 % and 54 % (head): the worst counts.
  assert not found['fits'] and found['choice']['arm'] == 'head'
  excess = {broken['constraint']: broken['excess'] for broken in found['violated']}
  assert excess['max_latency_ms'] == pytest.approx(MS['head'] / 2.5 - 1)
  assert excess['max_trained'] == pytest.approx(TRAINED['head'] / 500 - 1)
  assert any('off by 260 %' in word for word in found['words'])


def test_the_relative_limit_is_of_the_best_arm(runs):
  best = recommend(runs)['choice']
  everything = [r['mean'] for r in recommend(runs)['runners_up']] + [best['mean']]
  found = recommend(runs, min_relative_metric=0.99, max_trained=80_000)
  assert found['constraints'][-1] == f'accuracy >= {0.99 * max(everything):.4f}'
  assert found['choice']['arm'] == 'lora'
  assert not recommend(runs, min_relative_metric=0.99, max_trained=1_000)['fits']


def test_less_is_better_for_a_loss(tmp_path):
  made = [
    make.record(arm, seed, metric='loss', higher_is_better=False,
                metrics={'validation': {'loss': loss}, 'report': {'loss': loss}})
    for arm, loss in (('full', 0.3), ('lora', 0.4), ('head', 0.8)) for seed in range(3)
  ]  # fmt: skip
  path = make.write(tmp_path, made)
  assert recommend(path)['choice']['arm'] == 'full'
  found = recommend(path, max_trained=100_000, min_metric=0.5)
  assert found['choice']['arm'] == 'lora' and found['constraints'][-1] == 'loss <= 0.5000'
  assert not recommend(path, max_trained=1_000, min_relative_metric=0.5)['fits']
  assert recommend(path, max_trained=1_000, min_relative_metric=0.375)['fits']


def test_the_best_keeps_a_relative_limit_below_zero(tmp_path):
  made = [
    make.record(arm, seed, metric='matthews',
                metrics={'validation': {'matthews': score}, 'report': {'matthews': score}})
    for arm, score in (('full', -0.1), ('lora', -0.2)) for seed in range(3)
  ]  # fmt: skip
  found = recommend(make.write(tmp_path, made), min_relative_metric=0.97)
  assert found['fits'] and found['choice']['arm'] == 'full'
  assert found['constraints'] == ['matthews >= -0.1030']


def test_shapes_sizes_and_memory_can_be_named(runs):
  found = recommend(runs, max_latency_ms=20, latency_batch=8)
  assert found['constraints'] == ['latency of 8 × 128 tokens, ms <= 20.0']
  assert found['choice']['arm'] == 'pruned + int8'
  assert '1 × 32' in recommend(runs, max_latency_ms=4, latency_length=32)['constraints'][0]
  assert recommend(runs, max_size_mb=30)['choice']['arm'] == 'pruned + int8'
  assert recommend(runs, max_size_mb=0.2, size='bundle')['choice']['arm'] in ('bitfit', 'lora')
  assert recommend(runs, max_memory_mb=302, memory='step')['choice']['arm'] in ('lora', 'bitfit')
  assert recommend(runs, max_memory_mb=121, memory='inference')['fits']


def test_what_no_run_has_measured_is_refused_with_how_to_measure_it(runs, tmp_path):
  path = make.write(tmp_path, [make.record(seed=s, latency=[], memory_mb={}) for s in range(2)])
  with pytest.raises(InputError, match='efft bench --run=RUN --batch=1 --length=128'):
    recommend(path, max_latency_ms=5)
  with pytest.raises(InputError, match='memory_mb.step'):
    recommend(path, max_memory_mb=5)
  with pytest.raises(InputError, match=r'one of 1 x 32, 1 x 128, 8 x 128.*--batch=32 --length=128'):
    recommend(runs, max_latency_ms=5, latency_batch=32)


def test_arms_that_were_not_measured_are_put_aside_and_named(tmp_path):
  made = [make.record('full', s, 0.9, latency=[]) for s in range(3)]
  made += [make.record('lora', s, 0.8) for s in range(3)]
  found = recommend(make.write(tmp_path, made), max_latency_ms=20)
  assert found['choice']['arm'] == 'lora'
  assert any('not measured for full' in note for note in found['notes'])


def test_several_tasks_need_one_to_be_named(tmp_path):
  path = make.write(tmp_path, make.study(('full', 'lora'), seeds=range(2)))
  with pytest.raises(InputError, match=r'--task=mrpc\|sst2'):
    recommend(path)
  assert recommend(path, task='mrpc')['task'] == 'mrpc'
  with pytest.raises(InputError, match='did you mean mrpc?'):
    recommend(path, task='mprc')


@pytest.mark.parametrize('value', [0.0, -1.0, math.nan, math.inf])
def test_limits_are_numbers_above_nothing(runs, value):
  with pytest.raises(InputError, match='--max_trained'):
    recommend(runs, max_trained=value)


def test_the_folder_has_the_config_of_the_best_seed(runs, tmp_path):
  output = tmp_path / 'best'
  found = recommend(runs, max_trained=80_000, output=output)
  made = [
    r for r in files.read_jsonl(runs / 'records.jsonl')
    if r['arm'] == found['choice']['arm']
    and f'optim.lr={r["overrides"]["optim.lr"]}' == found['choice']['setting']
  ]  # fmt: skip
  best = max(made, key=lambda r: r['metrics']['validation']['accuracy'])
  assert files.read_json(output / 'config.json') == best['config']
  assert files.read_json(output / 'recommendation.json')['choice']['arm'] == best['arm']
  text = (output / 'recommendation.md').read_text()
  assert f'efft train --config={output}/config.json --workdir=runs/{best["arm"]}' in text
  assert found['commands'][1] == (
    f'efft export --run=runs/{best["arm"]} --output=runs/{best["arm"]}-whole'
  )
  before = files.digests(output)
  recommend(runs, max_trained=80_000, output=output)
  assert files.digests(output) == before, 'the same records, the same bytes'
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'notes.txt').write_text('x')
  with pytest.raises(InputError, match='something else'):
    recommend(runs, output=tmp_path / 'mine')


def test_the_config_that_is_written_can_be_trained(tmp_path):
  spec = 'configs/lora.py:task=rotten_tomatoes'
  resolved = config.resolve(config.load(spec))
  path = make.write(tmp_path, [make.record('lora', 0, config=resolved)])
  recommend(path, output=tmp_path / 'best')
  assert config.resolve(config.load(f'{tmp_path}/best/config.json')) == resolved


def test_a_run_that_was_kept_is_offered_as_it_is(tmp_path):
  made = [make.record('lora', s, validation=0.8 + 0.01 * s, run=f'runs/{s}') for s in range(2)]
  path = make.write(tmp_path, made)
  kept = tmp_path / 'runs' / '1'
  (kept / 'bundle').mkdir(parents=True)
  (kept / 'config.json').write_text('{}')
  commands = recommend(path)['commands']
  assert commands[0] == f'efft train --config={kept}/config.json --workdir=runs/lora'
  assert commands[-1].startswith(f'efft export --run={kept} --output=')


def test_the_command_line(runs, tmp_path, capsys):
  args = ['recommend', f'--runs={runs}', '--max_latency_ms=9.5', f'--output={tmp_path}/best']
  assert main(args) == 0
  out = capsys.readouterr().out
  assert 'under latency of 1 × 128 tokens, ms <= 9.50' in out and 'efft train --config=' in out
  assert module.lines(recommend(runs, max_latency_ms=9.5))[0] == out.splitlines()[0]
  assert main(['recommend', f'--runs={runs}', '--max_trained=many']) == 2
  assert "--max_trained: found 'many', expected a number" in capsys.readouterr().err
