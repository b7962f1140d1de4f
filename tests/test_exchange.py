"""Other libraries' adapters as run folders and back: the whole way, by files and command line."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import peer_files
import pytest
from moved import FIXTURES, LABELS, tokenizer, trained
from safetensors.numpy import load_file, save_file

from efft import bundle, config, exchange, main, run, starting
from efft.classifier import Classifier
from efft.errors import EfftError, InputError

PEFT = FIXTURES / 'peft' / 'bert' / 'lora_default'
HUB = FIXTURES / 'adapters' / 'bert' / 'seq_bn'
INPUTS = ('input_ids', 'mask', 'token_types')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """The encoder that the libraries' adapters are of, with a tokenizer of its size."""
  folder = tmp_path_factory.mktemp('base') / 'bert'
  shutil.copytree(FIXTURES / 'base' / 'bert', folder)
  size = json.loads((folder / 'config.json').read_text())['vocab_size']
  cut = json.loads(tokenizer('bert'))
  vocab = cut['model']['vocab']
  cut['model']['vocab'] = {token: i for token, i in vocab.items() if i < size}
  (folder / 'tokenizer.json').write_text(json.dumps(cut))
  return folder


@pytest.fixture(scope='module')
def reviews(tmp_path_factory):
  file = tmp_path_factory.mktemp('data') / 'reviews.csv'
  rows = [f'a movie {i},{LABELS[i % 3]}' for i in range(30)]
  file.write_text('\n'.join(['text,label', *rows]))
  return file


def imported(source, base, output, **options):
  return exchange.import_adapter(source, str(base), output, labels=LABELS, **options)


def logits(folder, batch) -> np.ndarray:
  model = Classifier.load(folder, devices=1)
  return np.asarray(model.apply(model.variables, {name: batch[name] for name in INPUTS}))


@pytest.mark.parametrize(
  ('source', 'library', 'form'), [(PEFT, 'peft', 'peft'), (HUB, 'adapters', 'adapterhub')]
)
def test_an_imported_run_gives_the_librarys_logits(source, library, form, base, tmp_path):
  done = imported(source, base, tmp_path / 'run')
  assert done['format'] == form and done['kind'] == 'single'
  peer = peer_files.read(library, 'bert', source.name)
  np.testing.assert_allclose(logits(tmp_path / 'run', peer.batch), peer.logits, rtol=0, atol=1e-5)
  (record,) = run.predict(tmp_path / 'run', ['a movie'])
  assert set(record['scores']) == set(LABELS)
  with pytest.raises(InputError, match='no config.json, so no task'):
    run.evaluate(tmp_path / 'run')


def test_an_imported_run_with_a_task_is_evaluated_and_trained_on(base, reviews, tmp_path):
  folder = tmp_path / 'run'
  exchange.import_adapter(PEFT, str(base), folder, task=f'{reviews},labels={"|".join(LABELS)}')
  scores = run.evaluate(folder)
  assert 0 <= scores['accuracy'] <= 1
  cfg = config.load(str(folder / 'config.json'))
  cfg.optim.lr = 1e-9
  cfg.train.steps, cfg.mesh.devices, cfg.model.max_length = 1, 1, 16
  run.train(cfg, tmp_path / 'next')
  batch = peer_files.read('peft', 'bert', PEFT.name).batch
  # One step of next to no size: it went on from the adapter and its head, not from new ones.
  np.testing.assert_allclose(
    logits(tmp_path / 'next', batch), logits(folder, batch), rtol=0, atol=1e-4
  )


