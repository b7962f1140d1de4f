"""Rounding in training: the papers' formulas by explicit loops, and integers that stay the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import assemble, qtensor, tree
from efft.errors import InputError
from efft.models import quantized
from efft.models.encoder import Encoder
from efft.models.layers import Hooks, compose
from efft.peft import base, fakequant
from efft.peft.base import Site
from efft.training import losses, optim, step

PATH = 'layer_0/attention/query/matmul'
rng = np.random.default_rng(0)
X, W, OUT = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, 6), (6, 4), (2, 5, 4)))
MASK = np.arange(5) < np.array([[5], [3]])
BATCH = tiny.batch(length=16)


def site(x=X, w=W):
  return Site(PATH, base.product(x, w), x=x, w=w, mask=jnp.asarray(MASK), contract=base.product)


def pulled(delta, p, x=X, w=W):
  """y, and the gradients of p, x and w where OUT is that of y."""

  def loss(p, x, w):
    y = delta.apply(p, site(x, w))
    return jnp.sum(y * OUT), y

  grads, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(p, x, w)
  return y, *grads


def rounded(v, s, top):
  return s * np.clip(np.rint(v / s), -top, top)


@settings(max_examples=100, deadline=None)
@given(
  st.lists(st.integers(-300, 300), min_size=1, max_size=8),
  st.sampled_from([0.5, 0.1, 3e-5, 7.7]),
  st.booleans(),
)
def test_integers_are_those_of_the_int8_product(halves, scale, shifted):
  """To the bit, half-way between two of them as well."""
  v = jnp.asarray(halves, jnp.float32) / 2 * scale
  zero, ends = (jnp.int32(-17), (-128, 127)) if shifted else (0, (-127, 127))
  found = fakequant.integers(v, jnp.float32(scale), zero, ends, True) + zero
  np.testing.assert_array_equal(found, quantized.static(v, jnp.float32(scale), zero))


def test_halves_are_rounded_to_even():
  v = jnp.float32([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, -999])
  found = fakequant.integers(v, jnp.float32(1), 0, (-127, 127), True)
  np.testing.assert_array_equal(found, [0, 2, 2, 0, -2, 126, 127, -127])


@pytest.mark.parametrize('per_channel', [True, False])
def test_lsq_is_the_papers_equations(per_channel):
  """Equations 1, 2, 3 and 5, number by number."""
  top, (k_size, n_size) = 3, W.shape
  (delta,) = fakequant.lsq(bits=3, input_bits=3, per_channel=per_channel)
  p = delta.init(jax.random.key(0), site())
  w, x, out = (np.float64(a) for a in (W, X, OUT))

  mean = np.abs(w).mean(0) if per_channel else np.abs(w).mean()
  np.testing.assert_allclose(p['w_unit'], 2 * mean / np.sqrt(top), rtol=1e-5)
  np.testing.assert_allclose(p['x_unit'], 2 * np.abs(x[MASK]).mean() / np.sqrt(top), rtol=1e-5)
  assert (p['w_step'] == 1).all() and p['x_step'] == 1

  moved = [0.4, 0.5, 0.6, 0.7] if per_channel else 0.5
  p = {**p, 'w_step': jnp.float32(moved), 'x_step': jnp.float32(0.6)}
  s_w = np.broadcast_to(np.float64(p['w_unit'] * p['w_step']), n_size)
  s_x = float(p['x_unit'] * p['x_step'])
  w_hat, x_hat = rounded(w, s_w, top), rounded(x, s_x, top)
  y, in_p, in_x, in_w = pulled(delta, p)
  np.testing.assert_allclose(y, x_hat @ w_hat, rtol=1e-5, atol=1e-5)

  d_what = np.einsum('btk,btn->kn', x_hat, out)
  d_xhat = out @ w_hat.T

  def slope(v, s):
    u = v / s
    if abs(u) < top:
      return np.rint(u) - u, 1.0
    return np.sign(u) * top, 0.0

  steps, d_w, cut = np.zeros(n_size), np.zeros_like(w), 0
  for k in range(k_size):
    for n in range(n_size):
      of_step, of_v = slope(w[k, n], s_w[n])
      steps[n] += d_what[k, n] * of_step
      d_w[k, n] = d_what[k, n] * of_v
      cut += of_v == 0
  assert 0 < cut < w.size, 'some are cut off, some are not'
  count = k_size if per_channel else w.size
  expected = steps if per_channel else steps.sum()
  expected = expected / np.sqrt(count * top) * np.float64(p['w_unit'])
  np.testing.assert_allclose(in_p['w_step'], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(in_w, d_w, rtol=1e-4, atol=1e-4)

  total, d_x = 0.0, np.zeros_like(x)
  for place in np.ndindex(*x.shape):
    of_step, of_v = slope(x[place], s_x)
    total += d_xhat[place] * of_step
    d_x[place] = d_xhat[place] * of_v
  expected = total / np.sqrt(k_size * top) * float(p['x_unit'])
  np.testing.assert_allclose(in_p['x_step'], expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(in_x, d_x, rtol=1e-4, atol=1e-4)


def test_q8bert_passes_gradients_straight_through():
  """Those of the rounded product, beyond the range too; padding has no part in the range."""
  delta, _ = fakequant.q8bert()
  far = X.at[1, 4].set(1e4)
  p = delta.init(jax.random.key(0), site(far))
  assert p['range'] == np.abs(np.asarray(X)[MASK]).max() and p['seen'] == 0
  p = {**p, 'range': jnp.float32(1.5)}
  s_x, s_w = np.float64(np.float32(1.5)) / 127, np.abs(np.float64(W)).max() / 127
  x_hat, w_hat = rounded(np.float64(X), s_x, 127), rounded(np.float64(W), s_w, 127)
  assert (np.abs(np.asarray(X)) > 1.6).any()
  y, in_p, in_x, in_w = pulled(delta, p)
  np.testing.assert_allclose(y, x_hat @ w_hat, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(in_x, OUT @ w_hat.T, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(in_w, np.einsum('btk,btn->kn', x_hat, OUT), rtol=1e-4, atol=1e-5)
  away = 1.5 - np.abs(np.asarray(X)[MASK]).max()
  np.testing.assert_allclose(in_p['range'] / -in_p['seen'], away, rtol=1e-6)


def test_products_are_exact_in_bfloat16():
  """Integers and their sums, so that nothing is rounded but what int8 rounds."""
  delta, _ = fakequant.q8bert()
  x = X.astype(jnp.bfloat16)
  p = delta.init(jax.random.key(0), site(x))
  x_step, w_step = (np.float32(a) * np.float32(1 / 127) for a in (p['range'], jnp.abs(W).max()))
  whole = [
    np.rint(np.asarray(a, np.float32) * (np.float32(1) / s)).astype(np.int64)
    for a, s in ((x, x_step), (W, w_step))
  ]
  y = jax.jit(lambda: delta.apply(p, site(x)))()
  np.testing.assert_array_equal(y, np.float32(whole[0] @ whole[1]) * x_step * w_step)


def test_averages_are_left_alone_by_clipping_and_leave_it_alone():
  """The update of the rest is the same to the bit with and without ranges that are far off."""
  transform = {'fn': 'fakequant.average', 'decay': 0.75}
  mark = 2.0**-30
  w = {'w': jnp.full(4, 5.0)}
  pair = {'range': jnp.float32(8.0), 'seen': jnp.float32(3.0)}
  away = [8.0 - 3000.0, 8.0 - 5.0]
  ours = {'range': jnp.float32(sum(away) * mark), 'seen': jnp.float32(-2 * mark)}
  fields = {
    'name': 'adamw', 'b1': 0.9, 'b2': None, 'eps': 1e-8, 'lr': 0.1, 'warmup': 0.0, 'clip': 1.0,
    'schedule': 'constant', 'weight_decay': 0.0, 'groups': {'range': {'transform': transform}},
  }  # fmt: skip

  def update(params, grads, groups):
    opt = optim.optimizer(fields, groups, 10)
    return opt.update(grads, opt.init(params), params)[0]

  alone = update({'p': w}, {'p': {'w': w['w'] * 2}}, {'p/w': 'encoder'})
  groups = {'p/w': 'encoder', 'd/range': 'range', 'd/seen': 'range'}
  both = update({'p': w, 'd': pair}, {'p': {'w': w['w'] * 2}, 'd': ours}, groups)
  np.testing.assert_array_equal(both['p']['w'], alone['p']['w'])
  np.testing.assert_allclose(both['d']['range'], -0.25 * np.mean(away), rtol=1e-6)
  assert both['d']['seen'] == 1
  still = update(
    {'d': pair}, {'d': jax.tree.map(jnp.zeros_like, pair)}, {'d/range': 'range', 'd/seen': 'range'}
  )
  assert still['d']['range'] == 0 and still['d']['seen'] == 0


def quiet(name, cfg=tiny.SHORT, **options):
  """(world of a config without dropout, its resolved config)."""
  resolved = tiny.settings(name, **options)
  return tiny.world(resolved, assemble.with_dropout(cfg, 0.0)), resolved


def observed(here):
  """(variables, batch) -> (logits, {site: (x, y)} of all linears, the deltas acting)."""

  def run(variables, rows):
    found = {}

    def record(module, name, y, x=None, w=None, **context):
      if name == 'matmul' and w is not None:
        found['/'.join(module.path)] = x, y
      return y

    model = here.model.clone(hooks=Hooks(tap=compose(here.model.hooks.tap, record)))
    return step.forward(model)(variables, rows), found

  return jax.jit(run)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_ranges_follow_a_loop_by_hand_and_survive_a_break(accumulate):
  decay, steps = 0.5, 4
  here, resolved = quiet('q8bert')
  fields = resolved['optim'] | {'lr': 1e-2, 'warmup': 0.0, 'clip': 1e-3}
  fields['groups']['range']['transform']['decay'] = decay
  opt = optim.optimizer(fields, here.groups, steps)
  take = step.make_step(here.logits, losses.single(), opt, accumulate=accumulate)
  state, feed, look = (
    step.init_state(here.trainable, opt, seed=0),
    tiny.Feed(tiny.SHORT),
    observed(here),
  )
  ranges = {
    path.removeprefix('delta/').removesuffix('/matmul_q8bert/range'): float(x)
    for path, x in tree.flatten(here.trainable).items()
    if path.endswith('/range')
  }
  assert len(ranges) == 7
  middle = None
  for i in range(steps):
    rows = feed.batch(i)
    variables = tree.join(state.trainable, here.frozen)
    seen = {path: [] for path in ranges}
    for part in range(accumulate):
      micro = {name: x[part::accumulate] for name, x in rows.items()}
      for path, (x, _) in look(variables, micro)[1].items():
        if path in seen:
          x = np.abs(np.asarray(x))
          seen[path].append((x if path == 'pooler' else x[micro['mask']]).max())
    if i == 2:
      middle = jax.tree.map(np.array, state)
    state, metrics = take(state, here.frozen, rows)
    assert metrics['grad_norm'] > 1e-3, 'clipped'
    for path, old in ranges.items():
      ranges[path] = old - (1 - decay) * (old - np.mean(seen[path]))
      found = tree.flatten(state.trainable)[f'delta/{path}/matmul_q8bert/range']
      np.testing.assert_allclose(found, ranges[path], rtol=1e-4, err_msg=path)
      assert abs(ranges[path] - old) > 1e-3
  flat = tree.flatten(state.trainable)
  assert all(x == steps for path, x in flat.items() if path.endswith('/seen'))

  again = jax.tree.map(jnp.array, middle)
  for i in range(2, steps):
    again, _ = take(again, here.frozen, feed.batch(i))
  jax.tree.map(np.testing.assert_array_equal, again, state)


MERGED = {
  'q8bert': {},
  'lsq': {'bits': 4, 'embeddings': 2},
  'lsq_tensor': {'per_channel': False, 'embeddings': 8},
}


@functools.cache
def merged(name):
  """(world, variables that have moved, merged parameters)."""
  here, _ = quiet(name.partition('_')[0], **MERGED[name])
  draw = np.random.default_rng(5)

  def move(path, x):
    trains = path.startswith('delta/') and path in here.groups
    return x * jnp.float32(draw.uniform(0.7, 1.1, x.shape)) if trains else x

  variables = tree.map_paths(move, here.variables)
  return here, variables, base.merge(here.deltas, variables['params'], variables['delta'])


@pytest.mark.parametrize('name', MERGED)
def test_the_merged_model_has_the_integers_that_trained(name):
  here, variables, params = merged(name)
  method = name.partition('_')[0]
  logits, found = observed(here)(variables, BATCH)
  codes = 0
  for path, (x, y) in found.items():
    if path.startswith('head/'):
      continue
    own = tree.flatten(params)[f'{path}/kernel']
    own.check()
    p = tree.flatten(variables['delta'])
    names = ('range',) if method == 'q8bert' else ('w_unit', 'w_step', 'x_unit', 'x_step')
    p = {name: np.asarray(p[f'{path}/matmul_{method}/{name}']) for name in names}
    w = np.asarray(tree.flatten(variables['params'])[f'{path}/kernel'])
    one, top = np.float32(1), 7 if name == 'lsq' else 127
    if method == 'q8bert':
      x_step, w_step = (np.float32(a) * np.float32(1 / 127) for a in (p['range'], np.abs(w).max()))
    else:
      x_step, w_step = p['x_unit'] * p['x_step'], p['w_unit'] * p['w_step']
    assert own.inputs == 'static' and own.x_zero is None and own.x_scale.shape == (1,)
    np.testing.assert_array_equal(own.x_scale[0], x_step)
    np.testing.assert_array_equal(np.squeeze(own.scale), np.squeeze(w_step))
    weights = np.clip(np.rint(w * (one / w_step)), -top, top)
    np.testing.assert_array_equal(own.value, weights)
    codes += len(np.unique(weights))
    # What trained multiplied is what the int8 model multiplies, input by input, sum by sum.
    inputs = np.clip(np.rint(np.asarray(x) * (one / x_step)), -127, 127)
    np.testing.assert_array_equal(quantized.static(x, own.x_scale[0], 0), inputs)
    sums = inputs.astype(np.int64) @ weights.astype(np.int64)
    np.testing.assert_array_equal(y, np.float32(sums) * x_step * w_step)
    np.testing.assert_array_equal(
      y, quantized.dot_general(x, own, (((x.ndim - 1,), (0,)), ((), ())))
    )
  assert codes > {'q8bert': 700, 'lsq': 60, 'lsq_tensor': 300}[name]
  table = params['embed']['word']['embedding']
  table.check()
  assert table.codes == ('int4' if name == 'lsq' else 'int8') and table.inputs == 'float'
  if name == 'lsq':
    assert set(np.unique(qtensor.codes_of(table))) == {-1, 0, 1}
  plain = jax.jit(step.forward(Encoder(here.model.cfg)))({'params': params}, BATCH)
  # One integer of one input that falls on the other side is worth about as much.
  np.testing.assert_allclose(plain, logits, rtol=1e-2, atol=1e-2)
  floats = jax.jit(step.forward(Encoder(here.model.cfg)))({'params': variables['params']}, BATCH)
  assert np.abs(plain - floats).max() > (0.1 if name == 'lsq' else 0.01)


def test_a_table_is_rounded_as_its_merged_rows_are():
  here, variables, params = merged('lsq')
  (_, delta), name = here.deltas['lsq'], 'words_lsq'
  w, ids = variables['params']['embed']['word']['embedding'], BATCH['input_ids']
  value = jnp.take(w, ids, 0), BATCH['mask'], None
  x, *_ = delta.apply(variables['delta']['embed'][name], Site('embed/words', value, w=w))
  np.testing.assert_array_equal(x, quantized.rows(params['embed']['word']['embedding'], ids))


@pytest.mark.parametrize('make', [fakequant.q8bert, fakequant.lsq])
def test_a_lora_inside_is_rounded_with_the_kernel(make):
  delta = make(rank=2, alpha=4.0)[0]
  p = delta.init(jax.random.key(0), site())
  p = {**p, 'b': jnp.asarray(np.random.default_rng(1).normal(size=p['b'].shape), jnp.float32)}
  y, in_p, _, in_w = pulled(delta, p)
  whole = W + 2 * p['a'] @ p['b']
  inner = {name: x for name, x in p.items() if name not in 'ab'}
  expected, _, _, kernel = pulled(make()[0], inner, w=whole)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(in_p['a'], 2 * kernel @ p['b'].T, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(in_p['b'], 2 * p['a'].T @ kernel, rtol=1e-4, atol=1e-4)
  own = delta.merge(p, {'kernel': W, 'bias': OUT[0, 0]})['kernel']
  np.testing.assert_allclose(
    quantized.dot_general(X, own, (((2,), (0,)), ((), ()))), y, rtol=1e-5, atol=1e-5
  )


@pytest.mark.parametrize(
  ('spec', 'tree_of'),
  [
    ({'fn': 'lora.lora'}, lambda p: {'query': {'matmul_other': p}}),
    ({'fn': 'scale.ia3'}, lambda p: {'kv_other': p}),
    ({'fn': 'fakequant.lsq'}, lambda p: {'query': {'matmul_other': p}}),
  ],
)
def test_nothing_else_is_merged_into_integers(spec, tree_of):
  """A sum of floats and integers would be neither."""
  deltas = base.build({'other': spec, 'q8': {'fn': 'fakequant.q8bert'}})
  kernel = {'kernel': jnp.ones((8, 8)), 'bias': jnp.zeros(8)}
  params = {'layer_0': {'attention': {name: dict(kernel) for name in ('query', 'key', 'value')}}}
  p = {'a': jnp.ones((8, 2)), 'b': jnp.ones((2, 8)), 'k': jnp.ones(8), 'v': jnp.ones(8),
       'w_unit': jnp.ones(8), 'w_step': jnp.ones(8), 'x_unit': jnp.float32(1),
       'x_step': jnp.float32(1)}  # fmt: skip
  own = {'range': jnp.float32(1), 'seen': jnp.float32(0)}
  both = tree_of(p)
  both['query'] = {**both.get('query', {}), 'matmul_q8': own}
  with pytest.raises(InputError, match=r'(other|q8) at layer_0/attention.*(q8|other) rounds'):
    base.merge(deltas, params, {'layer_0': {'attention': both}})
  alone = base.merge(deltas, params, {'layer_0': {'attention': tree_of(p)}})
  assert alone['layer_0']['attention']['query']['bias'].shape == (8,)


def test_inputs_of_few_bits_do_not_merge():
  deltas = base.build({'m': {'fn': 'fakequant.lsq', 'input_bits': 4}})
  with pytest.raises(InputError, match='cannot be folded'):
    base.merge(deltas, {}, {})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fn': 'fakequant.lsq', 'bits': 1}, 'bits 1'),
    ({'fn': 'fakequant.lsq', 'input_bits': 9}, 'input_bits 9'),
    ({'fn': 'fakequant.lsq', 'embeddings': 12}, 'embeddings 12'),
    ({'fn': 'fakequant.q8bert', 'examples': 0}, 'examples 0'),
    ({'fn': 'fakequant.q8bert', 'rank': -1}, 'rank -1'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': options})


def test_averages_of_anything_else_are_refused():
  with pytest.raises(ValueError, match='decay 1'):
    fakequant.average(1.0)
  wrapped = fakequant.average().wrap(None, 1, {})
  with pytest.raises(InputError, match="'range' and 'seen'"):
    wrapped.init({'a': {'range': jnp.ones(()), 'b': jnp.ones(3)}})


def test_a_kernel_of_zeros_stays_one():
  for make in (fakequant.q8bert, fakequant.lsq):
    delta = make()[0]
    p = delta.init(jax.random.key(0), site(0 * X, 0 * W))
    y, *grads = pulled(delta, p, 0 * X, 0 * W)
    assert not np.any(y) and all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
