"""Members of a population against the same runs one by one."""

import csv
import dataclasses
import importlib
import random
from pathlib import Path

import numpy as np
import pytest

from efft import bundle, config, files, finetune, population, run, trackers
from efft.errors import InputError
from efft.population import members

BERT = Path(__file__).parent / 'fixtures' / 'bert'
STEPS = 50
# What members and single runs may differ by: products of another shape are summed in another
# order, and adam divides small gradients by their own size.
TOLERANCE = 2e-6


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('EFFT_CACHE', str(folder / 'cache'))
    yield {2: table(folder / 'two.csv', 2), 3: table(folder / 'three.csv', 3)}


def table(file: Path, classes: int) -> Path:
  draw = random.Random(classes)
  words = ('good', 'bad', 'long', 'film', 'plot', 'cast')
  rows = []
  for i in range(80):
    text = ' '.join(draw.choice(words) for _ in range(draw.randint(2, 18)))
    rows.append([f'{words[i % classes]} {text}', f'class {i % classes}'])
  with open(file, 'w', newline='') as sheet:
    csv.writer(sheet).writerows([['text', 'label'], *rows])
  return file


def lora(data, classes=2, **fields):
  given = config.load(f'configs/lora.py:task={data[classes]},model={BERT}')
  # One width for all batches: how far one is padded enters into what dropout draws.
  given.model.max_length, given.model.dropout = 16, 0.1
  given.task.halves, given.train.class_weights = True, 'balanced'
  given.train.batch_size, given.train.steps, given.train.eval_steps = 8, STEPS, 20
  for name, value in fields.items():
    *groups, key = name.split('__')
    node = given
    for group in groups:
      node = node[group]
    node[key] = value
  return given


MEMBERS = {
  'as it is': {},
  'rate, decay, alpha, seed': {
    'optim__lr': 3e-3, 'optim__weight_decay': 0.1, 'method__lora__alpha': 4.0, 'seed': 1,
  },
  'no dropout, half of the data': {'model__dropout': 0.0, 'task__fraction': 0.5},
  'rank, more dropout': {'method__lora__rank': 3, 'seed': 2, 'model__dropout': 0.3},
  # Weights by class, which differ in the members.
  'three classes': {'classes': 3},
}  # fmt: skip


@pytest.fixture(scope='module')
def together(data, tmp_path_factory):
  folder = tmp_path_factory.mktemp('together')
  workdirs = [folder / name for name in MEMBERS]
  results = population.train([lora(data, **own) for own in MEMBERS.values()], workdirs)
  return dict(zip(MEMBERS, zip(results, workdirs, strict=True), strict=True))


@pytest.mark.parametrize('name', MEMBERS)
def test_a_member_is_its_single_run(name, data, together, tmp_path):
  results, workdir = together[name]
  alone = finetune.train(lora(data, **MEMBERS[name]), tmp_path / 'alone')
  ours, theirs = bundle.load(workdir), bundle.load(tmp_path / 'alone')
  assert ours.leaves.keys() == theirs.leaves.keys() and ours.labels == theirs.labels
  for path, x in theirs.leaves.items():
    np.testing.assert_allclose(ours.leaves[path], x, atol=TOLERANCE, rtol=0, err_msg=path)
  assert results['best_step'] == alone['best_step'] and results['trainable'] == alone['trainable']
  assert results['report'] == pytest.approx(alone['report'], abs=1e-3)
  scored = run.evaluate(workdir, split='report')
  assert results['report'] == pytest.approx({k: scored[k] for k in results['report']}, abs=1e-3)
  assert results['metrics'] == pytest.approx(alone['metrics'], abs=1e-3)
  assert {f.name for f in workdir.iterdir()} >= {
    'config.json',
    'results.json',
    'bundle',
    'README.md',
  }
  # Nobody's: all but one are filled up to three classes, and that one has another task.
  assert 'step' not in results and results['examples_per_second'] == 0
  records = [files.read_jsonl(folder / 'metrics.jsonl') for folder in (workdir, tmp_path / 'alone')]
  steps = [[(r['event'], r['step']) for r in found] for found in records]
  assert steps[0] == steps[1]
  losses = [[r['loss'] for r in found] for found in records]
  np.testing.assert_allclose(*losses, atol=1e-3)


