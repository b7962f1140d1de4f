"""Deltas around deltas, methods put together and the side network, against their definitions."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
import tiny
from test_adapters import PEERS, adapters_of, close, draw, entry, filled, lora_of
from test_methods import bert_base

from efft import catalogue, config, tree
from efft.errors import InputError
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import adapter, base, hybrid, ladder, lora, prefix, wrap
from efft.peft.base import Site
from efft.training import losses, step


def prefix_of(peer, gates: bool = False) -> dict:
  """The tree of AdapterHub's prefixes, under the name 'm'."""
  stem = 'prefix_tuning.prefix_tunings.mytask.self_prefix.'
  names = {
    'wte.weight': 'inputs',
    'control_trans.0.weight': 'down',
    'control_trans.0.bias': 'down_bias',
    'control_trans.2.weight': 'up',
    'control_trans.2.bias': 'up_bias',
  }
  shared = entry(peer.tensors, stem, names)
  shared['inputs'] = shared['inputs'].T  # an embedding table is as wide as ours
  ups = {name: np.split(shared.pop(name), 2 * peer.cfg.layers, -1) for name in ('up', 'up_bias')}
  out = {'shared_m': shared}
  for i in range(peer.cfg.layers):
    own = {f'{kv}_{n}': x[2 * i + j] for n, x in ups.items() for j, kv in enumerate('kv')}
    if gates:
      at = f'encoder.layer.{i}.attention.self.prefix_tuning.prefix_gates.mytask.'
      own |= entry(peer.tensors, at, {'weight': 'gate', 'bias': 'gate_bias'})
    out[f'layer_{i}'] = {'attention': {'kv_m': own}}
  return out


def joined(*trees) -> dict:
  return tree.join(*trees)


@pytest.mark.parametrize('architecture', PEERS)
def test_adapterhub_mam_gives_the_same_logits(architecture):
  peer = peer_files.read('adapters', architecture, 'mam_small')
  method = hybrid.mam(length=4, hidden=8, size=16, scale=4.0)
  peer.agrees({'m': method}, joined(adapters_of(peer, 'm'), prefix_of(peer)))


@pytest.mark.parametrize('architecture', PEERS)
def test_adapterhub_unipelt_gives_the_same_logits(architecture):
  """Of the row without padding, over which its gates average; alpha as if it were the rank."""
  peer = peer_files.read('adapters', architecture, 'unipelt_small')
  full = peer.batch['mask'].all(1)
  assert full.sum() == 1
  peer = peer._replace(
    batch={name: x[full] for name, x in peer.batch.items()}, logits=peer.logits[full]
  )
  low = {
    f'layer_{i}': {'attention': {n: {'matmul_m': lora_of(peer, i, n)} for n in ('query', 'value')}}
    for i in range(peer.cfg.layers)
  }
  method = hybrid.unipelt(length=4, hidden=8, rank=8, alpha=8.0)
  peer.agrees({'m': method}, joined(adapters_of(peer, 'm'), prefix_of(peer, gates=True), low))


def test_adapterhub_fusion_gives_the_same_logits():
  peer = peer_files.read('adapters', 'bert', 'fusion')
  each = [adapters_of(peer, 'f', name) for name in 'ab']
  together = jax.tree.map(lambda *x: np.stack(x), *each)
  names = {
    f'{n}.{kind}': n + s
    for n in ('query', 'key')
    for kind, s in (('weight', ''), ('bias', '_bias'))
  }
  for i in range(peer.cfg.layers):
    stem = f'encoder.layer.{i}.output.adapter_fusion_layer.a,b.'
    own = entry(peer.tensors, stem, names | {'value.weight': 'value'})
    together[f'layer_{i}']['mlp_out_f'] |= own
  peer.agrees({'f': hybrid.fusion()}, together)


def test_fusion_penalty_is_the_distance_of_values_from_the_identity():
  value = np.eye(3) + np.arange(9).reshape(3, 3)
  cost = hybrid.fusion(regularization=0.5).penalty({'value': jnp.asarray(value)}, '')
  close(cost, 0.5 * sum(i * i for i in range(9)))


def site_of(rng, path='layer_0/mlp_out', lengths=(4, 2)):
  mask = np.arange(4) < np.asarray(lengths)[:, None]
  y, x = (jnp.asarray(draw(rng, len(lengths), 4, 8)) for _ in range(2))
  return Site(path, y, x=x, w=jnp.zeros((8, 8)), norm=jnp.tanh, mask=mask)


@pytest.mark.parametrize('inner', [adapter.parallel(size=3), lora.lora(2)])
def test_a_gate_scales_what_the_delta_adds(inner):
  rng = np.random.default_rng(0)
  site = site_of(rng)
  method = wrap.gated(inner)
  p = filled(rng, method.init(jax.random.key(0), site))
  added = inner.apply(p, site) - site.y
  for bias, amount in ((100.0, 1.0), (-100.0, 0.0)):
    sure = p | {'gate': p['gate'] * 0, 'gate_bias': jnp.full(1, bias)}
    close(method.apply(sure, site), site.y + amount * added)
  for b, length in enumerate((4, 2)):
    h = np.asarray(site.x[b, :length], np.float64) @ p['gate'][:, 0] + p['gate_bias'][0]
    g = np.mean(1 / (1 + np.exp(-h)))
    close(method.apply(p, site)[b], site.y[b] + g * added[b], 1e-4)


