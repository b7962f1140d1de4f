"""The record of real tiny runs, against what their files and other functions say."""

import json
import math
import os
import shutil

import numpy as np
import pytest
from test_end_to_end import BERT, reviews

from efft import bundle, config, files, main, pipeline, run
from efft.bench import record
from efft.classifier import Classifier
from efft.data import sources
from efft.errors import InputError

LAYERS, HIDDEN, UNITS, LABELS, RANK = 2, 32, 64, 2, 8
DELTA = LAYERS * 2 * RANK * 2 * HIDDEN  # query and value of each layer
KEYS = {
  'schema', 'study', 'run', 'arm', 'overrides', 'seed', 'task', 'metric', 'higher_is_better',
  'status', 'error', 'config', 'config_hash', 'data', 'model', 'versions', 'device', 'metrics',
  'parameters', 'flops', 'memory_mb', 'train', 'latency', 'bytes', 'time',
}  # fmt: skip


@pytest.fixture(scope='module')
def here(tmp_path_factory):
  folder = tmp_path_factory.mktemp('record')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  return folder


def settings(here, name, **stages):
  data = here / 'reviews.csv'
  if not data.exists():
    reviews(data)
  given = config.load(f'configs/{name}.py:task={data},model={BERT},text=review,label=verdict')
  with given.unlocked():
    given.model.max_length, given.train.batch_size, given.mesh.devices = 24, 8, 1
    given.train.steps, given.stages, given.task.halves = 6, stages, True
  return given


@pytest.fixture(scope='module')
def measured(here):
  """(run folder, its record)."""
  folder = here / 'runs' / 'lora'
  pipeline.train(settings(here, 'lora'), folder)
  found = record.measure(
    folder, study='small', arm='LoRA', overrides={'seed': 0}, root=here, latency=[(2, 8, 'f32')]
  )
  return folder, found


@pytest.fixture(scope='module')
def staged(here):
  stages = {
    's1_tune': {'train': {'steps': 3}},
    's2_heads': {'fn': 'prune.heads', 'share': 0.5, 'score': 'magnitude'},
    's3_tune': {'train': {'steps': 2, 'batch_size': 4}, 'rules': [
      ['params/head/.*', 'head'], ['.*', 'frozen'],
    ]},
  }  # fmt: skip
  folder = here / 'runs' / 'staged'
  pipeline.train(settings(here, 'full', **stages), folder)
  return folder, record.measure(folder, splits=('test',))


def in_header(file) -> tuple[int, dict[str, int]]:
  """(bytes of all arrays, {name: numbers}) of a safetensors file, by its header alone."""
  data = file.read_bytes()
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  header.pop('__metadata__', None)
  ends = [entry['data_offsets'] for entry in header.values()]
  return sum(b - a for a, b in ends), {n: math.prod(e['shape']) for n, e in header.items()}


def walked(folder) -> int:
  return sum(
    os.path.getsize(os.path.join(at, n)) for at, _, names in os.walk(folder) for n in names
  )


def forward(length: int) -> int:
  """Products of the fixture's BERT for one text: encoder, pooler, head."""
  layer = length * (4 * HIDDEN**2 + 2 * HIDDEN * UNITS) + 2 * length**2 * HIDDEN
  return 2 * (LAYERS * layer + HIDDEN**2 + HIDDEN * LABELS)


def test_keys_and_identity(measured):
  folder, found = measured
  assert found.keys() == KEYS
  given = files.read_json(folder / 'config.json')
  assert found['config'] == given and found['config_hash'] == config.config_hash(given)
  who = [
    found[n] for n in ('schema', 'study', 'run', 'arm', 'overrides', 'seed', 'status', 'error')
  ]
  assert who == [1, 'small', 'runs/lora', 'LoRA', {'seed': 0}, 0, 'ok', None]
  assert (found['metric'], found['higher_is_better']) == ('accuracy', True)
  machine = files.read_json(folder / 'environment.json')
  assert {'versions': found['versions'], **found['device']} == machine
  assert found['model'] == {
    'name': str(BERT),
    'sha256': bundle.read_about(folder)['base']['sha256'],
  }
  assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_metrics_are_those_of_evaluate(measured):
  folder, found = measured
  assert found['metrics'].keys() == {'validation', 'report', 'test'}
  for split, scores in found['metrics'].items():
    expected = run.evaluate(folder, split=split)
    assert expected.pop('examples') == found['data']['examples'][split]
    assert scores.keys() == expected.keys()
    for name, value in expected.items():
      assert scores[name] == pytest.approx(value, rel=1e-4, abs=1e-5), (split, name)