def test_members_differ(together):
  """Or the test before would say nothing of what makes them differ."""
  found = [bundle.load(workdir).leaves for _, workdir in together.values()]
  path = next(p for p in found[0] if p.endswith('matmul_lora/b') and 'layer_0' in p)
  for i, a in enumerate(found):
    for b in found[:i]:
      assert np.abs(a[path][:3] - b[path][:3]).max() > 10 * TOLERANCE


def test_what_a_step_costs_is_told_of_members_of_full_size(data, tmp_path):
  ranks, workdirs = (2, 8, 8), [tmp_path / str(i) for i in range(3)]
  members = [lora(data, method__lora__rank=r, seed=i) for i, r in enumerate(ranks)]
  results = population.train(members, workdirs)
  alone = finetune.train(members[1], tmp_path / 'alone')
  assert 'step' not in results[0] and results[0]['examples_per_second'] == 0
  for found in results[1:]:
    assert found['step']['length'] == alone['step']['length']
    assert found['step']['flops'] == pytest.approx(alone['step']['flops'], rel=0.02)
    assert found['examples_per_second'] > 0


def test_a_finished_member_is_not_made_again(data, together):
  results, workdir = together['as it is']
  before = files.digests(workdir)
  assert population.train([lora(data)], [workdir]) == [files.read_json(workdir / 'results.json')]
  assert files.digests(workdir) == before


def test_halving_keeps_the_best_in_the_same_places(data, together, tmp_path):
  own = [{'seed': 3}, {}, {'optim__lr': 1e-9, 'seed': 4}, {'seed': 5, 'optim__lr': 2e-3}]
  own = [{'train__class_weights': (1.0, 3.0), **fields} for fields in own]
  workdirs = [tmp_path / str(i) for i in range(4)]
  results = population.train(
    [lora(data, **fields) for fields in own], workdirs, places=2, rungs={20: 2, 40: 1}
  )
  told = [
    [r for r in files.read_jsonl(w / 'metrics.jsonl') if r['event'] == 'eval'] for w in workdirs
  ]
  at = {20: {}, 40: {}}
  for i, rows in enumerate(told):
    for row in rows:
      if row['step'] in at:
        at[row['step']][i] = row['accuracy']
  assert list(at[20]) == [0, 1, 2, 3]
  going = sorted(at[20], key=lambda i: -at[20][i])[:2]
  assert sorted(at[40]) == sorted(going)
  winner = max(sorted(going), key=lambda i: at[40][i])
  assert [i for i, r in enumerate(results) if 'stopped' not in r] == [winner]
  assert {r['stopped'] for r in results if 'stopped' in r} == {20, 40}
  assert [(w / 'bundle').exists() for w in workdirs] == [i == winner for i in range(4)]
  finetune.train(lora(data, **own[winner]), tmp_path / 'alone')
  found = bundle.load(workdirs[winner]).leaves
  for path, x in bundle.load(tmp_path / 'alone').leaves.items():
    np.testing.assert_allclose(found[path], x, atol=TOLERANCE, rtol=0, err_msg=path)


def test_a_member_that_diverges_leaves_the_others_alone(data, tmp_path):
  def losses(rate, name):
    rates = 1e-3, rate, 2e-3
    workdirs = [tmp_path / f'{name}{i}' for i in range(3)]
    results = population.train([lora(data, optim__lr=x) for x in rates], workdirs)
    found = [bundle.load(w).leaves if (w / 'bundle').exists() else None for w in workdirs]
    return results, found

  healthy, before = losses(3e-3, 'healthy')
  ill, after = losses(1e38, 'ill')
  assert 'diverged' in ill[1] and after[1] is None and 'diverged' not in healthy[1]
  for i in (0, 2):
    assert ill[i]['metrics'] == healthy[i]['metrics']
    for path, x in before[i].items():
      np.testing.assert_array_equal(after[i][path], x)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'optim__groups': {'head': {'lr': 1e-2}}}, 'another config.optim.groups'),
    ({'train__batch_size': 4}, 'another config.train.batch_size, expected differences in seed, '),
    ({'distil__teacher': 'runs/large'}, 'a teacher, .* expected plain runs'),
    ({'task__fraction': 0.5, 'train__steps': None}, 'train.steps'),
  ],
)
def test_what_cannot_train_together_is_refused(fields, message, data, tmp_path):
  with pytest.raises(InputError, match=message):
    population.train([lora(data), lora(data, **fields)], [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())


def test_a_number_is_in_all_members_or_in_none(data, tmp_path):
  groups = {'head': {'lr': 1e-2}}, {'head': {'lr': 1e-2}, 'delta': {'lr': 1e-3}}
  own = [lora(data, optim__groups=some) for some in groups]
  with pytest.raises(InputError, match='b with another config.optim.groups.delta.lr'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])


