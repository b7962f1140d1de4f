"""Rules that say what is held in which format, and runs whose base is."""

import os

import jax
import numpy as np
import pytest
import tiny
from test_end_to_end import BAD, BERT, GOOD, SMALL, reviews

from efft import (
  assemble,
  bundle,
  compact,
  config,
  exchange,
  files,
  main,
  merging,
  pipeline,
  quantize,
  run,
  starting,
  transfer,
  tree,
)
from efft.classifier import Classifier
from efft.errors import InputError
from efft.models.encoder import EncoderConfig
from efft.qtensor import QTensor

VALUES = {'params': tiny.params()}


def held(values):
  """{path: codes} of what is no array."""
  return {p: x.codes for p, x in tree.flatten(values).items() if isinstance(x, QTensor)}


def test_a_format_by_name_takes_kernels_and_large_tables():
  found = held(quantize.quantized(VALUES, 'int8'))
  kernels = {p for p in tree.flatten(VALUES) if p.startswith('params/layer_') and 'kernel' in p}
  assert len(kernels) == 12
  assert set(found) == kernels | {f'params/embed/{n}/embedding' for n in ('word', 'position')}
  assert set(found.values()) == {'int8'}


def test_rounding_of_gradients_at_random_is_a_format_of_the_same_codes():
  """And a base that is int8 already takes it or leaves it."""
  nearest = quantize.quantized(VALUES, 'int8')
  for values in (quantize.quantized(start, 'int8_stochastic') for start in (VALUES, nearest)):
    flat, other = tree.flatten(values), tree.flatten(nearest)
    for path in held(values):
      assert flat[path].stochastic == path.endswith('/kernel'), path
      np.testing.assert_array_equal(flat[path].value, other[path].value)
    back = tree.flatten(quantize.quantized(values, 'int8'))
    assert not any(back[path].stochastic for path in held(values))


def test_the_first_rule_that_matches_wins():
  rules = (
    (r'params/layer_1/mlp/.*/kernel', 'float'),
    (r'params/layer_\d+/mlp/.*/kernel', 'int8_weight'),
    (r'params/layer_\d+/attention/.*/kernel', 'int8'),
  )
  values = quantize.quantized(VALUES, rules)
  flat = tree.flatten(values)
  assert len(held(values)) == 10 and 'params/layer_1/mlp/up/kernel' not in held(values)
  assert flat['params/layer_0/mlp/up/kernel'].inputs == 'float'
  assert flat['params/layer_0/attention/out/kernel'].inputs == 'token'
  for path, x in tree.flatten(VALUES).items():
    if path not in held(values):
      assert flat[path] is x
    else:
      np.testing.assert_allclose(tree.flatten(quantize.floats(values))[path], x, atol=0.01)
  assert quantize.held(values) and not quantize.held(quantize.floats(values))
  again = tree.flatten(quantize.quantized(values, rules))
  assert all(again[path] is x for path, x in flat.items())


@pytest.mark.parametrize(
  'setting, words',
  [
    ('int9', "unknown format 'int9'.* did you mean int"),
    (((quantize.KERNELS, 'int'),), "unknown format 'int'"),
    (((quantize.KERNELS, 'int8'), ('params/layer_7/.*', 'int8')), 'layer_7.*every rule to match'),
    ((('params/layer_0/mlp/up/bias', 'int8'),), 'int8 for params/layer_0/mlp/up/bias.*kernels and'),
    ((('params/.*_norm/scale', 'int8'),), 'kernels and embeddings'),
    ((('params/embed/word/embedding', 'int8_static'),), 'a table has no inputs'),
    ('int8_static', 'nothing has calibrated'),
    ('nf4', 'not cut into blocks of 64'),
    ((('params/(', 'int8'),), 'regular expressions'),
  ],
)
def test_what_a_matrix_cannot_be_is_one_clear_error(setting, words):
  with pytest.raises(InputError, match=words) as error:
    quantize.quantized(VALUES, setting)
  assert error.value.where == 'config.model.quantize'


def test_numbers_that_are_not_finite_have_no_codes():
  flat = tree.flatten(VALUES)
  path = 'params/layer_0/mlp/up/kernel'
  broken = tree.unflatten({**flat, path: flat[path].at[0, 0].set(np.nan)})
  with pytest.raises(InputError, match=f'{path}: numbers that are not finite'):
    quantize.quantized(broken, 'int8')


