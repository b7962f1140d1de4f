"""Stages that quantise: near the float model, integers by hand, and through the command."""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest
import tiny
from test_end_to_end import BERT, SMALL, reviews

from efft import assemble, bundle, files, main, qtensor, quantize, run, tree
from efft.classifier import Classifier
from efft.compress import base, calibrate, prune, quant
from efft.errors import InputError
from efft.models import quantized
from efft.peft import base as peft
from efft.qtensor import QTensor
from efft.training import losses

F = np.float32
CFG = dataclasses.replace(tiny.SHORT, mlp=(64,))
BATCHES = [tiny.batch(rows=8, seed=i, cfg=CFG) for i in range(3)]
# Options, and how far logits may be off, as a share of their spread. The tables are int8 in all.
KINDS = {
  'dynamic': ({'format': 'int8'}, 0.1),
  'static': ({'format': 'int8_static'}, 0.15),
  'asymmetric': (
    {'format': 'int8_static', 'ranges': 'percentile', 'percentile': 99.99, 'symmetric': False},
    0.15,
  ),
  'groups': (
    {'format': 'int8_static', 'ranges': 'mse', 'symmetric': False, 'groups': 4, 'smooth': 0.5},
    0.1,
  ),
  'smooth': ({'format': 'int8', 'smooth': 0.5, 'rounding': 'gptq'}, 0.1),
  'gptq4': ({'format': 'int4', 'weights': 'mse', 'rounding': 'gptq'}, 0.6),
}
INTEGERS = ('static', 'asymmetric', 'groups')


def subject_of(here) -> base.Subject:
  net = assemble.Network(here.model, here.deltas, here.logits)
  return base.Subject(net, here.variables, losses.single(), BATCHES)


def changed(variables, **leaves):
  """Variables with other numbers at the ends of some paths ('mlp_norm_bias')."""
  values = tree.map_paths(lambda p, x: np.array(x), variables)
  for path, x in tree.flatten(values).items():
    for name, change in leaves.items():
      if path.replace('/', '_').endswith(name):
        change(x)
  return values


@pytest.fixture(scope='module')
def subject():
  """With an outlier among the inputs of the last block, as trained BERTs have them."""
  here = tiny.world(tiny.settings('full'), CFG)

  def outlier(bias):
    bias[5] = 12.0

  return subject_of(here._replace(variables=changed(here.variables, attention_norm_bias=outlier)))


def kernels(values) -> dict:
  """{'layer_0/mlp/up': kernel} of the layers."""
  flat = tree.flatten(values['params'])
  return {
    path.removesuffix('/kernel'): x
    for path, x in flat.items()
    if path.startswith('layer_') and path.endswith('/kernel')
  }


@pytest.fixture(scope='module')
def inputs(subject):
  return calibrate.observe(subject, kernels(subject.variables), hessians=True)


@pytest.fixture(scope='module')
def made(subject, inputs):
  """(options) -> variables; the inputs are observed once for all."""

  def make(**options):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(calibrate, 'observe', lambda subject, paths, **_: {p: inputs[p] for p in paths})
      return quant.quantize(**options).act(subject).variables

  return make


@pytest.fixture(scope='module')
def variables(made):
  return {kind: made(**options) for kind, (options, _) in KINDS.items()}


@pytest.mark.parametrize('kind', KINDS)
def test_logits_are_near_the_float_models(kind, variables, subject):
  values, say = variables[kind], jax.jit(subject.logits)
  found, expected = (
    np.concatenate([say(v, b) for b in BATCHES]) for v in (values, subject.variables)
  )
  assert 0 < np.abs(found - expected).max() < KINDS[kind][1] * expected.std()
  names = {re.sub(r'\d', '*', p) for p, x in tree.flatten(values).items() if isinstance(x, QTensor)}
  assert names == {
    'params/embed/word/embedding', 'params/embed/position/embedding',
    *(f'params/layer_*/attention/{n}/kernel' for n in ('query', 'key', 'value', 'out')),
    *(f'params/layer_*/mlp/{n}/kernel' for n in ('up', 'down')),
  }  # fmt: skip


@jax.jit
def steps(x, q):
  """(integers of the inputs, their products) of each group, and the product as a whole."""
  integers, products, size = [], [], x.shape[1] // len(q.x_scale)
  given = x
  if q.smooth is not None:
    x = x * (1 / q.smooth)
  if q.order is not None:
    x = x[:, q.order]
  for g in range(len(q.x_scale)):
    part = slice(g * size, (g + 1) * size)
    zero = 0 if q.x_zero is None else q.x_zero[g]
    integers.append(quantized.static(x[:, part], q.x_scale[g], zero))
    products.append(quantized.multiply(integers[-1], q.value[part]))
  return integers, products, quantized.dot_general(given, q, (((1,), (0,)), ((), ())))