@pytest.mark.parametrize(
  ('method', 'form', 'layout'),
  [
    ('lora', 'peft', 'safetensors'),
    ('ia3', 'peft', 'safetensors'),
    ('lora', 'adapterhub', 'safetensors'),
    ('pfeiffer', 'adapterhub', 'bin'),
  ],
)
@pytest.mark.parametrize('architecture', ['bert', 'roberta', 'distilbert'])
def test_what_is_exported_is_imported_again(architecture, method, form, layout, tmp_path):
  folder = tmp_path / 'run'
  trained(folder, method, 1, architecture=architecture)
  said = exchange.export(folder, tmp_path / 'out', form, layout=layout)
  assert said['difference'] < 1e-5 and said['flips'] == 0
  model = tmp_path / 'model'
  shutil.copytree(FIXTURES / architecture, model)
  (model / 'tokenizer.json').write_text(tokenizer(architecture))
  imported(tmp_path / 'out', model, tmp_path / 'again')
  texts = ['a gorgeous movie', 'a waste of time']
  one, two = (Classifier.load(place).logits(texts) for place in (folder, tmp_path / 'again'))
  np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
  # A second export of what came back is the first one, to the byte.
  exchange.export(tmp_path / 'again', tmp_path / 'twice', form, layout=layout)
  for file in sorted((tmp_path / 'out').iterdir()):
    if file.suffix in ('.safetensors', '.bin'):
      assert file.read_bytes() == (tmp_path / 'twice' / file.name).read_bytes(), file.name


def copy(source: Path, folder: Path) -> Path:
  shutil.copytree(source, folder)
  return folder


def truncate(folder):
  file = next(folder.glob('adapter*.safetensors'))
  file.write_bytes(file.read_bytes()[:-7])


def misshape(folder):
  file = next(folder.glob('adapter*.safetensors'))
  tensors = load_file(file)
  name = next(n for n in sorted(tensors) if tensors[n].ndim == 2)
  save_file({**tensors, name: tensors[name][:, :-1].copy()}, file)


def poison(folder):
  file = next(folder.glob('adapter*.safetensors'))
  tensors = load_file(file)
  name = sorted(tensors)[0]
  save_file({**tensors, name: np.full_like(tensors[name], np.nan)}, file)


def rename(folder):
  file = folder / 'adapter_config.json'
  found = json.loads(file.read_text())
  if 'peft_type' in found:
    found['peft_type'] = 'TELEPATHY'
  else:
    found['config']['architecture'] = 'telepathy'
  file.write_text(json.dumps(found))


def empty(folder):
  (folder / 'adapter_config.json').write_text('{}')


def drop(folder):
  next(folder.glob('adapter*.safetensors')).unlink()


@pytest.mark.parametrize('source', [PEFT, HUB], ids=['peft', 'adapterhub'])
@pytest.mark.parametrize(
  ('damage', 'says'),
  [
    (truncate, 'truncated'),
    (misshape, '31'),
    (poison, 'NaN or infinite'),
    (rename, '(?i)telepathy'),
    (empty, 'neither peft_type nor config'),
    (drop, 'complete the checkpoint'),
  ],
)
def test_damage_is_named_and_nothing_is_written(source, damage, says, base, tmp_path):
  folder = copy(source, tmp_path / 'source')
  damage(folder)
  with pytest.raises(InputError, match=says):
    imported(folder, base, tmp_path / 'run')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['source']


@pytest.mark.parametrize('name', ['../up', 'a/b', '', '.hidden', 'x' * 300])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
  trained(tmp_path / 'run', 'pfeiffer', 1)
  with pytest.raises(InputError, match='--name'):
    exchange.export(tmp_path / 'run', tmp_path / 'out', 'adapterhub', name=name)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['run']


