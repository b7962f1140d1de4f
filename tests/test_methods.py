"""The contract that every method passes. A new method is one row in rows_*.py."""

import functools
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from efft import assemble, catalogue, compact, files, mesh, quantize, transfer, tree
from efft.compress import slicing
from efft.compress.base import Keep
from efft.errors import InputError
from efft.models.encoder import Encoder, init_params
from efft.models.layers import Hooks
from efft.peft import base
from efft.training import losses, step

TABLE = tuple(
  row
  for file in sorted(Path(__file__).parent.glob('rows_*.py'))
  for row in importlib.import_module(file.stem).ROWS
)

# How far an int8 base may move logits (of the largest) and a delta's gradients (of their norm).
INT8_LOGITS, INT8_GRADIENTS = 0.05, 0.15
# What `efft methods` prints.
COSTS = files.read_json(catalogue.FILE)

every_row = pytest.mark.parametrize('row', TABLE, ids=str)
DELTAS = [row for row in TABLE if tiny.settings(row.config)['method']]
every_delta = pytest.mark.parametrize('row', DELTAS, ids=str)


def by_row(fn):
  """`functools.cache` for functions of a row, which holds a dictionary and so has no hash."""
  cached = functools.cache(lambda name: fn(next(row for row in TABLE if str(row) == name)))
  return lambda row: cached(str(row))


settings = by_row(lambda row: tiny.settings(row.config, **row.options))
world = by_row(lambda row: tiny.world(settings(row)))


@by_row
def logits(row):
  """The jitted forward pass that most checks share: compiled once a row."""
  return jax.jit(world(row).logits)


@functools.cache
def plain():
  """(variables, batch) -> logits of the encoder without any delta."""
  return jax.jit(step.forward(Encoder(tiny.CFG)))


@by_row
def moved(row):
  """Variables with a delta that has been somewhere: at its start half of it may act on nothing."""
  here = world(row)
  rng = np.random.default_rng(2)

  def shift(path, x):
    trains = path.startswith('delta/') and path in here.groups
    return x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if trains else x

  return tree.map_paths(shift, here.variables)


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


BATCH = tiny.batch(length=16)


def test_closed_forms_are_the_printed_numbers():
  first = importlib.import_module('rows_first')
  assert tuple(row.trains for row in first.ROWS[: len(first.PRINTED)]) == first.PRINTED


@every_delta
def test_identity_at_start(row):
  variables = world(row).variables
  before = plain()({'params': tiny.params()}, BATCH)
  after = logits(row)(variables, BATCH)
  if row.start:
    distance = np.abs(after - before).max() / np.abs(before).max()
    assert 0 < distance < row.start
  else:
    close(after, before, 1e-6)


@every_delta
def test_delta_acts_once_it_has_moved(row):
  """Otherwise every check below would hold of a delta that is never applied."""
  start, after = (logits(row)(v, BATCH) for v in (world(row).variables, moved(row)))
  assert np.abs(after - start).max(-1).min() > 1e-3, 'every row of the batch'


@every_row
def test_a_step_changes_what_the_rules_say(row):
  """And lowers the loss, with finite gradients in bfloat16."""
  here = tiny.world(settings(row), tiny.SHORT, dtype=jnp.bfloat16)
  opt = tiny.optimizer(here, lr=3e-3, warmup=0.0)
  weight = settings(row)['train']['consistency']
  agree = losses.divergence('single', weight) if weight else None
  take = step.make_step(here.logits, losses.single(), opt, penalty=here.penalty, consistency=agree)
  state = step.init_state(here.trainable, opt, seed=0)
  frozen = step.cast_frozen(here.frozen, jnp.bfloat16)
  before = jax.tree.map(np.asarray, frozen)
  history = []
  for _ in range(8):
    state, metrics = take(state, frozen, BATCH)
    history.append(float(metrics['loss']))
    assert np.isfinite(history[-1]) and np.isfinite(float(metrics['grad_norm']))
  assert history[-1] < history[0]
  jax.tree.map(np.testing.assert_array_equal, frozen, before)
  start, end = tree.flatten(here.trainable), tree.flatten(state.trainable)
  assert start.keys() == end.keys() == here.groups.keys()
  assert not start.keys() & tree.flatten(frozen).keys()
  still = [path for path in start if np.array_equal(start[path], end[path])]
  # A softmax over keys does not see what is added to all of them.
  pattern = f'.*attention/key/bias|{row.still}'
  assert not [path for path in still if not re.fullmatch(pattern, path)]


@every_delta
def test_merge_equals_apply(row):
  here, variables = world(row), moved(row)
  if not row.merges:
    with pytest.raises(InputError, match='which cannot be folded'):
      base.merge(here.deltas, variables['params'], variables['delta'])
    return
  merged = base.merge(here.deltas, variables['params'], variables['delta'])
  assert tree.diff(variables['params'], merged) == ''
  close(plain()({'params': merged}, BATCH), logits(row)(variables, BATCH), max(1e-4, row.tolerance))


