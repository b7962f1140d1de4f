"""Runs that learn from another run: through the public function, killed, refused, cached."""

import csv
import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from efft import assemble, bundle, config, files, finetune, teacher, tree
from efft.classifier import Classifier
from efft.data import batches
from efft.errors import InputError, Preempted
from efft.training import distil

FIXTURES = Path(__file__).parent / 'fixtures'
GOOD, BAD = ('a gorgeous witty movie', 'a wonderful cast'), ('a waste of time', 'boring and long')
# All that there is, at once, on two devices.
EVERYTHING = {
  'distil.logits': 1.0, 'distil.labels': 0.1, 'distil.hidden': 0.1, 'distil.attention': 0.1,
  'distil.embeddings': 0.1, 'mesh.devices': 2, 'train.accumulate': 2, 'optim.ema': 0.5,
  'train.class_weights': 'balanced', 'model.remat': True,
}  # fmt: skip


def settings(data, model, name='full', **fields):
  cfg = config.load(f'configs/{name}.py:task={data},model={model},text=review,label=verdict')
  fields = {
    'model.max_length': 24, 'train.batch_size': 8, 'mesh.devices': 1, 'train.log_every': 1,
    'optim.lr': 3e-3, 'optim.warmup': 0.0, 'train.save': 'last', **fields,
  }  # fmt: skip
  for field, value in fields.items():
    cfg.update_from_flattened_dict({field: value})
  return cfg


def thin(folder: Path) -> Path:
  """A student for the fixture's encoder: one layer in place of two, half as wide, two heads."""
  shutil.copytree(FIXTURES / 'bert', folder)
  about = json.loads((folder / 'config.json').read_text())
  about |= {'hidden_size': 16, 'num_hidden_layers': 1, 'num_attention_heads': 2}
  about['intermediate_size'] = 32
  (folder / 'config.json').write_text(json.dumps(about))
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  small = {
    name: np.ascontiguousarray(x[tuple(slice({32: 16, 64: 32}.get(n, n)) for n in x.shape)])
    for name, x in tensors.items()
    if '.layer.1.' not in name
  }
  safetensors.numpy.save_file(small, folder / 'model.safetensors')
  return folder


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """Folder with data, a thin student and a teacher that is not sure of itself."""
  folder = tmp_path_factory.mktemp('world')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  draw = random.Random(0)
  with open(folder / 'reviews.csv', 'w', newline='') as file:
    rows = csv.writer(file)
    rows.writerow(['review', 'verdict'])
    for i in range(60):
      liked = i % 2 == 0
      rows.writerow([f'{draw.choice(GOOD if liked else BAD)} {i}', 'liked' if liked else 'hated'])
  thin(folder / 'thin')
  # Its classes stand in the other order.
  cfg = settings(
    folder / 'reviews.csv', FIXTURES / 'bert', **{'train.steps': 6, 'optim.lr': 1e-3,
    'task.labels': ('liked', 'hated')},
  )  # fmt: skip
  finetune.train(cfg, folder / 'teacher')
  return folder


def student(world, name='full', model=None, **fields):
  fields = {'distil.teacher': str(world / 'teacher'), **fields}
  return settings(world / 'reviews.csv', model or world / 'thin', name, **fields)


def texts(world):
  return assemble.sources.load(str(world / 'reviews.csv')).splits['train'].texts


def distance(world, run) -> float:
  """Mean KL of a run's answers to the teacher's on the training texts."""
  p, q = (Classifier.load(folder)(texts(world)) for folder in (world / 'teacher', run))
  p, q = ([[r['scores'][name] for name in ('liked', 'hated')] for r in rows] for rows in (p, q))
  p, q = (np.clip(np.array(rows), 1e-6, 1) for rows in (p, q))
  return float((p * np.log(p / q)).sum(-1).mean())


def records(run):
  return [
    {k: v for k, v in r.items() if k != 'time'} for r in files.read_jsonl(run / 'metrics.jsonl')
  ]