def test_the_classes_of_a_head_keep_their_names_beside_a_task(base, reviews, tmp_path):
  """AdapterHub's heads are named; the task has the same names in another order."""
  source = copy(HUB, tmp_path / 'named')
  about = json.loads((source / 'head_config.json').read_text())
  own = [LABELS[i] for i in (2, 0, 1)]
  about['label2id'] = {name: i for i, name in enumerate(own)}
  (source / 'head_config.json').write_text(json.dumps(about))
  task = f'{reviews},labels={"|".join(LABELS)}'
  exchange.import_adapter(source, str(base), tmp_path / 'alone')
  done = exchange.import_adapter(source, str(base), tmp_path / 'run', task=task)
  assert done['labels'] == list(LABELS)
  alone, beside = (next(run.predict(tmp_path / f, ['a movie'])) for f in ('alone', 'run'))
  assert beside['scores'] == pytest.approx(alone['scores'], abs=1e-6)
  about['label2id'] = {'a': 0, 'b': 1, 'c': 2}
  (source / 'head_config.json').write_text(json.dumps(about))
  with pytest.raises(InputError, match='the head of a, b, c.*as in the task'):
    exchange.import_adapter(source, str(base), tmp_path / 'other', task=task)
  done = exchange.import_adapter(source, str(base), tmp_path / 'other', task=task, labels=own)
  told = next(run.predict(tmp_path / 'other', ['a movie']))
  assert told['scores'] == pytest.approx(alone['scores'], abs=1e-6)
  # Numbers are no names: alone they are kept, beside a task they are taken to be in its order.
  about['label2id'] = {str(i): i for i in range(3)}
  (source / 'head_config.json').write_text(json.dumps(about))
  done = exchange.import_adapter(source, str(base), tmp_path / 'numbered')
  assert done['labels'] == ['0', '1', '2']
  done = exchange.import_adapter(source, str(base), tmp_path / 'in order', task=task)
  assert done['labels'] == list(LABELS)


def test_an_adapter_of_a_quantised_base_is_compared_beside_the_float_one(tmp_path):
  folder = tmp_path / 'run'
  trained(folder, 'lora', 1)
  content = bundle.load(folder)
  shutil.rmtree(folder / 'bundle')
  content = dataclasses.replace(content, quantize=(('params/layer_.*/kernel', 'int8'),))
  bundle.save(folder / 'bundle', content)
  with pytest.raises(InputError, match='--tolerance'):
    exchange.export(folder, tmp_path / 'out', 'peft', tolerance=1e-6)
  said = exchange.export(folder, tmp_path / 'out', 'peft', tolerance=10.0)
  model = tmp_path / 'model'
  shutil.copytree(FIXTURES / 'bert', model)
  (model / 'tokenizer.json').write_text(tokenizer('bert'))
  imported(tmp_path / 'out', model, tmp_path / 'again')
  texts = ['a gorgeous movie', 'a waste of time']
  one, two = (Classifier.load(place).logits(texts) for place in (folder, tmp_path / 'again'))
  assert 0 < np.abs(one - two).max() and said['difference'] > 0
  assert any('quantised' in note for note in said['notes'])


def test_a_head_without_names_asks_for_them(base, tmp_path):
  with pytest.raises(InputError, match='--labels: found no class names, expected 3'):
    exchange.import_adapter(PEFT, str(base), tmp_path / 'run')
  with pytest.raises(InputError, match='2 names'):
    exchange.import_adapter(PEFT, str(base), tmp_path / 'run', labels=['a', 'b'])


def test_the_command_line_imports_merges_and_exports(base, tmp_path, capsys):
  def efft(*args):
    assert main.main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out

  labels = f'--labels={",".join(LABELS)}'
  out = efft('import', f'--source={PEFT}', f'--base={base}', f'--output={tmp_path}/run', labels)
  assert 'peft' in out
  assert 'difference' in efft('merge', f'--run={tmp_path}/run', f'--output={tmp_path}/whole')
  for form in ('auto', 'hf', 'peft', 'adapterhub'):
    flags = f'--run={tmp_path}/run', f'--output={tmp_path}/{form}', f'--format={form}'
    assert 'difference' in efft('export', *flags)
  assert (tmp_path / 'hf' / 'model.safetensors').exists()
  assert not bundle.load(tmp_path / 'whole').needs_base


def test_another_base_is_refused(base, tmp_path):
  imported(PEFT, base, tmp_path / 'run')
  content = bundle.load(tmp_path / 'run')
  other = copy(base, tmp_path / 'other')
  tensors = load_file(other / 'model.safetensors')
  name = sorted(tensors)[0]
  save_file({**tensors, name: tensors[name] + 1}, other / 'model.safetensors')
  content.base['path'] = str(other)
  with pytest.raises(EfftError, match='sha256'):
    starting.pretrained(content)