def test_a_gate_scales_the_keys_and_values_in_front():
  rng = np.random.default_rng(1)
  k, v = (jnp.asarray(draw(rng, 2, 4, 2, 3)) for _ in range(2))
  mask = jnp.ones((2, 4), bool)
  site = site_of(rng, 'layer_0/attention/kv')._replace(y=(k, v, mask))
  (inner,) = prefix.prefix(length=2)
  method = wrap.gated(inner)
  p = filled(rng, method.init(jax.random.key(0), site))
  g = wrap.gate(p, site.x, site.mask)
  for plain, gated in zip(inner.apply(p, site)[:2], method.apply(p, site)[:2], strict=True):
    close(gated[:, :2], plain[:, :2] * g[:, None, None, None])
    np.testing.assert_array_equal(gated[:, 2:], plain[:, 2:])


def entries(method, at, layers, seed=0):
  """Filled parameters at a path of each layer, with what they share."""
  rng = np.random.default_rng(seed)
  sites = {path: site_of(rng, path) for path in (f'layer_{i}/{at}' for i in range(layers))}
  common = method.shared(jax.random.key(1), sites) if method.shared else {}
  own = {path: filled(rng, method.init(jax.random.key(0), site)) for path, site in sites.items()}
  return sites, {path: {**common, **p} for path, p in own.items()}


def test_robust_adapterdrop_leaves_out_the_first_n_layers():
  method = wrap.adapterdrop(reduction=2)
  sites, p = entries(method, 'mlp_out', layers=4)

  @jax.jit
  def outputs(key):
    return [method.apply(method.expand(p[path], path, key), sites[path]) for path in p]

  whole = [method.apply(method.expand(p[path], path, None), sites[path]) for path in p]
  counts = []
  for seed in range(32):
    out = outputs(jax.random.key(seed))
    moved = [not np.array_equal(y, site.y) for y, site in zip(out, sites.values(), strict=True)]
    assert moved == sorted(moved), 'from some layer on'
    counts.append(moved.count(False))
    for y, expected in list(zip(out, whole, strict=True))[counts[-1] :]:
      close(y, expected)
  assert set(counts) == {0, 1, 2, 3}, 'never all four'
  assert all(np.abs(y - s.y).max() > 0.1 for y, s in zip(whole, sites.values(), strict=True))


def test_a_mixture_of_equals_is_one_of_them_and_draws_one():
  single = adapter.pfeiffer(2)
  method = wrap.mixture(single, 3)
  sites, p = entries(method, 'mlp_out', layers=8)
  path, site = next(iter(sites.items()))
  equal = {name: jnp.broadcast_to(x[:1], x.shape) for name, x in p[path].items()}
  alone = {name.removeprefix('experts_'): x[0] for name, x in p[path].items()}
  for key in (None, jax.random.key(0)):
    close(method.apply(method.expand(equal, path, key), site), single.apply(alone, site))
  mean = method.expand(p[path], path, None)
  close(mean['up'], np.mean(p[path]['experts_up'], 0))
  draws = [method.expand(p[path], path, jax.random.key(0)) for path in p]
  numbers = []
  for own, drawn in zip(p.values(), draws, strict=True):
    same = [all(np.array_equal(drawn[n], own[f'experts_{n}'][i]) for n in drawn) for i in range(3)]
    assert same.count(True) == 1, 'whole experts'
    numbers.append(same.index(True))
  assert len(set(numbers)) > 1, 'each site its own'


def test_masks_keep_the_largest_scores_and_pass_gradients_through():
  keep, rng = 0.3, np.random.default_rng(4)
  scores, weight = draw(rng, 5, 4), draw(rng, 5, 4)
  kept = sorted((abs(x) for x in scores.flat), reverse=True)[: round(keep * 20)]
  expected = np.asarray([[float(abs(x) in kept) for x in row] for row in scores])
  np.testing.assert_array_equal(wrap.largest(jnp.asarray(scores), keep), expected)
  grad = jax.grad(lambda s: jnp.sum(wrap.largest(s, keep) * weight))(jnp.asarray(scores))
  close(grad, weight * np.sign(scores))