@pytest.mark.parametrize('kind', INTEGERS)
@pytest.mark.parametrize('place', ['attention/out', 'mlp/up', 'mlp/down'])
def test_products_of_static_inputs_are_the_integers_by_hand(
  kind, place, variables, subject, inputs
):
  """From float numbers to sums of integers to the last bit, then to the product."""
  path = f'layer_0/{place}'
  x, w, q = inputs[path].rows, kernels(subject.variables)[path], kernels(variables[kind])[path]
  integers, products, y = jax.device_get(steps(x, q))
  if q.smooth is not None:
    x, w = x * (F(1) / q.smooth), w * q.smooth[:, None]
  if q.order is not None:
    x, w = x[:, q.order], w[q.order]
  scale = np.abs(w).max(0) / F(127)
  codes = np.clip(np.rint(w / scale), -127, 127).astype(np.int64)
  np.testing.assert_array_equal(q.value, codes)
  size, total = len(w) // len(q.x_scale), 0
  for g, step in enumerate(q.x_scale):
    part = slice(g * size, (g + 1) * size)
    zero = 0 if q.x_zero is None else int(q.x_zero[g])
    units = np.rint(x[:, part] * (F(1) / step)) + F(zero)
    expected = np.clip(units, -127 if q.x_zero is None else -128, 127).astype(np.int64)
    np.testing.assert_array_equal(integers[g], expected)
    np.testing.assert_array_equal(products[g], expected @ codes[part])
    total = total + ((expected - zero) @ codes[part]) * np.float64(step)
  np.testing.assert_allclose(y, total * scale, rtol=1e-5, atol=1e-5)
  assert ('groups' == kind) == (q.order is not None) == (size < len(w))


def test_dynamic_int8_is_what_needs_no_example(subject, variables):
  plain = quantize.quantized(subject.variables, 'int8')
  alone = quant.quantize(examples=0).act(subject).variables
  for path, x in tree.flatten(plain).items():
    if not isinstance(x, QTensor):
      continue
    for other in (tree.flatten(variables['dynamic'])[path], tree.flatten(alone)[path]):
      assert other.kind() == x.kind() and other.parts().keys() == x.parts().keys()
      for name, part in x.parts().items():
        np.testing.assert_array_equal(part, other.parts()[name])


def test_errors_of_outputs_and_no_worse_than_by_rounding(subject, variables, made, inputs):
  by_gptq, nearest = variables['gptq4'], made(format='int4', weights='mse')
  found, rounded = (quant.off(subject.variables, v, inputs) for v in (by_gptq, nearest))
  assert found.keys() == inputs.keys()
  for path, w in kernels(subject.variables).items():
    x, w = inputs[path].rows.astype(np.float64), np.asarray(w, np.float64)
    q = qtensor.dequantize(kernels(by_gptq)[path])
    expected = np.linalg.norm(x @ q - x @ w) / np.linalg.norm(x @ w)
    assert found[path] == pytest.approx(expected, rel=1e-3)
    assert found[path] <= rounded[path] * (1 + 1e-3)
  assert sum(found.values()) < 0.9 * sum(rounded.values())


def test_smoothing_and_groups_keep_what_an_outlier_would_cost(subject, variables, made, inputs):
  errors = {
    name: quant.off(subject.variables, values, inputs)['layer_0/mlp/up']
    for name, values in (
      ('plain', variables['static']), ('groups', made(format='int8_static', groups=4)),
      ('smooth', made(format='int8_static', smooth=0.5)),
    )
  }  # fmt: skip
  assert errors['groups'] < 0.7 * errors['plain'] and errors['smooth'] < 0.7 * errors['plain']


