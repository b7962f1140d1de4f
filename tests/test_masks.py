"""Masks, budgets and projections against loops written by hand; exact resumption with a mask."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_end_to_end as runs
import tiny

from efft import config, finetune, run, tree
from efft.errors import InputError, Preempted
from efft.peft import budget, diff, galore, masks, transform
from efft.training import losses, prepare, step


def spec(group='bias', **options):
  """The 'optim' of a config whose group has this transform."""
  fields = tiny.settings('bitfit')['optim']
  return fields | {'groups': {group: {'transform': options}}}


@pytest.fixture(scope='module')
def world():
  """What BitFit trains: small enough for loops over single examples."""
  return tiny.world(tiny.settings('bitfit'), tiny.SHORT)


EXAMPLES = 11  # of two batches of 8


@pytest.fixture(scope='module')
def each(world):
  """Gradients of the group 'bias', one example after the other: a list of {path: array}."""
  here = world
  head, bias = tree.split(here.trainable, lambda path: here.groups[path] == 'head')

  @jax.jit
  def gradient(bias, row):
    def objective(bias):
      scores = here.logits(tree.join(head, bias, here.frozen), row)
      return losses.single()(scores, row['labels'])[0]

    return jax.grad(objective)(bias)

  feed, found = tiny.Feed(tiny.SHORT), []
  for number in range(EXAMPLES):
    rows = feed.batch(number // 8)
    one = {name: x[number % 8][None] for name, x in rows.items()}
    found.append({p: np.float64(g) for p, g in tree.flatten(gradient(bias, one)).items()})
  return found


def largest(scores, density):
  """The mask by a sort of everything."""
  flat = np.concatenate([scores[path].ravel() for path in sorted(scores)])
  least = np.sort(flat)[-round(density * flat.size)]
  return {path: x >= least for path, x in scores.items()}


def same(found, expected):
  assert found.keys() == expected.keys()
  for path in found:
    np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.mark.parametrize('fn', ['fish', 'child_d', 'second_order', 'snip'])
def test_masks_from_data_are_those_of_a_loop_over_examples(world, each, fn):
  mean = {path: np.mean([g[path] for g in each], 0) for path in each[0]}
  squares = {path: np.mean([g[path] ** 2 for g in each], 0) for path in each[0]}
  fields = spec(fn=f'masks.{fn}', density=0.4, examples=EXAMPLES)
  if fn == 'snip':  # vectors are not pruned, and biases are vectors
    with pytest.raises(InputError, match='no matrix in the group'):
      tiny.prepared(world, fields)
    return
  found = tiny.prepared(world, fields)['bias']
  scores = {p: np.abs(g) for p, g in mean.items()} if fn == 'second_order' else squares
  same(found, largest(scores, 0.4))


def test_whole_leaves_by_mean_fisher(world, each):
  fields = spec(fn='masks.fish', density=0.4, examples=EXAMPLES, unit='leaf')
  found = tiny.prepared(world, fields)['bias']
  squares = {path: np.mean([g[path] ** 2 for g in each], 0).mean() for path in each[0]}
  best = max(squares, key=squares.get)
  assert found[best].all() and all(mask.all() or not mask.any() for mask in found.values())
  chosen, size = (sum(int(m.sum()) for m in found.values()), sum(m.size for m in found.values()))
  assert chosen <= 0.4 * size
  # Whatever still fits was taken, best first.
  left_out = [path for path, mask in found.items() if not mask.any()]
  assert all(found[path].size > 0.4 * size - chosen for path in left_out)


def test_examples_beyond_the_split_count_once(world):
  """16 rows, asked for 1000: as many as there are, not the same ones again."""
  few, many = (
    tiny.prepared(world, spec(fn='masks.fish', density=0.4, examples=n))['bias'] for n in (16, 1000)
  )
  same(few, many)


def problem(leaves, **fields):
  given = dict(steps=10, seed=0, gradients=None, squares=None, train=None)
  return transform.Problem(leaves=leaves, **{**given, **fields})


LEAVES = {
  path: np.random.default_rng(0).normal(size=shape)
  for path, shape in {'a/kernel': (30, 20), 'a/bias': (20,)}.items()
}


def test_masks_without_data():
  size = sum(x.size for x in LEAVES.values())
  small = masks.magnitude(0.1).prepare(problem(LEAVES))
  same(small, largest({p: -np.abs(x) for p, x in LEAVES.items()}, 0.1))
  same(masks.magnitude(0.1, True).prepare(problem(LEAVES)), largest(jax.tree.map(abs, LEAVES), 0.1))
  first, again, other = (masks.random(0.1).prepare(problem(LEAVES, seed=s)) for s in (1, 1, 2))
  same(first, again)
  assert sum(m.sum() for m in first.values()) == round(0.1 * size)
  assert any((first[p] != other[p]).any() for p in first)


def test_snip_keeps_the_largest_products_of_matrices():
  rng = np.random.default_rng(1)
  grads = {path: rng.normal(size=x.shape) for path, x in LEAVES.items()}
  found = masks.snip(0.3).prepare(problem(LEAVES, gradients=lambda examples: grads))
  product = np.abs(grads['a/kernel'] * LEAVES['a/kernel'])
  same(found, {**largest({'a/kernel': product}, 0.3), 'a/bias': np.ones(20, bool)})
  assert masks.snip(0.3).outside == 'zero' and masks.snip(0.3, prune=False).outside == 'still'


def test_top_takes_the_first_of_equals():
  scores = {'b': np.array([1.0, 2.0, 1.0]), 'a': np.array([1.0, 0.0])}
  found = transform.top(scores, 0.6)
  same(found, {'b': np.array([True, True, False]), 'a': np.array([True, False])})
  assert sum(m.sum() for m in transform.top(scores, 0.01).values()) == 1


def test_lt_sft_keeps_the_farthest_movers_of_a_plain_run(world):
  here, steps = world, 4
  fields = spec(fn='masks.lt_sft', density=0.2, share=0.5) | {'lr': 1e-2, 'warmup': 0.0}
  found = tiny.prepared(here, fields, steps=2 * steps, seed=5)['bias']
  plain = tiny.optimizer(here, steps, lr=1e-2, warmup=0.0)
  take, state = (
    step.make_step(here.logits, losses.single(), plain),
    step.init_state(here.trainable, plain, seed=5),
  )
  for i in range(steps):
    state, _ = take(state, here.frozen, tiny.Feed(tiny.SHORT).batch(i))
  start, end = tree.flatten(here.trainable), tree.flatten(state.trainable)
  moved = {p: np.abs(np.asarray(end[p] - start[p])) for p, g in here.groups.items() if g == 'bias'}
  same(found, largest(moved, 0.2))


def test_child_f_draws_by_seed_step_and_leaf():
  grads = {'a': jnp.ones((100, 100)), 'b': jnp.ones((100, 100)), 'c': optax.MaskedNode()}
  change = masks.child_f(0.3)

  def draws(seed):
    given = change.prepare(problem({}, seed=seed))
    opt = change.direction(optax.identity(), 10, given)
    state, found = opt.init(grads), []
    for _ in range(2):
      updates, state = opt.update(grads, state)
      found += [np.asarray(updates['a']), np.asarray(updates['b'])]
    return found

  first, again, other = draws(1), draws(1), draws(2)
  for x in first:
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.3], rtol=1e-6)
    assert abs((x > 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / x.size)
  np.testing.assert_array_equal(first, again)
  assert len({x.tobytes() for x in (*first, *other)}) == 8


def test_adalora_is_the_loop_by_hand():
  rng = np.random.default_rng(1)
  steps, rate, first, last, gap, target = 20, 0.1, 4, 16, 3, 2
  shapes = {
    f'{site}/{name}': shape
    for site, (k, n) in {'s/q': (5, 4), 's/v': (3, 6)}.items()
    for name, shape in (('a', (k, 4)), ('e', (4,)), ('b', (4, n)))
  }
  shapes['s/scale'] = (3,)
  start = {path: rng.normal(size=shape) for path, shape in shapes.items()}
  grads = [{path: rng.normal(size=s) for path, s in shapes.items()} for _ in range(steps)]

  w = {path: x.copy() for path, x in start.items()}
  mean, spread = ({path: 0.0 for path in w} for _ in range(2))
  kept = []
  for t, g in enumerate(grads, 1):
    if t < last:
      for path in w:
        found = np.abs(w[path] * g[path])
        mean[path] = 0.85 * mean[path] + 0.15 * found
        spread[path] = 0.7 * spread[path] + 0.3 * np.abs(found - mean[path])
    for path in w:
      w[path] = w[path] - rate * g[path]
    if t > first and (t >= last or t % gap == 0):
      share = 1 - (t - first) / (last - first)
      allowed = 2 * target if t >= last else int((8 - 2 * target) * share**3 + 2 * target)
      scores = {}
      for site in ('s/q', 's/v'):
        s = {name: mean[f'{site}/{name}'] * spread[f'{site}/{name}'] for name in 'aeb'}
        for i in range(4):
          scores[site, i] = s['e'][i] + s['a'][:, i].mean() + s['b'][i].mean()
      for site, i in sorted(scores, key=scores.get)[: 8 - allowed]:
        w[f'{site}/e'][i] = 0.0
    kept.append(sum(int((w[f'{site}/e'] != 0).sum()) for site in ('s/q', 's/v')))
  assert kept[3:7] == [8, 8, 6, 8] and kept[-4:] == [4] * 4, 'what was cut may come back until then'

  change = budget.adalora(target, first / steps, 1 - last / steps, gap, beta2=0.7)
  opt = change.wrap(optax.sgd(rate), steps, {})
  params = tree.unflatten({p: jnp.float32(x) for p, x in start.items()})
  params['other'] = optax.MaskedNode()
  state, update = opt.init(params), jax.jit(opt.update)
  counts = []
  for g in grads:
    g = tree.unflatten({p: jnp.float32(x) for p, x in g.items()}) | {'other': optax.MaskedNode()}
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    counts.append(sum(int(jnp.count_nonzero(params['s'][site]['e'])) for site in 'qv'))
  assert counts == kept
  for path, x in transform.leaves(params).items():
    np.testing.assert_allclose(x, w[path], rtol=1e-5, atol=1e-5, err_msg=path)
  with pytest.raises(InputError, match='lora.adalora'):
    opt.init({'a': jnp.ones((3, 4)), 'b': jnp.ones((4, 3))})


def test_galore_is_the_loop_by_hand():
  rng = np.random.default_rng(1)
  rank, gap, scale, b1, b2, eps = 2, 3, 0.25, 0.9, 0.99, 1e-8
  shapes = {'wide': (4, 7), 'tall': (6, 5), 'small': (1, 3), 'bias': (5,)}
  grads = [{name: rng.normal(size=s) for name, s in shapes.items()} for _ in range(7)]
  bases, m, v, expected = {}, dict.fromkeys(shapes, 0.0), dict.fromkeys(shapes, 0.0), []
  for t, g in enumerate(grads):
    updates = {}
    for name, x in g.items():
      left = x.ndim == 2 and x.shape[0] <= x.shape[1]
      if x.ndim == 2 and t % gap == 0:
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        b = u[:, :rank] if left else vt[:rank].T
        bases[name] = b * [np.sign(column[np.abs(column).argmax()]) for column in b.T]
      low = x if x.ndim == 1 else bases[name].T @ x if left else x @ bases[name]
      m[name] = b1 * m[name] + (1 - b1) * low
      v[name] = b2 * v[name] + (1 - b2) * low**2
      towards = m[name] / (1 - b1 ** (t + 1)) / (np.sqrt(v[name] / (1 - b2 ** (t + 1))) + eps)
      if x.ndim == 2:
        towards = scale * (bases[name] @ towards if left else towards @ bases[name].T)
      updates[name] = towards
    expected.append(updates)

  opt = galore.galore(rank, gap, scale).direction(optax.scale_by_adam(b1, b2, eps), 10, {})
  params = {name: jnp.ones(shape) for name, shape in shapes.items()} | {'x': optax.MaskedNode()}
  state, update = opt.init(params), jax.jit(opt.update)
  sizes = {name: x.shape for name, x in transform.leaves(state.inner.mu).items()}
  assert sizes == {'wide': (2, 7), 'tall': (6, 2), 'small': (1, 3), 'bias': (5,)}
  for g, wanted in zip(grads, expected, strict=True):
    g = {name: jnp.float32(x) for name, x in g.items()} | {'x': optax.MaskedNode()}
    updates, state = update(g, state, params)
    for name, x in wanted.items():
      np.testing.assert_allclose(updates[name], x, rtol=1e-3, atol=1e-5, err_msg=name)


def test_diff_gates():
  """At rest by the formula; drawn, as many are open as the penalty counts."""
  rng = np.random.default_rng(1)
  delta = diff.diff(penalty=0.5, low=-0.1, high=1.1)
  alpha = rng.normal(0, 2, (200, 150))
  p = {
    'w': jnp.float32(rng.normal(size=alpha.shape)),
    'alpha': jnp.float32(alpha),
    'alpha_kernel': jnp.full((1,), 9.0),
  }

  def gate(x):
    return np.clip(1.2 / (1 + np.exp(-x)) - 0.1, 0, 1)

  rest = delta.expand(p, 'layer_0', None)['w']
  np.testing.assert_allclose(rest, p['w'] * gate(alpha) * gate(9.0), atol=1e-5)
  counted = float(delta.penalty(p, 'layer_0')) / 0.5
  drawn = [delta.expand(p, 'layer_0', jax.random.key(i))['w'] for i in range(4)]
  opened = np.mean([np.count_nonzero(x) for x in drawn])
  assert abs(opened - counted) < 4 * np.sqrt(alpha.size / 4 / 4)
  assert 0.3 * alpha.size < counted < 0.9 * alpha.size
  assert (np.asarray(drawn[0]) != np.asarray(drawn[1])).any()
  cut = diff.diff(low=-0.1, high=1.1, density=0.01).expand(p, 'layer_0', None)['w']
  assert np.count_nonzero(cut) == 300
  np.testing.assert_array_equal(cut, np.where(np.abs(cut) > 0, rest, 0))
  assert np.abs(np.asarray(cut))[np.asarray(cut) != 0].min() >= np.sort(np.abs(rest), None)[-300]


def test_diff_fixes_its_mask_as_the_loop_by_hand():
  """Before the cut, at it, and after it; what the model sees then is the same with any draw."""
  density, steps, rate, boost = 0.1, 6, 0.5, 3.0
  rng = np.random.default_rng(2)
  sizes = {'w': (8, 5), 'alpha': (8, 5), 'alpha_kernel': (1,)}
  own = {name: rng.normal(size=shape) for name, shape in sizes.items()}
  grads = [{name: rng.normal(size=shape) for name, shape in sizes.items()} for _ in range(steps)]

  def gate(x):
    return np.clip(3 / (1 + np.exp(-x)) - 1.5, 0, 1)

  wanted, kept = {name: x.copy() for name, x in own.items()}, None
  for number, g in enumerate(grads, 1):
    if number == 3:
      w = wanted['w'] * gate(wanted['alpha']) * gate(wanted['alpha_kernel'])
      kept = np.abs(w) >= np.sort(np.abs(w), None)[-4]
      assert kept.sum() == 4
      wanted['w'] = np.where(kept, w, 0)
    elif kept is None:
      wanted = {name: x - rate * g[name] for name, x in wanted.items()}
    else:
      wanted['w'] -= np.where(kept, boost * rate * g['w'], 0)

  opt = diff.fixed(density, 0.5, boost).wrap(optax.sgd(rate), steps, {})
  params = {'at': {n: jnp.float32(x) for n, x in own.items()}, 'bias': jnp.zeros(2)}
  params['other'] = optax.MaskedNode()
  state, update = opt.init(params), jax.jit(opt.update)
  for g in grads:
    g = {'at': {n: jnp.float32(x) for n, x in g.items()}, 'bias': jnp.ones(2)}
    updates, state = update(g | {'other': optax.MaskedNode()}, state, params)
    params = optax.apply_updates(params, updates)
  found = params['at']
  np.testing.assert_allclose(found['w'], wanted['w'], atol=1e-5)
  np.testing.assert_allclose(params['bias'], -rate * steps)  # no business of the cut
  np.testing.assert_array_equal(np.asarray(found['alpha']) > 0, kept)
  delta = diff.diff(density=density)
  for key in (None, *map(jax.random.key, range(3))):
    np.testing.assert_array_equal(delta.expand(found, 'layer_0', key)['w'], found['w'])
  with pytest.raises(InputError, match='diff.diff'):
    opt.init({'a': jnp.zeros(3)})


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'fn': 'masks.fsh'}, "unknown function 'masks.fsh'"),
    ({'fn': 'masks.fish', 'densty': 0.1}, 'did you mean density?'),
    ({'fn': 'masks.fish', 'density': 'half'}, "found 'half', expected a number"),
    ({'fn': 'masks.fish', 'density': 0.0}, 'density 0.0 is not in (0, 1]'),
    ({'fn': 'masks.fish', 'unit': 'row'}, "unit 'row'"),
    ({'fn': 'lora.lora'}, "'lora.lora'"),
    (3, 'a function and its options'),
  ],
)
def test_transforms_that_cannot_be_built(options, message):
  cfg = config.default('task=t')
  with cfg.unlocked():
    cfg.optim.groups = {'encoder': {'transform': options}}
    cfg.rules = (('.*', 'encoder'),)
  with pytest.raises(InputError) as error:
    transform.build(config.resolve(cfg)['optim'])
  assert message in str(error.value)
  assert error.value.where.startswith('config.optim.groups.encoder.transform')


def test_options_of_a_transform_may_be_overridden():
  cfg = config.load('configs/sbitfit.py:task=t')
  assert 'optim.groups.bias.transform.examples' in config.paths(cfg)
  cfg.optim.groups.bias.transform.examples = 7
  found = config.resolve(cfg)['optim']['groups']
  assert found == {
    'bias': {'transform': {'fn': 'masks.fish', 'density': 0.33, 'examples': 7, 'unit': 'leaf'}}
  }


def test_an_interrupted_run_with_masks_ends_in_the_same_bits(tmp_path, monkeypatch):
  """What was prepared is read again, draws go on where they stopped."""
  data = runs.reviews(tmp_path / 'reviews.csv')
  monkeypatch.setenv('EFFT_CACHE', str(tmp_path / 'cache'))
  arg = f'task={data},model={runs.BERT},text=review,label=verdict'

  def settings():
    cfg = config.load(f'configs/ubitfit.py:{arg}')
    cfg.optim.groups.bias.transform.examples = 8
    cfg.optim.groups.head.transform = {'fn': 'masks.child_f'}
    cfg.train.steps, cfg.train.batch_size, cfg.train.group_by_length = 6, 8, False
    cfg.model.max_length, cfg.mesh.devices = 24, 1
    return cfg

  run.train(settings(), tmp_path / 'whole')
  batches = finetune.batches.Batches
  batch = batches.batch

  def stop(self, number):
    if number == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return batch(self, number)

  monkeypatch.setattr(batches, 'batch', stop)
  with pytest.raises(Preempted):
    run.train(settings(), tmp_path / 'broken')
  monkeypatch.setattr(batches, 'batch', batch)
  monkeypatch.setattr(prepare, 'prepare', lambda *args, **fields: pytest.fail('prepared again'))
  run.train(settings(), tmp_path / 'broken', resume='must')
  weights = 'bundle/weights.safetensors'
  assert (tmp_path / 'whole' / weights).read_bytes() == (tmp_path / 'broken' / weights).read_bytes()

  # A damaged file is no reason to fail: the mask is a function of config and data.
  file = tmp_path / 'broken' / 'prepared.npz'
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])
  found = finetune._given(file, lambda: {'g': {'params/a': np.ones(2, bool)}}, True)
  assert finetune._given(file, None, True).keys() == found.keys() == {'g'}