def test_numbers_that_a_method_decides_by_are_refused(data, tmp_path):
  own = [lora(data), lora(data, method__lora__alpha=4.0)]
  for given in own:
    given.method.lora.alpha_pattern = [('layer_0.*', 2.0)]
  with pytest.raises(InputError, match='members that differ in method.lora.alpha'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())


def test_a_smaller_rank_of_some_sites_alone_is_refused(data, tmp_path):
  own = [lora(data), lora(data, method__lora__rank=3)]
  for given in own:
    given.method.lora.rank_pattern = [('layer_0.*', 2)]
  with pytest.raises(InputError, match='method.lora: found ranks 3, 8'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])


def test_ranks_of_several_sizes_go_by_no_optimiser_of_whole_matrices(data, tmp_path):
  own = [lora(data, optim__name='adafactor', method__lora__rank=rank) for rank in (4, 8)]
  with pytest.raises(InputError, match='several sizes with adafactor'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['dora', 'dylora'])
def test_ranks_of_a_method_that_cannot_be_filled_up_are_refused(name, data, tmp_path):
  own = [lora(data), lora(data)]
  for rank, given in enumerate(own, 2):
    given.method = {name: {'fn': f'lora.{name}', 'rank': rank}}
  with pytest.raises(InputError, match=f'method.{name}.*ranks 2, 3'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])


def test_pieces_of_several_sizes_are_refused(data, tmp_path):
  own = [lora(data, train__accumulate=3, seed=seed) for seed in range(2)]
  with pytest.raises(InputError, match='accumulate=3 of batches of 8'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'])


def test_each_member_tells_its_own_trackers(data, tmp_path, monkeypatch):
  told = []

  class Writer:
    def __init__(self, folder, config):
      self.name = Path(folder).parent.name

    def resume(self, step):
      told.append((self.name, 'resume', step))

    def write(self, records):
      told.extend((self.name, r['event'], r['step']) for r in records)

    def close(self):
      told.append((self.name, 'close', None))

  monkeypatch.setattr(trackers, 'TensorBoard', Writer)
  own = [
    lora(data, seed=s, train__steps=2, train__eval_steps=2, trackers=('tensorboard',))
    for s in range(2)
  ]
  population.train(own, [tmp_path / 'a', tmp_path / 'b'])
  events = [('resume', 0), ('train', 1), ('train', 2), ('eval', 2), ('close', None)]
  for name in 'ab':
    assert [event for who, *event in told if who == name] == [list(event) for event in events]
    records = files.read_jsonl(tmp_path / name / 'metrics.jsonl')
    assert [(r['event'], r['step']) for r in records] == events[1:-1]


def test_scores_of_several_metrics_are_not_ranked(data, tmp_path, monkeypatch):
  module = importlib.import_module('efft.population.train')

  def gather(*args):
    first, other = members.gather(*args)
    task = dataclasses.replace(other.job.data, metrics=('matthews',))
    other.job = dataclasses.replace(other.job, data=task)
    return [first, other]

  monkeypatch.setattr(module, 'gather', gather)
  own = [lora(data), lora(data, seed=1)]
  with pytest.raises(InputError, match='tasks of accuracy, matthews'):
    population.train(own, [tmp_path / 'a', tmp_path / 'b'], rungs={10: 1})