def test_mixed_precision_by_rules(made, subject, caplog, monkeypatch):
  rules = [['params/.*/mlp/.*/kernel', 'float'], ['params/.*/query/kernel', 'int4']]
  with caplog.at_level(logging.INFO):
    values = made(rules=rules, smooth=0.5)
  found = kernels(values)
  kinds = {p.removeprefix('layer_0/'): getattr(x, 'codes', 'float') for p, x in found.items()}
  eight = dict.fromkeys(('attention/key', 'attention/value', 'attention/out'), 'int8')
  assert kinds == {'attention/query': 'int4', 'mlp/up': 'float', 'mlp/down': 'float', **eight}
  assert found['layer_0/attention/query'].smooth is None, 'of floats that stay'
  assert found['layer_0/attention/key'].smooth is not None
  assert found['layer_0/attention/out'].smooth is None, 'of what no norm comes before'
  found = kernels(made(smooth=0.5, smooth_at='.*/(key|down)/kernel'))
  smoothed = {path for path, q in found.items() if q.smooth is not None}
  assert smoothed == {'layer_0/attention/key', 'layer_0/mlp/down'}
  with pytest.raises(ValueError, match='matches none of .*layer_0/mlp/up'):
    made(smooth=0.5, smooth_at='kernel')
  assert re.search(r'layer_0, outputs off by: attention/\w+ \d\.\d\d%', caplog.text)
  assert 'those of few bits take' in caplog.text
  caplog.clear()
  monkeypatch.setenv('EFFT_INT8', 'never')
  with caplog.at_level(logging.INFO):
    made(rules=rules, smooth=0.5)
    assert quantized.NO_INTEGERS in caplog.text
    caplog.clear()
    made(format='int8_weight')
    assert quantized.NO_INTEGERS not in caplog.text, 'these are products of floats anywhere'
  head = made(format='', rules=[['params/head/out/kernel', 'int8_weight']], examples=0)
  assert [p for p, x in tree.flatten(head).items() if isinstance(x, QTensor)] == [
    'params/head/out/kernel'
  ]
  with pytest.raises(InputError, match='quant.quantize: found .*layer_7.*matching no parameter'):
    made(rules=[['params/layer_7/.*', 'float']])
  with pytest.raises(InputError, match='numbers along axis 0.*blocks of 64'):
    made(format='nf4')
  with pytest.raises(InputError, match='32 inputs, which 5 groups do not divide'):
    made(format='int8_static', groups=5)


def test_quantised_matrices_are_made_float_first(made, variables, subject):
  again = dataclasses.replace(subject, variables=variables['dynamic'])
  for examples, format in ((0, 'int8'), (8, 'int8_static')):
    values = quant.quantize(format, examples=examples).act(again).variables
    for path, q in kernels(values).items():
      np.testing.assert_array_equal(q.value, kernels(variables['dynamic'])[path].value)
      assert (q.x_scale is not None) == (format == 'int8_static')
  values = quant.floats().act(again).variables
  assert not quantize.held(values)
  for path, q in kernels(variables['dynamic']).items():
    np.testing.assert_array_equal(kernels(values)[path], qtensor.dequantize(q))


def test_rules_make_quantised_matrices_float_again(variables, subject):
  """Those that they name, and the others keep the integers that they have."""
  before = kernels(variables['dynamic'])
  again = dataclasses.replace(subject, variables=variables['dynamic'])
  rule = [['params/.*/mlp/.*/kernel', 'float']]
  for options in ({'format': 'int8'}, {'format': ''}):
    found = kernels(quant.quantize(**options, rules=rule, examples=0).act(again).variables)
    for path, q in before.items():
      if '/mlp/' in path:
        np.testing.assert_array_equal(found[path], qtensor.dequantize(q))
      else:
        np.testing.assert_array_equal(found[path].value, q.value)
  found = kernels(quant.quantize(format='float', examples=0).act(again).variables)
  assert not any(isinstance(x, QTensor) for x in found.values())


@pytest.mark.parametrize(
  'stage',
  [
    prune.heads(), prune.units(score='magnitude'), prune.layers(remove=1.0),
    prune.layers(how='importance'), prune.hidden(), prune.words(), prune.dead(), prune.ziplm(),
  ],
)  # fmt: skip
def test_nothing_is_pruned_once_it_is_quantised(stage, variables, subject):
  """Nor looked at: there are no examples here."""
  again = dataclasses.replace(subject, variables=variables['dynamic'], batches=[])
  with pytest.raises(InputError, match='prune first, then quantise'):
    stage.act(again)


def test_deltas_stay_and_act_while_ranges_are_seen():
  here = tiny.world(tiny.settings('lora', at='layer_.*/attention/value/matmul'), CFG)

  def grow(b):
    b += np.random.default_rng(0).normal(size=b.shape).astype(F)

  values = changed(here.variables, value_matmul_lora_b=grow)
  subject = subject_of(here._replace(variables=values))
  found = quant.quantize('int8_static').act(subject).variables
  for a, b in zip(*map(jax.tree.leaves, (values['delta'], found['delta'])), strict=True):
    np.testing.assert_array_equal(a, b)
  merged = {'params': peft.merge(here.deltas, values['params'], values['delta'])}
  plain = {'params': values['params']}
  ranges = [
    calibrate.observe(dataclasses.replace(subject, variables=v), ['layer_0/attention/out'])
    for v in (merged, plain)
  ]
  expected, without = (calibrate.static(one['layer_0/attention/out'])['x_scale'] for one in ranges)
  scale = kernels(found)['layer_0/attention/out'].x_scale
  np.testing.assert_allclose(scale, expected, rtol=1e-4)
  assert scale > 1.1 * without
  np.testing.assert_array_equal(
    kernels(found)['layer_0/attention/value'].value,
    kernels(quantize.quantized(plain, 'int8'))['layer_0/attention/value'].value,
  )


