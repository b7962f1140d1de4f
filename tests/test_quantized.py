"""Products of integers, against numpy's, and what of them the compiler is given."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import assemble, cpu, qtensor, quantize, tree
from efft.errors import InputError
from efft.models import quantized
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base
from efft.training import losses, step

F = np.float32


def rounded(x, low, high):
  return np.clip(np.rint(x), low, high).astype(np.int64)


def by_token(x):
  """(integers, steps [M, 1]) by hand."""
  largest = np.abs(x).max(1, keepdims=True)
  units = x * np.where(largest > 0, F(127) / np.where(largest > 0, largest, 1), F(0))
  return rounded(units, -127, 127), largest * F(1 / 127)


def product(x, q):
  """x q by hand, float64 but for what decides an integer; x float32."""
  codes = qtensor.codes_of(q).astype(np.int64)
  if q.smooth is not None:
    x = x * (F(1) / q.smooth)
  if q.inputs == 'token':
    integers, steps = by_token(x)
    return (integers @ codes) * np.float64(steps) * np.float64(q.scale)
  if q.order is not None:
    x = x[:, q.order]
  y, size = 0, x.shape[1] // len(q.x_scale)
  for g, scale in enumerate(q.x_scale):
    part = slice(g * size, (g + 1) * size)
    zero = 0 if q.x_zero is None else int(q.x_zero[g])
    low = -127 if q.x_zero is None else -128
    integers = rounded(np.rint(x[:, part] * (F(1) / scale)) + zero, low, 127)
    y = y + ((integers - zero) @ codes[part]) * np.float64(scale)
  return y * np.float64(q.scale)


def rng_of(seed):
  return np.random.default_rng(seed)


def quantised(seed=0, k=12, n=8, **fields):
  w = rng_of(seed).normal(size=(k, n))
  return qtensor.quantize(w, **fields)


KINDS = {
  'token': {'inputs': 'token'},
  'smooth': {'inputs': 'token', 'smooth': np.linspace(0.5, 3, 12, dtype=F)},
  'static': {'inputs': 'static', 'x_scale': F([0.02])},
  'asymmetric': {'inputs': 'static', 'x_scale': F([0.02]), 'x_zero': np.int32([-17])},
  'groups': {
    'inputs': 'static', 'x_scale': F([0.02, 0.03, 0.01]), 'x_zero': np.int32([5, 0, -20]),
    'order': rng_of(4).permutation(12).astype(np.int32),
  },
}  # fmt: skip
every_kind = pytest.mark.parametrize('fields', KINDS.values(), ids=KINDS)
JITTED = jax.jit(lambda x, w: quantized.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))))


@every_kind
def test_products_are_numpys(fields):
  """The same integers: one that differed would differ by a step, a hundred times the bound."""
  q = quantised(**fields)
  x = rng_of(1).normal(size=(40, 12)).astype(F)
  x[3] = 0
  found, expected = JITTED(x, q), product(x, q)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
  np.testing.assert_array_equal(JITTED(x.reshape(4, 10, 12), q).reshape(40, 8), found)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.sampled_from(list(KINDS)))
def test_integers_are_near_the_float_product(seed, kind):
  q = quantised(seed, **KINDS[kind])
  x = rng_of(seed + 1).uniform(-1, 1, (6, 12)).astype(F)
  w = rng_of(seed).normal(size=(12, 8))
  error = np.abs(JITTED(x, q) - x @ w).max()
  assert 0 < error < 0.15 * np.abs(x @ w).max()


@every_kind
def test_gradient_of_the_input_is_the_integers_product(fields):
  q = quantised(**fields)
  x, g = (rng_of(s).normal(size=shape).astype(F) for s, shape in ((1, (6, 12)), (2, (6, 8))))
  dims = (((1,), (0,)), ((), ()))
  _, back = jax.vjp(lambda x: quantized.dot_general(x, q, dims), x)
  (found,) = jax.jit(back)(g)
  integers, steps = by_token(g * q.scale)
  expected = (integers @ qtensor.codes_of(q).astype(np.int64).T) * np.float64(steps)
  if q.order is not None:
    expected = expected[:, np.argsort(q.order)]
  if q.smooth is not None:
    expected = expected * (F(1) / q.smooth)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  float_gradient = g @ qtensor.dequantize(q).T
  assert np.abs(found - float_gradient).max() < 0.03 * np.abs(float_gradient).max()


@pytest.mark.parametrize('codes', ['int8', 'int4', 'nf4'])
def test_matrices_of_float_products_have_float_gradients(codes):
  q = quantised(codes=codes, block=4, inputs='float')
  x, w = rng_of(1).normal(size=(6, 12)).astype(F), qtensor.dequantize(q)

  def cost(x, w):
    return (JITTED(x, w) ** 2).sum()

  np.testing.assert_allclose(JITTED(x, q), x @ w, rtol=1e-5, atol=1e-5)
  found, expected = jax.grad(cost)(x, q), jax.grad(cost)(x, jnp.asarray(w))
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_rounding_at_random_has_the_right_mean():
  """Each number becomes one of its two neighbours; over many draws the mean is the number."""
  x = np.tile(rng_of(0).uniform(-1, 1, (1, 16)).astype(F), (4000, 1))
  x[:, 0] = 1
  integers, step_size = jax.jit(lambda x: quantized.per_row(x, True))(x)
  units = x[0] * 127
  integers = np.asarray(integers, np.int64)
  assert (np.floor(units) <= integers.min(0)).all() and (integers.max(0) <= np.ceil(units)).all()
  assert len(np.unique(integers[:, 1])) == 2, 'rows are drawn apart'
  np.testing.assert_allclose(integers.mean(0), units, atol=5 * 0.5 / 4000**0.5)
  np.testing.assert_allclose(step_size, 1 / 127, rtol=1e-6)


def test_gradient_rounded_at_random_is_the_float_gradient_on_average():
  w = rng_of(0).normal(size=(12, 8))
  q = qtensor.quantize(w, stochastic=True)
  g = rng_of(2).normal(size=(1, 8)).astype(F)
  dims = (((1,), (0,)), ((), ()))
  _, back = jax.vjp(lambda x: quantized.dot_general(x, q, dims), jnp.zeros((4000, 12)))
  (found,) = jax.jit(back)(jnp.tile(g, (4000, 1)))
  exact = (g * q.scale) @ qtensor.codes_of(q).T
  spread = np.std(found, 0) / 4000**0.5
  assert (np.abs(np.mean(found, 0) - exact[0]) < 5 * spread + 1e-6).all()


@settings(deadline=None, max_examples=10)
@given(*(st.integers(1, 9) for _ in range(3)), st.booleans())
def test_odd_sizes_filled_up_for_gpus_give_the_same(m, k, n, transposed):
  rng = rng_of(m + 10 * k + 100 * n)
  w = rng.integers(-127, 128, (k, n)).astype(np.int8)
  x = rng.integers(-127, 128, (m, n if transposed else k)).astype(np.int8)
  expected = x.astype(np.int64) @ (w.T if transposed else w).astype(np.int64)
  np.testing.assert_array_equal(quantized.multiply(x, w, transposed), expected)
  filled = quantized.multiply(quantized._fill(x), quantized._fill(w), transposed)
  np.testing.assert_array_equal(filled[:m, : expected.shape[1]], expected)


def test_without_fast_integers_products_are_of_floats(monkeypatch):
  q, x = quantised(**KINDS['smooth']), rng_of(1).normal(size=(6, 12)).astype(F)
  g = rng_of(2).normal(size=(6, 8)).astype(F)
  dims = (((1,), (0,)), ((), ()))
  monkeypatch.setenv('EFFT_INT8', 'auto')
  monkeypatch.setattr(cpu, '_flags', lambda: {'avx2'})
  monkeypatch.setattr(cpu.sys, 'platform', 'linux')
  y, back = jax.vjp(lambda x: quantized.dot_general(x, q, dims), x)
  np.testing.assert_allclose(y, x @ qtensor.dequantize(q), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(back(g)[0], g @ qtensor.dequantize(q).T, rtol=1e-5, atol=1e-5)
  monkeypatch.setattr(cpu, '_flags', lambda: {'avx512_vnni'})
  assert quantized.integers()
  monkeypatch.setenv('EFFT_INT8', 'never')
  assert not quantized.integers()
  monkeypatch.setenv('EFFT_INT8', 'yes')
  with pytest.raises(InputError, match='auto, always or never'):
    quantized.integers()


BATCH = tiny.batch()


def int8_world(form='int8', cfg=tiny.CFG, make=quantize.plain):
  """LoRA beside a base of few bits."""
  here = tiny.world(tiny.settings('lora'), cfg, dtype=jnp.bfloat16)
  values = quantize.quantized(here.variables, form, make=make)
  parts = assemble.partition(values, tiny.settings('lora')['rules'])
  return here._replace(variables=values, trainable=parts.trainable, frozen=parts.frozen)


def train_step(here):
  optimizer = tiny.optimizer(here)
  state = step.init_state(here.trainable, optimizer, seed=0)
  take = step.make_step(here.logits, losses.single(), optimizer)
  return take, (state, step.cast_frozen(here.frozen, jnp.bfloat16), BATCH)


_DOT = re.compile(r'stablehlo\.dot_general.*: \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>')


def dots_of(text):
  """[(type, type, result's type)] of a StableHLO program's products."""
  return [tuple(shape.rpartition('x')[2] for shape in dot) for dot in _DOT.findall(text)]


def check_dots(text, integers):
  found = dots_of(text)
  assert found.count(('i8', 'i8', 'i32')) == integers
  rest = [dot for dot in found if dot != ('i8', 'i8', 'i32')]
  assert rest and not any('i' in kind for dot in rest for kind in dot)


# A layer has six linears. The inputs of layer 0's query, key and value have no gradient: nothing
# below them trains.
FORWARD, BACKWARD = 12, 9


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_programs_multiply_integers_where_they_should_and_nowhere_else(platform):
  here = int8_world()
  forward = jax.export.export(jax.jit(here.logits), platforms=[platform])
  check_dots(forward(here.variables, BATCH).mlir_module(), FORWARD)
  take, args = train_step(here)
  program = jax.export.export(take, platforms=[platform])(*args).mlir_module()
  check_dots(program, FORWARD + BACKWARD)


def some(fields):
  """`quantize.quantized`'s make with these fields for kernels."""

  def make(path, w, form):
    own = {} if path.endswith('/embedding') else {n: x(w) for n, x in fields.items()}
    return quantize.plain(path, w, form, **own)

  return make


RANGE = {'x_scale': lambda w: F([0.05])}


@pytest.mark.parametrize(
  ('form', 'fields', 'forward', 'backward'),
  [
    ('int8', {}, 6, 3),
    ('int8', {'smooth': lambda w: np.ones(len(w), F)}, 6, 3),
    ('int8_stochastic', {}, 6, 3),
    ('int8_static', RANGE, 6, 3),
    ('int8_static', {**RANGE, 'x_zero': lambda w: np.int32([3])}, 6, 3),
    (
      'int8_static',
      {'x_scale': lambda w: F([0.05, 0.02]), 'order': lambda w: np.arange(len(w))[::-1].copy()},
      12,  # a product for each group of inputs
      3,
    ),
    ('int8_weight', {}, 0, 0),
  ],
)
def test_every_format_has_its_integer_products_and_no_others(form, fields, forward, backward):
  here = int8_world(form, tiny.SHORT, some(fields))
  check_dots(jax.jit(here.logits).lower(here.variables, BATCH).as_text(), forward)
  take, args = train_step(here)
  check_dots(take.lower(*args).as_text(), forward + backward)


@pytest.mark.parametrize('form', ['nf4', 'int4'])
def test_lora_learns_beside_four_bits_that_stay(form):
  """QLoRA: products are of floats, as beside the rounded base; that is what it was."""
  cfg = dataclasses.replace(tiny.SHORT, hidden=64, embed_dim=64, head_dim=16, mlp=(64,))
  here = int8_world(form, cfg)
  codes = [getattr(x, 'codes', '') for x in tree.flatten(here.frozen).values()]
  assert codes.count(form) == 6

  def trained(here):
    take, (state, frozen, batch) = train_step(here)
    check_dots(take.lower(state, frozen, batch).as_text(), 0)
    before, found = jax.tree.map(np.asarray, frozen), []
    for _ in range(12):
      state, seen = take(state, frozen, batch)
      found.append(float(seen['loss']))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(frozen), strict=True):
      np.testing.assert_array_equal(x, y)
    return found

  found = trained(here)
  assert found[-1] < found[0] - 0.02
  rounded_base = here._replace(frozen=quantize.floats(here.frozen))
  np.testing.assert_allclose(found, trained(rounded_base), 2e-3)


def test_the_cpus_own_program_does_too():
  """After XLA's passes: none of the integer products has become one of floats."""
  take, args = train_step(int8_world(cfg=tiny.SHORT))
  text = take.lower(*args).compile().as_text()
  integers = re.findall(r'= s32\[[\d,]+\]\S* dot\(', text)
  assert len(integers) == 6 + 3
  kinds = dict(re.findall(r'%?(\S+) = (\w+)\[[^\]]*\]\S* ', text))
  for operands in re.findall(r'= s32\[[\d,]+\]\S* dot\(([^)]*)\)', text):
    names = [part.split()[-1].lstrip('%') for part in operands.split(', ')]
    assert {kinds[name] for name in names} == {'s8'}


def test_odd_widths_are_filled_up_on_nvidia_gpus_alone():
  """A pruned encoder's: 46 units."""
  cfg = dataclasses.replace(tiny.SHORT, mlp=(46,))
  values = quantize.quantized({'params': tiny.params(cfg)}, 'int8')
  forward = jax.jit(step.forward(Encoder(cfg)))
  for platform, widths in (('cuda', '48'), ('tpu', '46'), ('cpu', '46')):
    text = jax.export.export(forward, platforms=[platform])(values, BATCH).mlir_module()
    check_dots(text, 6)
    shapes = re.findall(r'dot_general.*x(\d+)xi8>\) -> tensor<\S+i32>', text)
    assert widths in shapes and len(shapes) == 6


def test_layer_0_gradients_agree_with_the_float_models():
  """Through two layers of integers, forward and backward."""
  here = int8_world()
  model = here.model.clone(dtype=jnp.float32)
  here = here._replace(model=model)
  rng = rng_of(0)
  trainable = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(F), here.trainable)
  plain = quantize.floats(here.frozen)

  @jax.jit
  def gradient(frozen):
    def cost(trainable):
      values = {
        'params': {**frozen['params'], **trainable['params']}, 'delta': trainable['delta'],
      }  # fmt: skip
      return losses.single()(here.logits(values, BATCH), BATCH['labels']).mean()

    return jax.grad(cost)(trainable)

  a, b = gradient(here.frozen), gradient(plain)
  pairs = zip(*(jax.tree.leaves(g['delta']['layer_0']) for g in (a, b)), strict=True)
  for x, y in pairs:
    assert 0 < np.linalg.norm(x - y) < 0.05 * np.linalg.norm(y)


def test_a_delta_sees_floats_and_contracts_with_integers():
  seen = []

  def apply(p, site):
    seen.append(site.w)
    return site.contract(site.x, site.w) * 1.0

  at = r'layer_0/mlp/up/matmul'
  deltas = {'look': base.Delta(lambda key, site: {'none': jnp.zeros(())}, apply, at)}
  values = quantize.quantized({'params': tiny.params(tiny.SHORT)}, 'int8')
  model = Encoder(tiny.SHORT, Hooks(tap=base.attach(deltas)))
  delta = base.init(model, deltas, values['params'], jax.random.key(0))
  args = BATCH['input_ids'], BATCH['mask'], BATCH['token_types']
  y = model.apply({**values, 'delta': delta}, *args)
  kernel = values['params']['layer_0']['mlp']['up']['kernel']
  np.testing.assert_array_equal(seen[-1], qtensor.dequantize(kernel))
  np.testing.assert_array_equal(y, Encoder(tiny.SHORT).apply(values, *args))