@functools.cache
def bert_base():
  return jax.eval_shape(lambda key: init_params(catalogue.BERT_BASE, key), jax.random.key(0))


@every_row
def test_trainable_count_on_bert_base(row):
  """Shapes alone: nothing of that size is allocated."""
  resolved = settings(row)
  deltas = base.build(resolved['method'])
  variables = {'params': bert_base()}
  if deltas:
    model = Encoder(catalogue.BERT_BASE, Hooks(tap=base.attach(deltas)))
    variables['delta'] = jax.eval_shape(
      lambda params, key: base.init(model, deltas, params, key), bert_base(), jax.random.key(0)
    )
  groups = assemble.partition(variables, resolved['rules']).groups
  head, rest = tree.split(variables, lambda path: groups.get(path) == 'head')
  trained, _ = tree.split(rest, groups.__contains__)
  assert tree.count(head) == 768 * 2 + 2
  assert tree.count(trained) == row.trains
  if not row.options:
    assert COSTS[row.config]['trained'] == row.trains, 'python -m efft.catalogue'


@every_delta
def test_int8_base_under_the_delta(row):
  """Logits and the gradients of layer 0's delta, through int8 products forward and backward."""
  here = tiny.world(settings(row), tiny.SHORT)
  rng = np.random.default_rng(2)

  def shift(path, x):
    trains = path.startswith('delta/') and path in here.groups
    return x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype) if trains else x

  values = tree.map_paths(shift, here.variables)
  direction = rng.normal(size=(len(BATCH['labels']), 3))

  @jax.jit
  def both(params, delta):
    trains, rest = tree.split({'delta': delta}, here.groups.__contains__)

    def cost(trains):
      out = here.logits({'params': params, **tree.join(trains, rest)}, BATCH)
      return jnp.sum(out * direction), out

    (_, out), grads = jax.value_and_grad(cost, has_aux=True)(trains)
    return out, grads

  out, grads = both(values['params'], values['delta'])
  held = quantize.quantized({'params': values['params']}, 'int8')['params']
  rough, rough_grads = both(held, values['delta'])
  distance = np.abs(rough - out).max() / np.abs(out).max()
  flat = [jnp.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in (grads, rough_grads)]
  gap = np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[0])
  if not row.int8:
    assert 0 < distance < 4 * INT8_LOGITS, distance
    return
  assert 0 < distance < INT8_LOGITS and 0 < gap < INT8_GRADIENTS, (distance, gap)


@every_delta
def test_remat_and_mesh_give_the_same_logits(row):
  variables, devices = moved(row), mesh.make()
  assert devices.size == 8, 'run the tests with eight simulated devices'
  here = world(row)
  here = here._replace(model=here.model.clone(remat=True))
  out = jax.jit(here.logits)(mesh.place(variables, devices), mesh.put_batch(BATCH, devices))
  assert len(out.sharding.device_set) == 8 and not out.is_fully_replicated
  close(out, logits(row)(variables, BATCH), row.tolerance)


@every_delta
def test_init_is_a_function_of_the_key(row):
  here = world(row)

  found = base.init(
    here.model.clone(remat=True), here.deltas, tiny.params(), jax.random.key(1), BATCH
  )
  first, again = tree.flatten(here.variables['delta']), tree.flatten(found)
  assert first.keys() == again.keys() and all((first[p] == again[p]).all() for p in first)
  random = [
    path for path, x in first.items() if f'delta/{path}' in here.groups and len(np.unique(x)) > 1
  ]
  draws = {first[path].tobytes() for path in random}
  assert len(draws) == len(random), 'each site draws its own numbers'


@every_delta
def test_padding_does_not_change_logits(row):
  """Neither its tokens nor its amount."""
  variables = moved(row)
  noise = np.random.default_rng(1).integers(0, tiny.CFG.vocab_size, BATCH['mask'].shape)
  noisy = BATCH | {'input_ids': np.where(BATCH['mask'], BATCH['input_ids'], noise)}
  full = logits(row)(variables, BATCH)
  close(logits(row)(variables, noisy), full, row.tolerance)
  short = BATCH['mask'].sum(1).argsort()[:4]
  longest = BATCH['mask'][short].sum(1).max()
  tight = {name: x[short, :longest] for name, x in BATCH.items() if x.ndim == 2}
  assert longest < 16
  close(world(row).logits(variables, tight), full[short], row.tolerance)


@every_delta
def test_saved_delta_alone_gives_the_same_logits_bit_for_bit(row, tmp_path):
  """The file holds what trains, by path; the base comes from where it came from."""
  here, variables = world(row), moved(row)
  trainable, frozen = tree.split(variables, here.groups.__contains__)
  leaves = transfer.handed_on(here.deltas, trainable, frozen, tiny.params())
  np.savez(tmp_path / 'delta.npz', **compact.encode(leaves))
  with np.load(tmp_path / 'delta.npz') as file:
    saved = compact.decode(file, {path: x.shape for path, x in leaves.items()})
  again = transfer.restored(here.deltas, saved, tiny.params())
  np.testing.assert_array_equal(logits(row)(again, BATCH), logits(row)(variables, BATCH))