def test_layers_share_a_prototype_and_not_its_mask():
  method = wrap.propetl_adapter(reduction=2, keep=0.5)
  sites, p = entries(method, 'mlp_out', layers=2)
  single = adapter.pfeiffer(2)
  first, second = (method.expand(p[path], path, None) for path in p)
  prototype = {n.removeprefix('mlp_out_8_'): x for n, x in p['layer_0/mlp_out'].items()}
  for path, own in zip(p, (first, second), strict=True):
    by_hand = dict(prototype)
    for leaf in ('down', 'up'):
      size = np.abs(p[path][f'{leaf}_scores'])
      by_hand[leaf] = np.where(size >= np.sort(size.flat)[size.size // 2], prototype[leaf], 0)
      np.testing.assert_array_equal(own[leaf], by_hand[leaf])
    own_names = ('down', 'down_bias', 'up', 'up_bias')
    assert set(own) == set(own_names)
    expected = single.apply({n: by_hand[n] for n in own_names}, sites[path])
    close(method.apply(own, sites[path]), expected)
  assert not np.array_equal(first['down'] != 0, second['down'] != 0)


def found_in_bert_base(method: dict) -> dict:
  deltas = base.build(method)
  model = Encoder(catalogue.BERT_BASE, Hooks(tap=base.attach(deltas)))
  shapes = jax.eval_shape(
    lambda params, key: base.init(model, deltas, params, key), bert_base(), jax.random.key(0)
  )
  return tree.flatten(shapes)


def config_of(name: str) -> dict:
  return config.resolve(config.load(f'configs/{name}.py:task=sst2'))['method']


def test_adapterdrop_has_no_adapters_in_the_first_five_layers():
  found = found_in_bert_base(config_of('adapterdrop'))
  assert {path.split('/')[0] for path in found} == {f'layer_{i}' for i in range(5, 12)}
  assert tree.count(found) == 7 * importlib.import_module('rows_adapter').PFEIFFER


def test_s4_gives_each_group_of_layers_its_methods():
  method = config_of('s4')
  method['s4']['layers'] = 12
  found = found_in_bert_base(method)
  kinds = {}
  for path in found:
    layer, rest = path.split('/', 1)
    leaf = rest.rsplit('/', 1)[1]
    letter = {'down': 'A', 'a': 'L', 'k': 'P', 'bias': 'B'}.get(leaf)
    kinds.setdefault(int(layer.removeprefix('layer_')), set()).add(letter)
  letters = [''.join(sorted(kinds[i] - {None})) for i in range(12)]
  assert letters == ['AL'] * 2 + ['AP'] * 4 + ['ABP'] * 4 + ['BLP'] * 2
  biases = [path for path in found if path.endswith('/bias')]
  assert len(biases) == 6 * 6, 'of all six linear layers, in the last six layers'


def features(rng, layers=3):
  return [jnp.asarray(draw(rng, 2, 4, 8)) for _ in range(layers + 1)]


def test_ladder_gates_choose_between_the_encoder_and_the_side():
  rng = np.random.default_rng(5)
  mask = np.arange(4) < np.asarray([[4], [2]])
  steps = features(rng)
  site = Site('output', (steps[-1], mask), features=steps)
  method = ladder.ladder(reduction=2, heads=2)
  p = filled(rng, method.init(jax.random.key(0), site))
  run = jax.jit(lambda p, features: method.apply(p, site._replace(features=features))[0])

  def moves(gates, number):
    """Whether the output of the gated ladder depends on one feature."""
    changed = [f + 1.5 * rng.normal(size=f.shape) * (i == number) for i, f in enumerate(steps)]
    own = p | {'gate': jnp.asarray(gates)}
    a, b = (run(own, f) for f in (steps, changed))
    return bool(np.abs(a - b).max() > 1e-3)

  assert [moves([0.0, 0.0, 0.0], i) for i in range(4)] == [True] * 4
  assert [moves([-9.0, -9.0, -9.0], i) for i in range(4)] == [True, False, False, False]
  assert [moves([9.0, -9.0, -9.0], i) for i in range(4)] == [False, True, False, False]
  assert [moves([0.0, 0.0, 9.0], i) for i in range(4)] == [False, False, False, True]


def flops(here, backward: bool) -> float:
  batch = tiny.batch(cfg=tiny.CFG)

  def loss(trainable, frozen):
    scores = here.logits(tree.join(trainable, frozen), batch)
    return losses.single()(scores, batch['labels']).mean()

  fn = jax.grad(loss) if backward else loss
  return jax.jit(fn).lower(here.trainable, here.frozen).cost_analysis()['flops']


def test_no_gradient_goes_back_through_the_encoder_beside_a_ladder():
  plain = jax.jit(step.forward(Encoder(tiny.CFG)))
  encoder = plain.lower({'params': tiny.params()}, tiny.batch()).cost_analysis()['flops']

  def back(name):
    here = tiny.world(tiny.settings(name))
    return (flops(here, True) - flops(here, False)) / encoder

  assert back('ladder') < 0.5
  assert back('lora') > 0.8


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'fn': 'hybrid.fusion', 'n': 0}, 'n 0'),
    ({'fn': 'hybrid.s4', 'layers': 0}, 'layers 0'),
    ({'fn': 'wrap.adamix', 'experts': 0}, 'experts 0'),
    ({'fn': 'wrap.propetl_lora', 'keep': 0.0}, 'keep 0.0'),
    ({'fn': 'ladder.ladder', 'temperature': 0.0}, 'temperature 0.0'),
    ({'fn': 'ladder.ladder', 'activation': 'glu'}, "'glu'"),
  ],
)
def test_refuses(spec, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': spec})