def test_what_training_scored_is_what_its_bundle_scores(measured):
  """So that a sweep need not score it again."""
  folder, found = measured
  results = files.read_json(folder / 'results.json')
  for split, own in (('validation', results['metrics']), ('report', results['report'])):
    assert own == pytest.approx(found['metrics'][split], rel=1e-4, abs=1e-5)
  given = {'validation': {'accuracy': 0.125}}
  again = record.measure(folder, splits=('validation',), known=given)
  assert again['metrics'] == given


def test_parameters_are_those_of_the_files(measured, tmp_path):
  folder, found = measured
  size, numbers = in_header(folder / 'bundle' / 'weights.safetensors')
  head = HIDDEN * LABELS + LABELS
  assert sum(numbers.values()) == DELTA + head
  run.merge(folder, tmp_path / 'merged')
  _, whole = in_header(tmp_path / 'merged' / 'bundle' / 'weights.safetensors')
  assert found['parameters'] == {
    'trained': DELTA + head, 'stored': size / 4, 'head': head,
    'total': sum(whole.values()) + DELTA,
  }  # fmt: skip
  assert found['bytes']['bundle'] == walked(folder / 'bundle')
  # All but the digits of the metrics that merging has measured anew.
  assert abs(found['bytes']['whole'] - walked(tmp_path / 'merged' / 'bundle')) < 100


def test_operations_and_memory(measured):
  folder, found = measured
  results = files.read_json(folder / 'results.json')
  length = results['step']['length']
  products = forward(length) + 2 * DELTA * length
  # Norms, softmax and GELU are a part of it in a model as small as this one.
  assert products < found['flops']['example'] < 1.3 * products
  # Forward, backward through the inputs, and the updates' own matrices; no weight gradients.
  assert 1.6 * 8 * products < found['flops']['step'] < 3 * 8 * products
  weights = 4 * found['parameters']['total'] / 1e6
  assert found['memory_mb']['inference'] > weights and found['memory_mb']['step'] > weights
  assert found['memory_mb']['peak'] == results['peak_mb']


def test_training(measured):
  folder, found = measured
  results = files.read_json(folder / 'results.json')
  train = found['train']
  for name in ('steps', 'seconds', 'compile_seconds', 'examples_per_second'):
    assert train[name] == pytest.approx(results[name], rel=1e-3)
  assert train['step_ms'] == pytest.approx(8000 / results['examples_per_second'], rel=1e-3)


def test_latency_is_measured_or_taken(measured):
  folder, found = measured
  (row,) = found['latency']
  assert (row['batch'], row['length'], row['precision']) == (2, 8, 'f32') and row['p50_ms'] > 0
  again = record.measure(folder, latency=[row], splits=())
  assert again['latency'] == [row] and again['metrics'] == {}
  assert again['arm'] == 'lora' and again['run'] == str(folder)


def test_stages_add_up(staged):
  folder, found = staged
  parts = [files.read_json(folder / 'stages' / s / 'results.json') for s in ('s1_tune', 's3_tune')]
  assert found['train']['steps'] == 3 + 2
  assert found['train']['seconds'] == pytest.approx(sum(part['seconds'] for part in parts))
  rates = [part['examples_per_second'] for part in parts]
  took = 24 / rates[0] + 8 / rates[1]
  assert found['train']['examples_per_second'] == pytest.approx(32 / took, rel=1e-3)
  assert found['parameters']['trained'] == max(part['trainable'] for part in parts)
  assert found['flops']['step'] == max(part['step']['flops'] for part in parts)
  assert found['flops']['example'] < forward(parts[1]['step']['length'])  # half of the heads
  base = bundle.read_about(folder / 'stages' / 's1_tune')['base']['sha256']
  assert found['model'] == {'name': str(BERT), 'sha256': base}
  assert found['arm'] == 'full + prune.heads' and found['metrics'].keys() == {'test'}
  # It stands alone already.
  assert abs(found['bytes']['whole'] - found['bytes']['bundle']) < 100


def test_data_s_digest_is_of_texts_and_labels(here, measured):
  _, found = measured
  data = sources.load(**found['config']['task'], seed=0)
  assert record.digest(data.splits) == found['data']['sha256']
  assert found['data']['examples'] == {name: len(part) for name, part in data.splits.items()}
  part = data.splits['test']
  labels = part.labels.copy()
  labels[0] = 1 - labels[0]
  for other in (
    {'labels': labels}, {'labels': None}, {'texts': [part.texts[0] + 'x', *part.texts[1:]]},
    {'texts': [part.texts[0] + part.texts[1][:1], part.texts[1][1:], *part.texts[2:]]},
    {'texts': [part.texts[1], part.texts[0], *part.texts[2:]]}, {'pairs': part.texts},
  ):  # fmt: skip
    changed = type(part)(**{**vars(part), **other})
    assert record.digest({**data.splits, 'test': changed}) != found['data']['sha256']
  moved = type(part)(**{**vars(part), 'file': 'elsewhere.csv', 'rows': part.rows + 7})
  assert record.digest({**data.splits, 'test': moved}) == found['data']['sha256']