@every_delta
def test_without_its_entries_a_delta_does_nothing(row):
  params = {'params': tiny.params()}
  np.testing.assert_allclose(
    world(row).model.apply(params, *(BATCH[n] for n in ('input_ids', 'mask', 'token_types'))),
    plain()(params, BATCH),
    rtol=1e-5,
    atol=1e-5,
  )


@every_delta
def test_at_that_matches_nothing_is_an_error(row):
  here = world(row)
  lost = {
    name: tuple(part._replace(at='layer_7/nowhere') for _, part in base._parts({name: delta}))
    for name, delta in here.deltas.items()
  }
  model = here.model.clone(hooks=Hooks(tap=base.attach(lost)))
  with pytest.raises(InputError) as error:
    base.init(model, lost, here.variables['params'], jax.random.key(0))
  assert error.value.where.startswith('config.method.')
  assert 'layer_7/nowhere' in error.value.found and r'layer_\d+/mlp/act' in error.value.fix


@every_row
def test_a_rule_that_matches_nothing_is_an_error(row):
  rules = [('delta/nowhere/.*', 'delta'), *settings(row)['rules']]
  with pytest.raises(InputError, match='delta/nowhere'):
    tree.labels(world(row).variables, rules)


def test_methods_add_up_and_merge_in_order():
  """(IA)3 scales what LoRA has changed, in the forward pass and in the merged weights."""
  at = r'layer_\d+/(attention/(key|value)|mlp/down)/matmul'
  method = {'lora': {'fn': 'lora.lora', 'at': at}, 'ia3': {'fn': 'scale.ia3'}}
  for order in (method, dict(reversed(method.items()))):
    here = tiny.world({'method': order, 'rules': [('.*', 'all')]}, tiny.SHORT)
    rng = np.random.default_rng(0)
    delta = jax.tree.map(lambda x, r=rng: x + r.normal(0, 0.3, x.shape), here.variables['delta'])
    applied = here.logits({**here.variables, 'delta': delta}, BATCH)
    merged = base.merge(here.deltas, here.variables['params'], delta)
    close(step.forward(Encoder(tiny.SHORT))({'params': merged}, BATCH), applied, 1e-4)


def test_expand_comes_before_apply_and_merge():
  """A delta that trains its logarithm: the one seam that no method above goes through."""
  lora = base.build({'lora': {'fn': 'lora.lora'}})['lora']
  grow = lora._replace(expand=lambda p, path, key: jax.tree.map(jnp.exp, p))
  here = tiny.world(tiny.settings('lora'))
  log = jax.tree.map(lambda x: jnp.full_like(x, -2.0), here.variables['delta'])
  forward = step.forward(here.model, lambda delta, key: base.expand({'lora': grow}, delta, key))
  variables = {**here.variables, 'delta': log}
  merged = base.merge({'lora': grow}, here.variables['params'], log)
  close(plain()({'params': merged}, BATCH), jax.jit(forward)(variables, BATCH), 1e-4)


@pytest.mark.parametrize(
  ('spec', 'where', 'message'),
  [
    ({}, 'config.method.m.fn', 'efft methods'),
    ({'fn': 'lora'}, 'config.method.m.fn', "'lora'"),
    ({'fn': 'lora.dorra'}, 'config.method.m.fn', "'lora.dorra'"),
    ({'fn': 'masks.fish'}, 'config.method.m.fn', "'masks.fish'"),
    ({'fn': 'nowhere.lora'}, 'config.method.m.fn', "'nowhere.lora'"),
    ({'fn': 'lora.lora', 'rnak': 8}, 'config.method.m', "'rnak'"),
    ({'fn': 'lora.lora', 'rank': 0}, 'config.method.m', 'rank 0'),
    ({'fn': 'lora.lora', 'at': 'layer_('}, 'config.method.m', 'unterminated'),
    ({'fn': 'adapter.houlsby', 'activation': 'glu'}, 'config.method.m', "'glu'"),
    ({'fn': 'adapter.pfeiffer', 'reduction': 0}, 'config.method.m', 'reduction 0'),
  ],
)
def test_build_refuses_what_it_cannot_build(spec, where, message):
  with pytest.raises(InputError, match=re.escape(message)) as error:
    base.build({'m': spec})
  assert error.value.where == where


KEEP = Keep(heads=((1, 3), (0, 2, 3)), units=((0, 5, 7, 11), tuple(range(40))))


@every_delta
def test_the_delta_follows_a_smaller_encoder_or_is_refused(row):
  """`cut` compares sliced with gated; tests/test_slicing.py does it once more for some rows."""
  here, variables = world(row), moved(row)
  if not row.slices:
    with pytest.raises(InputError, match='cannot follow.*merge the run first'):
      slicing.cut(tiny.CFG, variables, KEEP, here.deltas)
    return
  cfg, values = slicing.cut(tiny.CFG, variables, KEEP, here.deltas)
  assert (cfg.heads, cfg.mlp) == ((2, 3), (4, 40))
  shapes = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
  assert not tree.diff(shapes, values['params'])