def test_a_student_of_another_size_comes_closer_and_goes_on_after_a_kill(
  world, tmp_path, monkeypatch, caplog
):
  """With every loss at once; the second sitting finds the cache damaged, and the same bits."""
  steps = {'train.steps': 60, 'train.eval_steps': 20}
  whole = finetune.train(student(world, **EVERYTHING, **steps), tmp_path / 'whole')
  finetune.train(student(world, **{'distil.teacher': ''}, **steps), tmp_path / 'alone')
  assert distance(world, tmp_path / 'whole') < 0.5 * distance(world, tmp_path / 'alone')

  train = [r for r in records(tmp_path / 'whole') if r['event'] == 'train']
  names = 'task', 'logits', 'hidden', 'attention', 'embeddings'
  for record in train:
    parts = [record[f'{name}_loss'] for name in names]
    total = np.dot(parts, [0.1, 1.0, 0.1, 0.1, 0.1])
    np.testing.assert_allclose(record['loss'], total, rtol=1e-4)
  for name in names[1:]:
    assert train[-1][f'{name}_loss'] < train[0][f'{name}_loss'], name
  log = (tmp_path / 'whole' / 'train.log').read_text()
  assert '2 layers of 32' in log and f'{2 * 16 * 32:,} numbers project' in log

  # Projections stay behind, and are not counted.
  content = bundle.load(tmp_path / 'whole')
  assert content.leaves and not any('distil' in path for path in content.leaves)
  assert whole['trainable'] == whole['parameters'] == sum(x.size for x in content.leaves.values())

  batch = distil.Guided.batch

  def interrupted(self, index):
    if index == 25:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, index)

  monkeypatch.setattr(distil.Guided, 'batch', interrupted)
  with pytest.raises(Preempted):
    finetune.train(student(world, **EVERYTHING, **steps), tmp_path / 'broken')
  monkeypatch.undo()
  (entry,) = (world / 'cache' / 'teacher').iterdir()
  before = entry.read_bytes()
  entry.write_bytes(before[:-3])
  with caplog.at_level(logging.WARNING):
    finetune.train(student(world, **EVERYTHING, **steps), tmp_path / 'broken', resume='must')
  assert 'damaged' in caplog.text and entry.read_bytes() == before
  weights = Path('bundle') / 'weights.safetensors'
  assert (tmp_path / 'whole' / weights).read_bytes() == (tmp_path / 'broken' / weights).read_bytes()
  assert records(tmp_path / 'whole') == records(tmp_path / 'broken')


def test_answers_are_read_once_and_in_the_students_order(world, monkeypatch):
  cfg = student(world, name='lora')
  job = assemble.prepare(cfg)
  guide = teacher.load(job)
  assert job.data.labels == ('hated', 'liked')
  expected = Classifier.load(world / 'teacher').logits(job.data.splits['train'].texts)
  np.testing.assert_allclose(guide.logits, expected[:, ::-1], rtol=1e-5, atol=1e-5)
  # Logits alone: the step is told of no teacher, and nothing else trains.
  assert guide.variables == {} and guide.parts(job.parts) == job.parts
  assert set(guide.extra.weights) == {'task', 'logits'}
  feed = batches.Batches(job.encoded['train'], 8, 0)
  rows = guide.feed(feed).batch(3)
  np.testing.assert_array_equal(rows['teacher_logits'], guide.logits[feed.rows(3)])

  monkeypatch.setattr(Classifier, 'load', lambda *args, **options: pytest.fail('read again'))
  np.testing.assert_array_equal(teacher.load(job).logits, guide.logits)


def test_projections_are_a_group_of_their_own_that_the_seed_decides(world):
  job = assemble.prepare(student(world, **{'distil.hidden': 1.0, 'distil.logits': 0.0}))
  guide, again = teacher.load(job), teacher.load(job)
  assert guide.logits is None and guide.feed('batches') == 'batches'
  parts = guide.parts(job.parts)
  (path,) = tree.flatten(guide.projections)
  assert path == 'distil/states_1_2/kernel'
  assert parts.groups == {**job.parts.groups, path: 'distil'}
  tree.join(parts.trainable, parts.frozen, guide.variables)  # no two of one path
  kernel, same = (tree.flatten(g.projections)[path] for g in (guide, again))
  np.testing.assert_array_equal(kernel, same)
  job.config['seed'] = 1
  assert not np.array_equal(kernel, tree.flatten(teacher.load(job).projections)[path])


def test_another_tokenizer_leaves_the_logits(world, tmp_path):
  """The teacher reads its own tokens; those of the student would have no sense to it."""
  cfg = student(world, name='lora', model=FIXTURES / 'roberta')
  job = assemble.prepare(cfg)
  train = job.data.splits['train']
  expected = Classifier.load(world / 'teacher').logits(train.texts)[:, ::-1]
  np.testing.assert_allclose(teacher.load(job).logits, expected, rtol=1e-5, atol=1e-5)
  for what in ('hidden', 'attention', 'embeddings'):
    cfg = student(world, name='lora', model=FIXTURES / 'roberta', **{f'distil.{what}': 1.0})
    with pytest.raises(InputError, match='whose tokenizer cuts the texts otherwise') as error:
      finetune.train(cfg, tmp_path / 'run')
    assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_transforms_prepare_beside_a_teacher(world, tmp_path):
  """They train first, in half precision too, and choose among their own group's numbers."""
  fields = {'train.steps': 2, 'distil.hidden': 1.0, 'model.dtype': 'bfloat16'}
  results = finetune.train(student(world, 'lt_sft', **fields), tmp_path / 'run')
  train = [r for r in records(tmp_path / 'run') if r['event'] == 'train']
  assert len(train) == 2 and all(r['hidden_loss'] > 0 for r in train)
  assert np.isfinite(results['metrics']['loss'])
  with np.load(tmp_path / 'run' / 'prepared.npz') as saved:
    assert saved.files and not any('distil' in name for name in saved.files)