def test_what_is_not_finite_is_null(measured, tmp_path, monkeypatch):
  copy = tmp_path / 'copy'
  shutil.copytree(measured[0], copy)
  results = files.read_json(copy / 'results.json')
  del results['step']
  # As a run leaves it that was killed after its last step.
  files.write_json(copy / 'results.json', {**results, 'examples_per_second': math.nan})
  monkeypatch.setattr(record, 'scores', lambda *_: {'accuracy': math.nan, 'loss': math.inf})
  found = record.measure(copy)
  assert found['train']['step_ms'] is None and found['train']['steps'] == 6
  assert found['metrics']['test'] == {'accuracy': None, 'loss': None}
  assert 'step' not in found['flops'] and 'step' not in found['memory_mb']
  record.append(tmp_path / 'records.jsonl', found)
  assert files.read_jsonl(tmp_path / 'records.jsonl') == [found]


def test_unfinished_runs_have_no_record(measured, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(measured[0], copy)
  (copy / 'results.json').unlink()
  for folder in (copy, tmp_path / 'nowhere'):
    with pytest.raises(InputError, match='expected the folder of a finished run'):
      record.measure(folder)


def test_failed_runs(here, measured, tmp_path):
  folder, good = measured
  given = config.load('configs/lora.py:task=sst2')
  found = record.failed(given, study='s', arm='a', overrides={'optim.lr': 9.0}, status='diverged',
                        error=ValueError('step 3:\n  loss is nan'))  # fmt: skip
  assert (found['status'], found['error']) == ('diverged', 'step 3: loss is nan')
  assert (found['metric'], found['task'], found['run']) == ('accuracy', 'sst2', '')
  assert found['config'] == config.resolve(given)
  assert found.keys() <= KEYS and not {'metrics', 'train', 'latency', 'device'} & found.keys()
  own = record.failed(good['config'], run=folder, root=here, error='out of memory')
  assert own['device'] == good['device'] and own['run'] == 'runs/lora'
  assert own['arm'] == 'lora' and own['config_hash'] == good['config_hash']
  assert 'metric' not in own  # the data has not been read, and the kind is found by itself
  for one in (found, own, good):
    record.append(tmp_path / 'records.jsonl', one)
  assert files.read_jsonl(tmp_path / 'records.jsonl') == [found, own, good]
  with pytest.raises(ValueError, match='failed'):
    record.failed(given, status='ok', error='')


def test_names_of_arms():
  def named(name, **fields):
    given = config.resolve(config.load(f'configs/{name}.py:task=sst2'))
    given['model'] |= fields
    return record.called(given)

  assert [named(n) for n in ('full', 'lora', 'bitfit')] == ['full', 'lora', 'train params/.*/bias']
  assert named('lora', quantize='int8') == 'lora + int8'
  assert named('lora', quantize=[['.*', 'nf4']]) == 'lora + quantised'
  assert named('prune_heads').startswith('full + prune.heads')
  assert named('galore') == 'galore' and named('head') == 'train params/head/.*'


def test_the_model_measured_is_the_one_that_predicts(measured):
  folder, found = measured
  texts = [f'{i} a gorgeous film' for i in range(3)]
  one, all_ = (Classifier.load(folder, devices=n).logits(texts) for n in (1, None))
  np.testing.assert_allclose(one, all_, rtol=1e-5, atol=1e-6)


def test_bench_adds_a_record(measured, tmp_path, capsys):
  folder, found = measured
  file = tmp_path / 'records.jsonl'
  flags = ['--batch=1', '--length=8', '--precision=f32', '--seconds=0.001', f'--output={file}']
  assert main.main(['bench', f'--run={folder}', '--merged', *flags]) == 0
  (own,) = files.read_jsonl(file)
  assert own.keys() - {'latency_device'} == KEYS
  (row,) = own['latency']
  assert (row['batch'], row['length'], row['merged']) == (1, 8, True)
  assert (tmp_path / own['run']).resolve() == folder.resolve()
  for name in ('data', 'model', 'parameters', 'bytes', 'flops', 'train', 'config_hash'):
    assert own[name] == found[name]
  assert own['metrics']['test'] == pytest.approx(found['metrics']['test'])
  missing = tmp_path / 'missing' / 'records.jsonl'
  assert main.main(['bench', f'--run={folder}', f'--output={missing}']) == 2
  assert 'a folder that exists' in capsys.readouterr().err