@pytest.mark.parametrize(
  'options, found',
  [
    ({'format': 'int9'}, 'did you mean int8'),
    ({'rules': (('params/.*', 'int16'),)}, "'int16'"),
    ({'rules': ('params/.*',)}, 'unpack'),
    ({'ranges': 'minmaxi', 'format': 'int8_static'}, 'did you mean minmax'),
    ({'weights': 'median'}, 'one of max, mse'),
    ({'rounding': 'adaround'}, 'one of nearest, gptq'),
    ({'smooth': 1.5}, 'smooth 1.5'),
    ({'smooth': 0.5, 'format': 'int4'}, 'inputs stay float'),
    ({'smooth': 0.5, 'smooth_at': '('}, 'no regular expression'),
    ({'percentile': 40.0}, 'percentile 40'),
    ({'groups': 0, 'format': 'int8_static'}, 'groups 0'),
    ({'groups': 4}, 'no int8_static'),
    ({'symmetric': False}, 'no int8_static'),
    ({'ranges': 'mse'}, 'no int8_static'),
    ({'examples': 0, 'format': 'int8_static'}, 'examples 0'),
    ({'examples': 0, 'smooth': 0.5}, 'examples 0'),
    ({'examples': 0, 'rounding': 'gptq'}, 'examples 0'),
  ],
)
def test_options_that_make_no_sense_are_refused(options, found):
  with pytest.raises(ValueError, match=found):
    quant.quantize(**options)


def test_inputs_that_make_no_ranges_are_refused(subject):
  def zero(x):
    x[:] = 0

  silent = changed(subject.variables, embed_norm_bias=zero, embed_norm_scale=zero)
  with pytest.raises(InputError, match='attention/key/kernel: inputs that range from 0 to 0 on'):
    quant.quantize('int8_static').act(dataclasses.replace(subject, variables=silent))
  with pytest.raises(ValueError, match='no examples'):
    quant.quantize('int8_static').act(dataclasses.replace(subject, batches=[]))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A tuned run and its int8 twin, made by the command."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('EFFT_CACHE', str(folder / 'cache'))
    data = reviews(folder / 'reviews.csv')
    arg = f'configs/int8_static.py:task={data},model={BERT},text=review,label=verdict'
    args = ['train', f'--config={arg}', f'--workdir={folder / "int8"}', *SMALL]
    assert main.main([*args, '--config.train.epochs=2']) == 0
    yield folder


def test_a_run_of_integers(runs):
  results = files.read_json(runs / 'int8' / 'results.json')
  tuned, int8 = results['stages']
  assert 0 < int8['difference'] < 0.5 and int8['parameters'] == tuned['parameters']
  assert run.evaluate(runs / 'int8')['accuracy'] == int8['metrics']['accuracy'] >= 0.9
  before, after = (bundle.load(runs / 'int8' / 'stages' / n) for n in ('s1_tune', 's2_int8'))
  held = {p: x for p, x in after.leaves.items() if isinstance(x, QTensor)}
  assert len(held) == 2 * 6 + 2
  # 32 wide: a scale an output is an eighth of a matrix of integers, in BERT a hundredth.
  whole, small = (sum(leaves[p].nbytes for p in held) for leaves in (before.leaves, after.leaves))
  values = sum(x.value.nbytes for x in held.values())
  assert 4 * values == whole and values < small < 1.6 * values
  for path in before.leaves.keys() - held.keys():
    np.testing.assert_array_equal(before.leaves[path], after.leaves[path])
  for x in held.values():
    x.check()


def test_a_run_of_integers_is_loaded_without_a_float_copy(runs, monkeypatch):
  def refuse(*args, **more):
    raise AssertionError('floats of a matrix that is held in few bits')

  for module, name in ((qtensor, 'dequantize'), (quantize, 'floats'), (quantize, 'quantized')):
    monkeypatch.setattr(module, name, refuse)
  classifier = Classifier.load(runs / 'int8')
  held = [x for x in tree.flatten(classifier.variables).values() if isinstance(x, QTensor)]
  assert len(held) == 2 * 6 + 2 and {x.value.dtype for x in held} == {np.dtype('int8')}
  assert len(classifier(['a good film'])) == 1


def test_a_run_that_is_there_is_compressed(runs, capsys):
  source = runs / 'int8' / 'stages' / 's1_tune'
  args = ['compress', f'--run={source}', '--config=configs/int4.py', *SMALL]
  assert main.main([*args, f'--workdir={runs / "int4"}']) == 0, capsys.readouterr().err
  held = [x for x in bundle.load(runs / 'int4').leaves.values() if isinstance(x, QTensor)]
  assert {x.codes for x in held} == {'int4', 'int8'}
  args = [*args, f'--workdir={runs / "none"}', '--config.stages.s2_int4.weights=least']
  assert main.main(args) == 2
  error = capsys.readouterr().err
  assert "config.stages.s2_int4: found weights 'least', one of max, mse" in error