def test_tokens_of_another_number_are_the_same_tokens(world, tmp_path):
  """A student whose vocabulary was renumbered pays what it paid before."""
  shutil.copytree(world / 'thin', tmp_path / 'other')
  file = tmp_path / 'other' / 'tokenizer.json'
  content = json.loads(file.read_text())
  vocabulary = content['model']['vocab']
  # Special tokens keep theirs; the others count from the end.
  order = np.r_[:5, len(vocabulary) - 1 : 4 : -1]
  content['model']['vocab'] = {word: int(order[i]) for word, i in vocabulary.items()}
  file.write_text(json.dumps(content))
  tensors = safetensors.numpy.load_file(tmp_path / 'other' / 'model.safetensors')
  (name,) = (name for name in tensors if name.endswith('word_embeddings.weight'))
  tensors[name] = tensors[name][order]
  safetensors.numpy.save_file(tensors, tmp_path / 'other' / 'model.safetensors')

  found = []
  for model in (world / 'thin', tmp_path / 'other'):
    fields = {f'distil.{name}': 1.0 for name in ('hidden', 'attention', 'embeddings')}
    job = assemble.prepare(student(world, model=model, **fields))
    guide = teacher.load(job)
    rows = guide.feed(batches.Batches(job.encoded['train'], 8, 0)).batch(0)
    variables = {**job.variables, **guide.projections, **guide.variables}
    found.append((rows['input_ids'], jax.jit(guide.extra.forward)(variables, rows)[1]))
  (ids, terms), (others, expected) = found
  assert not np.array_equal(ids, others)
  for name, cost in terms.items():
    np.testing.assert_allclose(cost, expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
  'change, where, part',
  [
    ({'distil.teacher': 'nowhere'}, 'nowhere', 'no readable bundle.json'),
    ({'distil.layers': [[0, 2]], 'distil.hidden': 1.0}, 'config.distil.layers', 'teachers up to 1'),
    ({'distil.layers': [[1, 0]], 'distil.attention': 1.0}, 'config.distil.layers', 'students up'),
    ({'distil.logits': 0, 'distil.labels': 0}, 'config.distil', 'no weight above 0'),
    ({'task.labels': ('hated', 'liked', 'odd')}, 'config.distil.teacher', 'liked, hated'),
    ({'distil.temperature': 0.0}, 'config.distil.temperature', 'a number > 0'),
    ({'distil.layers': [[0, 1, 2]]}, 'config.distil.layers', 'student layer, teacher layer'),
    ({'distil.layers': 'first'}, 'config.distil.layers', 'one of last'),
    ({'distil.hidden_loss': 'kl'}, 'config.distil.hidden_loss', 'mse, squared, cosine'),
    ({'distil.hidden': -1.0}, 'config.distil.hidden', 'a number >= 0'),
  ],
)
def test_refusals_come_before_anything_is_written(world, tmp_path, change, where, part):
  with pytest.raises(InputError) as error:
    finetune.train(student(world, **change), tmp_path / 'run')
  assert str(error.value.where) == where and part in str(error.value)
  assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()


def test_a_teacher_of_another_kind_of_task(world, tmp_path):
  file = tmp_path / 'numbers.csv'
  with open(file, 'w', newline='') as stream:
    rows = [[f'{GOOD[i % 2]} {i}', i / 7] for i in range(40)]
    csv.writer(stream).writerows([['review', 'verdict'], *rows])
  with pytest.raises(InputError, match="found 'single'.*expected 'regression'"):
    finetune.train(
      settings(file, world / 'thin', **{'distil.teacher': str(world / 'teacher')}), tmp_path / 'run'
    )


def test_longer_texts_than_the_teacher_can_read(world, tmp_path):
  """Refused where tokens are compared; its logits are of what it can read."""
  shutil.copytree(world / 'thin', tmp_path / 'long')
  about = json.loads((tmp_path / 'long' / 'config.json').read_text())
  about['max_position_embeddings'] = 200
  (tmp_path / 'long' / 'config.json').write_text(json.dumps(about))
  tensors = safetensors.numpy.load_file(tmp_path / 'long' / 'model.safetensors')
  (name,) = (name for name in tensors if name.endswith('position_embeddings.weight'))
  tensors[name] = np.tile(tensors[name], (2, 1))[:200]
  safetensors.numpy.save_file(tensors, tmp_path / 'long' / 'model.safetensors')
  long = {'model': tmp_path / 'long', 'model.max_length': 150}
  job = assemble.prepare(student(world, **long))
  assert teacher.load(job).logits.shape == (len(job.encoded['train']), 2)
  cfg = student(world, **long, **{'distil.hidden': 1.0})
  with pytest.raises(InputError, match='at most 128, the positions of the teacher'):
    finetune.train(cfg, tmp_path / 'run')
