"""Stages in one config: trained, pruned, trained again, killed and gone on with."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from test_end_to_end import BERT, SMALL, reviews, write_csv

from efft import bundle, config, files, main, pipeline, run
from efft.classifier import Classifier
from efft.compress import base, latency, prune
from efft.data import sources
from efft.errors import InputError
from efft.models import hub
from efft.models.encoder import EncoderConfig

LORA = {'lora': {'fn': 'lora.lora', 'rank': 2, 'targets': 'layer_.*/attention/(query|value)'}}
HALF = {'fn': 'prune.heads', 'share': 0.5, 'score': 'magnitude'}

CUBIC = {'transform': {'fn': 'movement.schedule', 'final': 0.1}}
SCHEDULED = {'optim': {'groups': {'encoder': CUBIC}}}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  return reviews(folder / 'reviews.csv')


def settings(data, name='full', **stages):
  given = config.load(f'configs/{name}.py:task={data},model={BERT},text=review,label=verdict')
  with given.unlocked():
    given.model.max_length, given.train.batch_size, given.mesh.devices = 24, 8, 2
    given.optim.lr, given.train.epochs, given.stages = 1e-3, 1.0, stages
  return given


@pytest.fixture(scope='module')
def staged(data, tmp_path_factory):
  """Full tuning, three stages that prune, LoRA on what is left, with the unpruned as teacher."""
  workdir = tmp_path_factory.mktemp('runs') / 'staged'
  lora = config.resolve(config.load('configs/lora.py:task=sst2'))
  given = settings(
    data,
    **{
      's1_tune': {'train': {'epochs': 2.0}},
      's2_heads': HALF,
      's3_units': {'fn': 'prune.units', 'share': 0.25, 'examples': 16},
      's4_words': {'fn': 'prune.words'},
      's10_tune': {
        'method': lora['method'], 'rules': lora['rules'], 'distil': {'teacher': 'unpruned'},
        'optim': {'lr': 1e-2},
      },
    },
  )  # fmt: skip
  return workdir, given, pipeline.train(given, workdir)


def shape(folder):
  return EncoderConfig.from_dict(bundle.read_about(folder)['encoder'])


def test_stages_follow_each_other(staged):
  workdir, _, results = staged
  names = [row['stage'] for row in results['stages']]
  assert names == ['s1_tune', 's2_heads', 's3_units', 's4_words', 's10_tune']
  whole, *rest = (shape(workdir / 'stages' / name) for name in names)
  assert sum(rest[0].heads) == sum(whole.heads) / 2 and rest[0].mlp == whole.mlp
  assert sum(rest[1].mlp) == round(0.75 * sum(whole.mlp)) and rest[1].heads == rest[0].heads
  assert rest[2].vocab_size < whole.vocab_size
  assert rest[3] == rest[2]
  sizes = [row['parameters'] for row in results['stages']]
  assert sizes[0] > sizes[1] > sizes[2] > sizes[3] < sizes[4]


def test_words_that_no_text_has_change_nothing(staged):
  row = next(r for r in staged[2]['stages'] if r['stage'] == 's4_words')
  assert row['flips'] == 0 and row['difference'] == 0


def test_rows_say_what_evaluation_says(staged):
  workdir, _, results = staged
  for row in results['stages']:
    found = run.evaluate(workdir / 'stages' / row['stage'])
    np.testing.assert_allclose(found['loss'], row['metrics']['loss'], rtol=1e-5)
    assert found['accuracy'] == row['metrics']['accuracy']


def test_differences_are_those_of_the_logits(staged):
  workdir, _, results = staged
  texts = [f'{i} a gorgeous film' for i in range(4)]
  stages = workdir / 'stages'
  old, new = (Classifier.load(stages / n).logits(texts) for n in ('s1_tune', 's2_heads'))
  assert np.abs(old - new).max() > 0
  assert results['stages'][1]['difference'] > 0 and 'difference' not in results['stages'][0]


def test_the_last_bundle_needs_no_other(staged, tmp_path):
  workdir, _, _ = staged
  moved = tmp_path / 'alone'
  shutil.copytree(workdir / 'bundle', moved)
  texts = ['a waste of time', 'a gorgeous witty movie']
  expected = Classifier.load(workdir / 'stages' / 's10_tune').logits(texts)
  np.testing.assert_allclose(Classifier.load(moved).logits(texts), expected, atol=1e-6)
  assert run.evaluate(workdir)['accuracy'] == staged[2]['metrics']['accuracy']


def test_merging_a_pruned_run(staged, tmp_path):
  said = run.merge(staged[0], tmp_path / 'merged')['merged']
  assert said['difference'] < 1e-4


def test_export_of_a_pruned_run(staged, tmp_path):
  run.merge(staged[0], tmp_path / 'merged')
  run.export(tmp_path / 'merged', tmp_path / 'hf', 'hf')
  assert (tmp_path / 'hf' / 'model.safetensors').exists()


@pytest.mark.parametrize('format', ['peft', 'adapterhub'])
def test_no_checkpoint_is_the_base_of_a_pruned_run(staged, tmp_path, format):
  for source in (staged[0], staged[0] / 'stages' / 's10_tune'):
    with pytest.raises(InputError, match='use --format=auto'):
      run.export(source, tmp_path / 'out', format)
  assert not (tmp_path / 'out').exists()


def test_finished_stages_are_not_made_again(staged, tmp_path):
  workdir, given, results = staged
  again = tmp_path / 'again'
  shutil.copytree(workdir, again)
  assert pipeline.train(given, again) == results
  # Killed in the last stage: what comes before is left alone.
  (again / 'results.json').unlink()
  shutil.rmtree(again / 'bundle')
  shutil.rmtree(again / 'stages' / 's4_words')
  shutil.rmtree(again / 'stages' / 's10_tune')
  mark = (again / 'stages' / 's2_heads' / 'bundle' / 'bundle.json').stat().st_mtime_ns
  # The folder's name is part of what a stage starts from.
  for old in (workdir, again):
    shutil.move(old, f'{old}.gone' if old == workdir else workdir)
  found = pipeline.train(given, workdir)
  assert (workdir / 'stages' / 's2_heads' / 'bundle' / 'bundle.json').stat().st_mtime_ns == mark
  assert found['metrics'] == results['metrics']
  first, second = (bundle.load(f) for f in (workdir, f'{workdir}.gone'))
  for path, x in first.leaves.items():
    np.testing.assert_array_equal(x, second.leaves[path], path)


def test_compress_a_run(staged, data, tmp_path, capsys):
  source = staged[0] / 'stages' / 's1_tune'
  args = ['compress', f'--run={source}', '--config=configs/prune_heads.py']
  args += [f'--workdir={tmp_path / "small"}', *SMALL, '--config.stages.s2_heads.share=0.25']
  assert main.main(args) == 0, capsys.readouterr().err
  results = files.read_json(tmp_path / 'small' / 'results.json')
  assert [row['stage'] for row in results['stages']] == ['s2_heads', 's3_tune']
  heads = shape(source).heads
  assert sum(shape(tmp_path / 'small').heads) == sum(heads) - round(0.25 * sum(heads))
  assert 'difference' in results['stages'][0]
  args[1] = f'--run={staged[0]}'
  assert main.main(args) == 2
  assert 'made from the run' in capsys.readouterr().err


def test_compress_for_another_task(staged, tmp_path):
  """The words that stay are those of the task that is named, for a bundle that knows none too."""
  source = staged[0] / 'stages' / 's1_tune'
  rows = [
    (f'a gorgeous film {i}', 'liked') if i % 2 else (f'boring {i}', 'hated') for i in range(48)
  ]
  other = write_csv(tmp_path / 'other.csv', ['review', 'verdict'], rows)
  given = settings(other, s2_words={'fn': 'prune.words', 'characters': False})
  pipeline.compress(source / 'bundle', given, tmp_path / 'run')
  before, after = (
    hub.tokenizer_from(bundle.load(run).tokenizer) for run in (source, tmp_path / 'run')
  )

  def as_before(data):
    texts = sources.load(str(data)).splits['train'].texts
    return all(before.encode(text).tokens == after.encode(text).tokens for text in texts)

  assert as_before(other) and not as_before(staged[1].task.name)


def test_compress_for_other_labels_is_refused(staged, tmp_path):
  rows = [(f'{i} a film', 'good' if i % 2 else 'bad') for i in range(48)]
  other = write_csv(tmp_path / 'other.csv', ['review', 'verdict'], rows)
  with pytest.raises(InputError, match='bad, good, expected single: hated, liked'):
    pipeline.compress(staged[0] / 'stages' / 's1_tune', settings(other, s2=HALF), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_compress_takes_from_the_run_what_is_not_set(staged, tmp_path):
  source = staged[0] / 'stages' / 's1_tune'

  def compressed(name, **fields):
    given = config.load('configs/full.py')
    with given.unlocked():
      given.stages = {'s2_heads': HALF}
    given.update_from_flattened_dict({'mesh.devices': 2, **fields})
    pipeline.compress(source, given, tmp_path / name)
    content, said = bundle.load(tmp_path / name), files.read_json(tmp_path / name / 'config.json')
    return content.max_length, content.dtype, said['task'], said['model']['name']

  own = files.read_json(source / 'config.json')
  assert compressed('same') == (24, 'float32', own['task'], str(BERT))
  found = compressed(
    'set', **{'model.max_length': 16, 'model.dtype': 'bfloat16', 'task.fraction': 0.5}
  )
  assert found == (16, 'bfloat16', {**own['task'], 'fraction': 0.5}, str(BERT))
  for field, value in (('model.name', 'elsewhere'), ('model.pooling', 'mean')):
    with pytest.raises(InputError, match=f'config.{field}: found .{value}'):
      compressed('refused', **{field: value})
  with pytest.raises(InputError, match='positions'):
    compressed('refused', **{'model.max_length': 4096})
  assert not (tmp_path / 'refused').exists()


def test_deltas_that_train_on_follow(data, tmp_path):
  one = {'fn': 'prune.layers', 'remove': 1}
  given = settings(data, 'lora', **{'s1_tune': {}, 's2_heads': HALF, 's3_one': one, 's4_tune': {}})
  pipeline.train(given, tmp_path / 'run')
  stages = tmp_path / 'run' / 'stages'
  before, after = (bundle.load(stages / name) for name in ('s1_tune', 's2_heads'))
  assert before.method == after.method != {}
  paths = [p for p in before.leaves if p.endswith('query/matmul_lora/a')]
  assert paths and all(np.array_equal(before.leaves[p], after.leaves[p]) for p in paths)
  assert shape(tmp_path / 'run').layers == 1


def test_deltas_that_do_not_train_on_are_folded_in(data, tmp_path):
  given = settings(
    data, 'lora',
    **{'s1_tune': {}, 's2_heads': HALF, 's3_tune': {'method': {}, 'rules': [['params/.*', 'all']]}},
  )  # fmt: skip
  pipeline.train(given, tmp_path / 'run')
  assert bundle.load(tmp_path / 'run' / 'stages' / 's2_heads').method == {}


@pytest.mark.parametrize(
  'stages, found',
  [
    ({'s1_heads': HALF}, 'nothing trained before it'),
    ({'s1_tune': {'optim': {'lrr': 1.0}}}, 'lrr'),
    ({'s1_tune': {'task': {'name': 'x'}}}, 'task.name'),
    ({'s1_tune': {'optim': {'lr': -1.0}}}, 'optim.lr'),
    ({'s1_tune': {}, 's2_x': {'fn': 'prune.head'}}, 'prune.head'),
    ({'s1_tune': {}, 's2_x': {'fn': 'prune.heads', 'shares': 1}}, 'shares'),
    ({'s1_tune': {}, 's2_x': {'fn': 'prune.heads', 'score': 'michael'}}, 'did you mean michel'),
    ({'s1_tune': {}, 's2_x': {'fn': 'prune.heads', 'score': 'similarity'}}, 'says nothing about'),
    *(
      (
        {'s1_tune': {}, 's2_x': {'fn': f'prune.{name}', option: value}},
        f'{option} {value!r}.*{found}',
      )
      for name, option, value, found in (
        ('heads', 'scope', 'globl', 'did you mean global'),
        ('heads', 'steps', 0, 'below 1'),
        ('heads', 'share', 1.5, 'below 1'),
        ('heads', 'least', -1, 'below 0'),
        ('heads', 'examples', 0, '1 or more'),
        ('units', 'multiple', 0, 'below 1'),
        ('units', 'share', -0.5, 'from 0'),
        ('layers', 'how', 'topp', 'did you mean top'),
        ('layers', 'remove', -1.0, 'neither'),
        ('hidden', 'share', 1.0, 'below 1'),
        ('hidden', 'examples', 0, '1 or more'),
        ('ziplm', 'speedup', 0.5, 'below 1'),
        ('ziplm', 'dtype', 'bf16', 'did you mean bfloat16'),
        ('ziplm', 'examples', 0, '1 or more'),
        ('ziplm', 'tried_on', 0, 'below 1'),
        ('ziplm', 'evaluations', 0, 'below 1'),
      )
    ),
    ({'s1_tune': {}, 's2_x': 3}, "'prune.heads'"),
    ({'s1_tune': {}, 's2_heads': HALF, 's3_tune': SCHEDULED}, 's3_tune.train.save'),
  ],
)
def test_bad_stages_are_refused_before_any_work(data, tmp_path, stages, found):
  with pytest.raises(InputError, match=found):
    pipeline.train(settings(data, **stages), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'stage, nearest',
  [
    ({'fn': 'prune.heads', 'share': 0.5, 'least': 3}, 'pass'),
    ({'fn': 'prune.heads', 'share': 0.999}, '0 to'),
    ({'fn': 'prune.layers', 'remove': 2}, '0 to 1'),
    ({'fn': 'prune.hidden', 'share': 0.99}, 'a share from 0 to'),
  ],
)
def test_impossible_budgets_name_the_nearest_possible(staged, tmp_path, stage, nearest):
  given = settings(staged[1].task.name, **{'s2_x': stage})
  with pytest.raises(InputError, match=nearest):
    pipeline.compress(staged[0] / 'stages' / 's1_tune', given, tmp_path / 'run')
  # Corrected, it goes on in the same folder; what is done is not made again.
  given = settings(staged[1].task.name, s2_x=HALF, s3_x=stage)
  with pytest.raises(InputError, match=nearest):
    pipeline.compress(staged[0] / 'stages' / 's1_tune', given, tmp_path / 'run')
  mark = (tmp_path / 'run' / 'stages' / 's2_x' / 'stage.json').stat().st_mtime_ns
  given = settings(staged[1].task.name, s2_x=HALF)
  results = pipeline.compress(staged[0] / 'stages' / 's1_tune', given, tmp_path / 'run')
  assert [row['stage'] for row in results['stages']] == ['s2_x']
  assert (tmp_path / 'run' / 'stages' / 's2_x' / 'stage.json').stat().st_mtime_ns == mark


def test_a_run_of_one_stage_is_not_taken_over(data, tmp_path):
  given = settings(data)
  given.train.steps = 1
  pipeline.train(given, tmp_path / 'run')
  (tmp_path / 'run' / 'results.json').unlink()  # as if it had been killed
  before = (tmp_path / 'run' / 'config.json').read_bytes()
  with given.unlocked():
    given.stages = {'s1_tune': {}, 's2_heads': HALF}
  with pytest.raises(InputError, match='another config'):
    pipeline.train(given, tmp_path / 'run')
  assert (tmp_path / 'run' / 'config.json').read_bytes() == before


def test_a_run_in_progress_keeps_its_plan(data, tmp_path):
  """Another process with other stages is refused before it writes anything."""
  workdir = tmp_path / 'run'
  workdir.mkdir()
  there = config.resolve(settings(data, s1_tune={}, s2_heads=HALF))
  files.write_json(workdir / 'config.json', there)
  other = settings(data, s1_tune={}, s2_heads={**HALF, 'share': 0.25})
  with files.RunLock(workdir), pytest.raises(InputError, match='a run in progress'):
    pipeline.train(other, workdir)
  assert files.read_json(workdir / 'config.json') == there
  assert {file.name for file in workdir.iterdir()} == {'config.json', '.lock'}


def test_no_folder_is_made_where_there_is_no_run_to_go_on_with(data, tmp_path):
  given = settings(data, s1_tune={}, s2_heads=HALF)
  with pytest.raises(InputError, match='no run'):
    pipeline.train(given, tmp_path / 'run', resume='must')
  assert not (tmp_path / 'run').exists()
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(InputError, match='a file'):
    pipeline.train(given, tmp_path / 'file')
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_stage_that_was_killed_before_its_row_is_made_by_the_options_of_now(staged, tmp_path):
  source, workdir = staged[0] / 'stages' / 's1_tune', tmp_path / 'run'
  pipeline.compress(source, settings(staged[1].task.name, s2_heads=HALF), workdir)
  for file in ('results.json', 'stages/s2_heads/stage.json'):
    (workdir / file).unlink()
  half_written = workdir / 'stages' / '.efft-tmp-0123'
  half_written.mkdir()
  given = settings(staged[1].task.name, s2_heads={**HALF, 'share': 0.25})
  (row,) = pipeline.compress(source, given, workdir)['stages']
  assert row['heads'] == sum(shape(workdir).heads) == 0.75 * sum(shape(source).heads)
  assert not half_written.exists()


def test_hidden_dimensions(staged, tmp_path):
  source = staged[0] / 'stages' / 's1_tune'
  given = settings(staged[1].task.name, **{'s2_hidden': {'fn': 'prune.hidden', 'examples': 16}})
  results = pipeline.compress(source, given, tmp_path / 'run')
  assert results['stages'][0]['hidden'] == shape(source).hidden * 0.75


def test_a_whole_run_is_a_checkpoint(staged, data, tmp_path):
  """Fine-tuning from a pruned run by its name, with a new head."""
  given = settings(data)
  given.model.name = str(staged[0] / 'stages' / 's4_words')
  given.train.steps = 2
  pipeline.train(given, tmp_path / 'run')
  assert shape(tmp_path / 'run') == dataclasses.replace(shape(staged[0]))
  given.model.name = str(staged[0] / 'stages' / 's10_tune')
  with pytest.raises(InputError, match='efft merge'):
    pipeline.train(given, tmp_path / 'other')


def test_masks_learnt_in_training_are_cut_out_without_a_difference(data, tmp_path):
  given = settings(data, 'block_movement', s1_tune={}, s2_dead={'fn': 'prune.dead'})
  with given.unlocked():
    # Above sigmoid(0) from the first step: all is closed but what always stays.
    given.method.block.size, given.method.block.start, given.method.block.threshold = 8, 0.6, 0.7
    given.optim.groups.schedule.transform.final = 0.7
  results = pipeline.train(given, tmp_path / 'run')
  learnt, cut = results['stages']
  assert cut['heads'] < learnt['heads'] and cut['units'] < learnt['units'] / 4
  assert cut['difference'] < 1e-5 and cut['flips'] == 0
  assert bundle.load(tmp_path / 'run').method == {}


def test_the_unpruned_teacher_is_what_was_there_before_masks(data, tmp_path):
  block = config.resolve(config.load('configs/block_movement.py:task=sst2'))
  masks = {name: block[name] for name in ('method', 'rules', 'optim')}
  masks['method']['block']['size'] = 8
  teacher = {'distil': {'teacher': 'unpruned'}, 'train': {'steps': 2, 'save': 'last'}}
  later = {'s2_learn': {**masks, **teacher}, 's3_dead': {'fn': 'prune.dead'}, 's4_tune': teacher}
  with pytest.raises(InputError, match='s2_learn.distil.teacher: .*, and nothing before'):
    pipeline.train(settings(data, **later), tmp_path / 'none')
  given = settings(data, **{'s1_tune': {**teacher, 'train': {'steps': 1}}, **later})
  pipeline.train(given, tmp_path / 'run')
  stages = tmp_path / 'run' / 'stages'
  found = {
    name: files.read_json(stages / name / 'config.json')['distil']['teacher']
    for name in given.stages
  }
  whole = str(stages / 's1_tune')
  assert found == {'s1_tune': '', 's2_learn': whole, 's3_dead': '', 's4_tune': whole}


def test_masks_that_compress_would_leave_out_are_refused(staged, tmp_path):
  source, name = staged[0] / 'stages' / 's1_tune', staged[1].task.name
  given = settings(name, 'block_movement', s1_tune={}, s2_dead={'fn': 'prune.dead'})
  with pytest.raises(InputError, match='s1_tune: found masks that train .*prune.merge'):
    pipeline.compress(source, given, tmp_path / 'run')
  with pytest.raises(InputError, match='s2_dead: found no masks to fold in'):
    pipeline.compress(source, settings(name, s2_dead={'fn': 'prune.dead'}), tmp_path / 'other')


def test_compress_looks_at_the_data_that_the_run_was_trained_on(tmp_path):
  file = reviews(tmp_path / 'own.csv')
  given = settings(file)
  given.train.steps, given.seed = 1, 3
  pipeline.train(given, tmp_path / 'run')
  smaller = config.load('configs/full.py')
  with smaller.unlocked():
    smaller.stages = {'s2_heads': HALF}
  pipeline.compress(tmp_path / 'run', smaller, tmp_path / 'smaller')
  assert files.read_json(tmp_path / 'smaller' / 'config.json')['seed'] == 3
  with open(file, 'a') as more:
    more.write('a film of another time,liked\n')
  with pytest.raises(InputError, match='data'):
    pipeline.compress(tmp_path / 'run', smaller, tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_as_many_examples_are_looked_at_as_were_asked_for(staged, tmp_path, monkeypatch):
  seen = []

  def act(subject):
    seen.append([float(batch['weights'].sum()) for batch in subject.batches])
    return base.Smaller()

  for asked, expected in ((20, [16, 4]), (32, [16, 16])):
    prune = base.Prune(act, asked)
    monkeypatch.setattr(pipeline, 'call', lambda *args, prune=prune: prune)
    given = settings(staged[1].task.name, s2_heads=HALF)
    pipeline.compress(staged[0] / 'stages' / 's1_tune', given, tmp_path / str(asked))
    assert seen.pop() == expected


def test_ziplm_measures_once_and_meets_its_target(staged, tmp_path, monkeypatch):
  source = staged[0] / 'stages' / 's1_tune'
  cfg = shape(source)
  calls = []

  def measure(cfg, batch, length, dtype):
    calls.append((batch, length))
    attention = {n: 1.0 * n for n in range(cfg.heads[0] + 1)}
    mlp = {n: n / 16 for n in range(0, cfg.mlp[0] + 1, 8)}
    return latency.Table(
      attention, mlp, 1.0, batch, length, 'made up', dtype, cfg.hidden, cfg.head_dim
    )

  monkeypatch.setattr(prune.latency, 'measure', measure)
  stage = {'fn': 'prune.ziplm', 'batch': 4, 'length': 16, 'evaluations': 4, 'examples': 32}
  given = settings(
    staged[1].task.name, s2_one={**stage, 'speedup': 1.5}, s3_two={**stage, 'speedup': 2.5}
  )
  pipeline.compress(source, given, tmp_path / 'run')
  table = measure(cfg, 4, 16, 'float32')
  for name, speedup in (('s2_one', 1.5), ('s3_two', 2.5)):
    small = shape(tmp_path / 'run' / 'stages' / name)
    assert table.predict(cfg) / table.predict(small) >= speedup
  assert len(calls) == 2, 'one by the first stage, none by the second, one here'
  rows = files.read_json(tmp_path / 'run' / 'results.json')['stages']
  assert [row['speedup_asked'] for row in rows] == [1.5, 2.5]
  assert all(row['speedup'] > 0 for row in rows) and '(2.5 asked)' in pipeline.summary(rows[1])
  beyond = settings(staged[1].task.name, s2_one={**stage, 'speedup': 1000.0})
  with pytest.raises(InputError, match='at most|largest'):
    pipeline.compress(source, beyond, tmp_path / 'beyond')