def test_another_format_of_what_has_one_is_refused():
  kernels = 'params/layer_0/.*/kernel'
  for old, new, words in (
    ('int8', 'int4', 'int4 for params/layer_0/.*, which is int8, .* by token already'),
    ('int8_weight', 'int8', 'int8 for params/layer_0/.*, which is int8, .* float already'),
  ):
    with pytest.raises(InputError, match=words):
      quantize.quantized(quantize.quantized(VALUES, old), ((kernels, new),))


def test_the_summary_counts_bytes():
  lines = quantize.summary(quantize.quantized(VALUES, 'int8'))
  assert 'layer_*/attention/query/kernel x 2: int8, 1x32 scales, inputs int8 by token' in lines
  assert lines[-1].startswith('those of few bits take 0.0 MB') and quantize.summary(VALUES) == []
  assert 'head/out/kernel x 1: float' in lines


def test_the_summary_names_layers_that_differ():
  lines = quantize.summary(quantize.quantized(VALUES, (('.*/layer_1/mlp/.*/kernel', 'int8'),)))
  assert 'layer_{0}/mlp/up/kernel x 1: float' in lines
  assert 'layer_{1}/mlp/up/kernel x 1: int8, 1x48 scales, inputs int8 by token' in lines
  assert 'layer_*/attention/out/kernel x 2: float' in lines


def test_what_is_quantised_does_not_train():
  values = quantize.quantized(VALUES, 'int8')
  with pytest.raises(InputError, match='in group .encoder., and held in int8'):
    assemble.partition(values, (('params/head/.*', 'head'), ('params/.*', 'encoder')))


def test_counts_are_of_the_matrix_not_of_its_parts():
  assert tree.count(quantize.quantized(VALUES, 'int8')) == tree.count(VALUES)


@pytest.mark.parametrize('name', ['loftq', 'pissa'])
def test_methods_that_take_a_part_over_leave_the_rest_quantised(name):
  """Inits see the float kernels; what they leave of them is what is quantised."""
  here = tiny.world(tiny.settings(name, rank=4, alpha=4.0))
  net = assemble.Network(here.model, here.deltas, here.logits)
  key = jax.random.key(0)
  forms = ((r'params/layer_\d+/attention/(query|value)/kernel', 'int8_weight'),)
  plain = assemble.variables(net, tiny.params(), key)
  found = assemble.variables(net, tiny.params(), key, forms=forms)
  assert len(held(found)) == 4
  batch = tiny.batch()
  a, b = (jax.jit(here.logits)(v, batch) for v in (found, plain))
  assert 0 < np.abs(a - b).max() < 0.02 * np.abs(b).max()
  # Reading it again quantises again, to the same integers.
  leaves = {p: x for p, x in tree.flatten(found).items() if p.startswith('delta/')}
  again = transfer.restored(here.deltas, leaves, tiny.params(), forms)
  for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(found), strict=True):
    np.testing.assert_array_equal(x, y)
  with pytest.raises(InputError, match='takes over a part'):
    assemble.variables(net, found['params'], key)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  return reviews(folder / 'reviews.csv')


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
  """LoRA beside an int8 base, by the command line."""
  workdir = tmp_path_factory.mktemp('runs') / 'lora_int8'
  arg = f'configs/lora_int8.py:task={data},model={BERT},text=review,label=verdict'
  assert main.main(['train', f'--config={arg}', f'--workdir={workdir}', *SMALL]) == 0
  return workdir


def test_a_run_beside_an_int8_base_learns_and_says_what_became_of_it(trained):
  results = files.read_json(trained / 'results.json')
  assert results['metrics']['accuracy'] > 0.9
  log = (trained / 'train.log').read_text()
  assert 'layer_*/mlp/up/kernel x 2: int8' in log and 'MB as float32' in log


def test_its_bundle_is_the_delta_and_the_rules_of_the_base(trained):
  content = bundle.load(trained)
  assert content.needs_base and content.quantize == quantize.rules('int8')
  assert not any(isinstance(x, QTensor) for x in content.leaves.values())
  model = Classifier.load(trained)
  assert set(held(model.variables)) == set(
    quantize.formats({'params': starting.pretrained(content)}, 'int8')
  )
  labels = [record['label'] for record in run.predict(trained, [*GOOD, *BAD])]
  assert labels == ['liked', 'liked', 'hated', 'hated']


def test_merged_it_is_float_and_the_difference_is_told(trained, tmp_path):
  with pytest.raises(InputError, match='logits that differ by up to'):
    merging.merge(trained, tmp_path / 'strict', tolerance=1e-6)
  said = merging.merge(trained, tmp_path / 'merged', tolerance=1.0)['merged']
  assert 0 < said['difference'] < 1 and said['flips'] == 0
  content = bundle.load(tmp_path / 'merged')
  assert not held(content.leaves) and content.quantize == () and not content.needs_base


