"""Masks by scores: gradients and schedules by hand, counts exact, what training leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import tree
from efft.compress import dead
from efft.errors import InputError
from efft.models.encoder import Encoder
from efft.peft import base, movement
from efft.peft.base import Site
from efft.training import losses, step

PATH = 'layer_0/attention/query/matmul'
D_IN, D_OUT = 40, 30
rng = np.random.default_rng(0)
X, W, OUT = (
  jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, D_IN), (D_IN, D_OUT), (2, 5, D_OUT))
)
BATCH = tiny.batch(length=16)


def site(w=W, added=0.0):
  return Site(PATH, base.product(X, w) + added, x=X, w=w, contract=base.product)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([-2.5, -1.0, 0.0, 1e-30, 0.5, 3e30]), min_size=1, max_size=40))
def test_the_largest_are_those_of_a_stable_sort(values):
  """With many ties, for every count."""
  scores = np.float32(values)
  order = np.argsort(-scores, kind='stable')
  found = jax.jit(jax.vmap(movement.largest, (None, 0)))(scores, jnp.arange(len(values) + 1))
  for count, mask in enumerate(np.asarray(found)):
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:count]))


def by_hand(scores, kind):
  """M [D_IN, D_OUT] of scores, in numpy."""
  if kind == 'hard':
    return np.float32(scores >= np.sort(scores, None)[-round(0.3 * scores.size)])
  open_ = np.float32(1 / (1 + np.exp(-np.float64(scores))) > 0.4)
  return np.kron(open_, np.ones((7, 7)))[:D_IN, :D_OUT] if kind == 'block' else open_


@pytest.mark.parametrize('rank', [0, 2])
@pytest.mark.parametrize('kind', ['hard', 'soft', 'block'])
def test_masks_and_their_gradients_are_the_formulas(kind, rank):
  """W' = W M, dL/dS = dL/dW' W (summed over blocks), dL/dW = dL/dW' M; W + A B in W's place."""
  delta = {
    'hard': movement.movement(0.3, rank=rank),
    'soft': movement.soft(0.5, start=0.4, rank=rank),
    'block': movement.block(7, 0.5, start=0.4, rank=rank),
  }[kind]
  delta = delta[0] if kind == 'block' else delta
  p = delta.init(jax.random.key(0), site())
  draw = np.random.default_rng(1)
  scores = np.float32(draw.normal(size=p['score'].shape))
  p = {name: x + draw.normal(size=x.shape) if name in 'ab' else x for name, x in p.items()}
  p = jax.tree.map(jnp.float32, {**p, 'score': scores})

  @jax.jit
  def loss(p, w, added=0.0):
    y = delta.apply(delta.expand(p, PATH, None), site(w, added))
    return jnp.sum(y * OUT), y

  (_, y), (in_p, in_w) = jax.value_and_grad(loss, (0, 1), has_aux=True)(p, W)
  mask = by_hand(scores, kind)
  assert 0.1 < mask.mean() < 0.9
  low = 8 * np.asarray(p['a']) @ np.asarray(p['b']) if rank else 0
  whole = np.asarray(W) + low
  close = dict(rtol=1e-4, atol=2e-3)
  np.testing.assert_allclose(y, X @ (whole * mask), **close)
  # It comes first at its site and stands for the kernel; only what is small beside it is added.
  before = 3.0 if rank else 0.0
  np.testing.assert_allclose(loss(p, W, 3.0)[1], X @ (whole * mask) + before, **close)
  kernel = np.einsum('btk,btn->kn', X, OUT)  # dL/dW'
  in_scores = kernel * whole
  if kind == 'block':
    padded = np.zeros((42, 35))
    padded[:D_IN, :D_OUT] = in_scores
    in_scores = padded.reshape(6, 7, 5, 7).sum((1, 3))
  np.testing.assert_allclose(in_p['score'], in_scores, **close)
  np.testing.assert_allclose(in_w, kernel * mask, **close)
  assert (np.asarray(in_w)[mask == 0] == 0).all(), 'to the bit'
  if rank:
    np.testing.assert_allclose(in_p['a'], 8 * (kernel * mask) @ np.asarray(p['b']).T, **close)
  assert in_p['keep' if kind == 'hard' else 'threshold'] == 0
  merged = delta.merge(delta.expand(p, PATH, None), {'kernel': W, 'bias': OUT[0, 0]})
  np.testing.assert_allclose(merged['kernel'], whole * mask, rtol=1e-4, atol=1e-4)
  assert np.count_nonzero(merged['kernel']) == mask.sum()
  stored = delta.pack(p)
  assert stored['mask'].dtype == bool and 'score' not in stored
  again = delta.expand({**stored, 'mask': stored['mask'].astype(jnp.float32)}, PATH, None)
  np.testing.assert_array_equal(delta.merge(again, {'kernel': W})['kernel'], merged['kernel'])


def test_thresholds_leave_something_open():
  """int(0.005 size) + 1 of the largest, once fewer are above the threshold."""
  delta = movement.soft(0.5, start=0.9)
  scores = np.float32(np.random.default_rng(2).permutation(D_IN * D_OUT).reshape(D_IN, D_OUT))
  for lowered, count in ((1190, 9), (1198, 7), (5000, 7)):
    p = {'score': jnp.asarray(scores - lowered - 0.5), 'threshold': jnp.float32(0.55)}
    mask = delta.expand(p, PATH, None)['mask']
    np.testing.assert_array_equal(mask, scores >= scores.size - count)


def test_penalties_are_means_over_numbers():
  shapes = {'a': (10, 20), 'b': (30, 10)}
  draw = np.random.default_rng(3)

  def sigma(x):
    return 1 / (1 + np.exp(-x))

  def total(delta, sites, scores):
    common = delta.shared(None, sites)
    return sum(
      float(delta.penalty({**common, 'score': scores[n], 'threshold': jnp.float32(0.04)}, n))
      for n in sites
    )

  sites = {n: Site(n, None, w=jax.ShapeDtypeStruct(s, jnp.float32)) for n, s in shapes.items()}
  scores = {n: draw.normal(size=s) for n, s in shapes.items()}
  mean = np.mean(np.concatenate([sigma(x).ravel() for x in scores.values()]))
  found = total(movement.soft(0.2, penalty=3.0), sites, scores)
  np.testing.assert_allclose(found, 3.0 * 0.04 / 0.2 * mean, rtol=1e-5)

  kernels, units = movement.block(5, 0.2, penalty=3.0)
  acts = {
    n: Site(n, jnp.zeros((1, 2, f)), x=jnp.zeros((1, 2, 10))) for n, f in (('c', 7), ('d', 9))
  }
  common = {**kernels.shared(None, sites), **units.shared(None, acts)}
  scores = {n: draw.normal(size=(s[0] // 5, s[1] // 5)) for n, s in shapes.items()}
  scores |= {n: draw.normal(size=s.y.shape[-1]) for n, s in acts.items()}
  found = sum(
    float(part.penalty({**common, 'score': scores[n], 'threshold': jnp.float32(0.2)}, n))
    for part, names in ((kernels, 'ab'), (units, 'cd'))
    for n in names
  )
  # Each number of the kernels has the sigma of its score: 25 in a block, 2 x 10 of a unit.
  spread = [np.repeat(sigma(scores[n]).ravel(), 25 if n in 'ab' else 20) for n in 'abcd']
  np.testing.assert_allclose(found, 3.0 * np.mean(np.concatenate(spread)), rtol=1e-5)


@pytest.mark.parametrize('power', [3.0, 1.0])
def test_numbers_follow_the_schedule(power):
  steps, first, last, final = 40, 4, 32, 0.15
  change = movement.schedule(final, warmup=0.1, cooldown=0.2, power=power)
  opt = change.wrap(optax.sgd(1.0), steps, {})
  params = {'a': {'keep': jnp.float32(1.0)}, 'b': optax.MaskedNode(), 'c': jnp.float32([0.0, 0.5])}
  state, update = opt.init(params), jax.jit(opt.update)
  for t in range(1, steps + 1):
    updates, state = update(jax.tree.map(lambda x: x + 7, params), state, params)
    params = optax.apply_updates(params, updates)
    done = min(1, max(0, (t - first) / (last - first)))
    for found, start in ((params['a']['keep'], 1.0), (params['c'], np.array([0.0, 0.5]))):
      wanted = final + (start - final) * (1 - done) ** power
      np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
  assert params['a']['keep'] == np.float32(final)
  assert (params['c'] == np.float32(final)).all()


@pytest.mark.parametrize('names', [('mask', 'lora'), ('lora', 'mask')])
def test_beside_a_lora_of_its_own_name(names):
  """W M + A B in either order of the names, and merged the same."""
  specs = {
    'mask': {'fn': 'movement.movement', 'keep': 0.3},
    'lora': {'fn': 'lora.lora', 'at': movement.LINEARS},
  }
  method = {name: specs[name] for name in names}
  here = tiny.world({'method': method, 'rules': [('.*', 'all')]}, tiny.SHORT)
  draw = np.random.default_rng(4)

  def shift(x):
    moved = x.ndim and jnp.issubdtype(x.dtype, jnp.floating)
    return x + jnp.float32(draw.normal(0, 0.3, x.shape)) if moved else x

  delta = jax.tree.map(shift, here.variables['delta'])
  params = tiny.params(tiny.SHORT)
  explicit = jax.tree.map(lambda x: x, params)
  for path in ('attention/query', 'attention/key', 'attention/value', 'attention/out',
               'mlp/up', 'mlp/down'):  # fmt: skip
    block, linear = path.split('/')
    own = delta['layer_0'][block][linear]
    scores, low = np.asarray(own['matmul_mask']['score']), own['matmul_lora']
    mask = scores >= np.sort(scores, None)[-round(0.3 * scores.size)]
    kernel = params['layer_0'][block][linear]['kernel'] * mask + 2 * low['a'] @ low['b']
    explicit['layer_0'][block][linear]['kernel'] = kernel
  plain = jax.jit(step.forward(Encoder(tiny.SHORT)))
  expected = plain({'params': explicit}, BATCH)
  applied = here.logits({'params': params, 'delta': delta}, BATCH)
  np.testing.assert_allclose(applied, expected, rtol=1e-4, atol=1e-4)
  merged = plain({'params': base.merge(here.deltas, params, delta)}, BATCH)
  np.testing.assert_allclose(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('final', [15.0, 1.0, 0.0, -0.1])
def test_a_schedule_ends_between_0_and_1(final):
  with pytest.raises(ValueError, match='not between 0 and 1'):
    movement.schedule(final)


def trained(name, steps, rate, final=None, **options):
  """(world, its delta, merged params) after a run of the config on the small world."""
  here = tiny.world(tiny.settings(name, **options), tiny.SHORT)
  groups = {'delta': {'lr': rate, 'weight_decay': 0.0}, 'score': {'lr': rate}}
  if final is not None:
    moves = {'fn': 'movement.schedule', 'final': final, 'warmup': 0.0, 'cooldown': 0.3}
    groups['schedule'] = {'transform': moves}
  groups = {name: fields for name, fields in groups.items() if name in here.groups.values()}
  opt = tiny.optimizer(here, steps, lr=1e-3, warmup=0.0, groups=groups)
  take = step.make_step(here.logits, losses.single(), opt, penalty=here.penalty)
  state, feed = step.init_state(here.trainable, opt, seed=0), tiny.Feed(tiny.SHORT)
  for i in range(steps):
    state, metrics = take(state, here.frozen, feed.batch(i))
  assert np.isfinite(float(metrics['loss']))
  variables = tree.join(state.trainable, here.frozen)
  return here, variables, base.merge(here.deltas, variables['params'], variables['delta'])


@pytest.mark.parametrize('name', ['movement', 'movement_lora'])
def test_a_run_ends_with_exactly_the_share_that_is_asked_for(name):
  here, variables, merged = trained(name, 20, 1e-2, final=0.3)
  for path, kernel in dead.kernels(merged['layer_0']).items():
    assert np.count_nonzero(kernel) == round(0.3 * kernel.size), path
  keeps = [x for path, x in tree.flatten(variables).items() if path.endswith('/keep')]
  assert len(keeps) == 6 and set(map(float, keeps)) == {np.float32(0.3)}


def test_a_run_with_a_threshold_closes_what_falls_below():
  _, variables, merged = trained('soft_movement', 20, 0.4, final=0.1)
  kernels, total = dead.kernels(merged['layer_0']), 0
  for path, kernel in kernels.items():
    scores = np.float64(tree.flatten(variables)[f'delta/layer_0/{path}/matmul_soft/score'])
    above = 1 / (1 + np.exp(-scores)) > np.float32(0.1)
    wanted = max(int(0.005 * scores.size) + 1, int(above.sum()))
    assert np.count_nonzero(kernel) == wanted, path
    total += wanted
  assert 0.01 < total / sum(x.size for x in kernels.values()) < 0.7


def test_a_run_with_blocks_empties_blocks_and_units():
  here, variables, merged = trained('block_movement', 20, 0.4, final=0.1, size=8, penalty=100.0)
  found = dead.sparsity(tiny.SHORT, merged)
  assert found['zeros'] > 0.3 and found['units'] > 0.3
  query = np.asarray(merged['layer_0']['attention']['query']['kernel'])
  cells = query.reshape(4, 8, 4, 8).swapaxes(1, 2).reshape(16, 64)
  live = np.count_nonzero(cells, 1)
  assert set(live) == {0, 64}, 'a block is empty or full'
  mlp = merged['layer_0']['mlp']
  rows = np.any(np.asarray(mlp['down']['kernel']), 1)
  np.testing.assert_array_equal(rows, np.any(np.asarray(mlp['up']['kernel']), 0))
  np.testing.assert_array_equal(rows, np.asarray(mlp['up']['bias']) != 0)
  np.testing.assert_allclose(
    step.forward(Encoder(tiny.SHORT))({'params': merged}, BATCH),
    here.logits(variables, BATCH), rtol=1e-4, atol=1e-4,
  )  # fmt: skip


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fn': 'movement.movement', 'keep': 0.0}, 'keep 0.0'),
    ({'fn': 'movement.movement', 'rank': -1}, 'rank -1'),
    ({'fn': 'movement.soft', 'threshold': 1.0}, 'threshold 1.0'),
    ({'fn': 'movement.soft', 'start': -0.1}, 'start -0.1'),
    ({'fn': 'movement.soft', 'penalty': -1.0}, 'penalty -1.0'),
    ({'fn': 'movement.block', 'size': 0}, 'size 0'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': options})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'warmup': 0.5, 'cooldown': 0.5}, 'leave no time'),
    ({'cooldown': -0.1}, 'leave no time'),
    ({'power': 0.0}, 'power 0.0'),
  ],
)
def test_bad_schedules_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    movement.schedule(0.1, **options)


def test_a_site_without_a_kernel_is_refused():
  with pytest.raises(ValueError, match='without a kernel'):
    movement.movement().init(jax.random.key(0), Site('layer_0/mlp/act', jnp.zeros((1, 1, 4))))