def test_wrong_formats_end_before_anything_is_written(data, tmp_path, capsys):
  arg = f'configs/lora.py:task={data},model={BERT},text=review,label=verdict'
  for value, words in (('int9', 'config.model.quantize'), ('int8_static', 'calibrated')):
    options = [f'--workdir={tmp_path}/run', *SMALL, f'--config.model.quantize={value}']
    assert main.main(['train', f'--config={arg}', *options]) == 2
    assert words in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()


def test_stages_quantise_train_beside_it_merge_and_quantise_again(data, tmp_path):
  """Prune, then quantise; quantise, then LoRA; LoRA, then merge, then quantise again."""
  lora = config.resolve(config.load('configs/lora.py:task=sst2'))
  given = config.load(f'configs/full.py:task={data},model={BERT},text=review,label=verdict')
  with given.unlocked():
    given.model.max_length, given.train.batch_size, given.mesh.devices = 24, 8, 2
    given.optim.lr, given.train.epochs = 1e-2, 3.0
    given.stages = {
      's1_tune': {},
      's2_heads': {'fn': 'prune.heads', 'share': 0.5, 'score': 'magnitude'},
      's3_int8': {'fn': 'quant.quantize', 'examples': 16},
      's4_lora': {'method': lora['method'], 'rules': lora['rules'], 'optim': {'lr': 1e-2}},
      's5_merge': {'fn': 'prune.merge'},
      's6_int8': {'fn': 'quant.quantize', 'format': 'int8_static', 'examples': 16},
    }
  results = pipeline.train(given, tmp_path / 'run')
  rows = {row['stage']: row for row in results['stages']}
  assert results['metrics']['accuracy'] > 0.8
  assert all(row['difference'] > 0 for name, row in rows.items() if name != 's1_tune')
  stages = tmp_path / 'run' / 'stages'
  content = {name: bundle.load(stages / name) for name in rows}
  kinds = {
    name: {x.inputs for x in one.leaves.values() if isinstance(x, QTensor)}
    for name, one in content.items()
  }
  assert kinds['s3_int8'] == {'token', 'float'} and kinds['s6_int8'] == {'static', 'float'}
  assert kinds['s5_merge'] == set() and content['s4_lora'].needs_base
  whole = bundle.load(tmp_path / 'run')
  assert not whole.needs_base and held(whole.leaves)
  small, large = (
    sum(compact.nbytes(x) for p, x in content[n].leaves.items() if p in held(whole.leaves))
    for n in ('s6_int8', 's5_merge')
  )
  assert small < 0.36 * large  # of kernels of 32 rows a tenth is scales
  assert [r['label'] for r in run.predict(tmp_path / 'run', [*GOOD, *BAD])] == [
    'liked', 'liked', 'hated', 'hated',
  ]  # fmt: skip
  with pytest.raises(InputError, match='prune first, then quantise'):
    pipeline.compress(tmp_path / 'run', given_again(data), tmp_path / 'again')


def test_pruned_int8_and_lora_are_one_config(data, tmp_path):
  arg = f'configs/prune_lora_int8.py:task={data},model={BERT},text=review,label=verdict'
  options = [f'--workdir={tmp_path}/run', *SMALL, '--config.train.epochs=4.0']
  options += [f'--config.stages.s{n}.examples=16' for n in ('2_heads', '3_units', '5_int8')]
  options += ['--config.stages.s1_tune.optim.lr=1e-2']
  assert main.main(['train', f'--config={arg}', *options]) == 0
  content = bundle.load(tmp_path / 'run')
  cfg = EncoderConfig.from_dict(content.encoder)
  assert sum(cfg.mlp) == 64 and sum(cfg.heads) == 5 and cfg.vocab_size < 150
  assert held(content.leaves) and content.method and not content.needs_base
  assert [r['label'] for r in run.predict(tmp_path / 'run', [*GOOD, *BAD])] == [
    'liked', 'liked', 'hated', 'hated',
  ]  # fmt: skip
  with pytest.raises(InputError, match='tolerance'):
    exchange.export(tmp_path / 'run', tmp_path / 'strict', tolerance=1e-9)
  exchange.export(tmp_path / 'run', tmp_path / 'hf', tolerance=1.0)
  assert (tmp_path / 'hf' / 'model.safetensors').exists()


def given_again(data):
  given = config.load(f'configs/full.py:task={data},model={BERT},text=review,label=verdict')
  with given.unlocked():
    given.stages = {'s1_heads': {'fn': 'prune.heads', 'share': 0.5, 'score': 'magnitude'}}
  return given
