"""Adapters against AdapterHub's numbers, explicit sums and loops."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest

from efft.errors import InputError
from efft.peft import adapter, attention_adapter, base, lora, phm
from efft.peft.base import Site

PEERS = ('bert', 'roberta')
LEAVES = {
  'adapter_down.0.weight': 'down',
  'adapter_down.0.bias': 'down_bias',
  'adapter_down.0.W_left': 'down_s',
  'adapter_down.0.W_right': 'down_t',
  'adapter_down.0.b': 'down_bias',
  'adapter_up.weight': 'up',
  'adapter_up.bias': 'up_bias',
  'adapter_up.W_left': 'up_s',
  'adapter_up.W_right': 'up_t',
  'adapter_up.b': 'up_bias',
  'scaling': 'scale',
  'gate.weight': 'gate',
  'gate.bias': 'gate_bias',
}


def entry(tensors: dict, stem: str, names: dict = LEAVES) -> dict:
  """What lies below `stem`, by our names, with kernels turned round."""
  found = {n.removeprefix(stem): x for n, x in tensors.items() if n.startswith(stem)}
  return {names[n]: x.T if n.endswith('weight') else x for n, x in found.items()}


def adapters_of(peer, name: str, adapter_name: str = 'mytask') -> dict:
  """The tree of a bottleneck adapter that AdapterHub wrote."""
  tree = {}
  for i in range(peer.cfg.layers):
    places = {'attention_out': 'attention.output', 'mlp_out': 'output'}
    here = {
      f'{site}_{name}': entry(peer.tensors, f'encoder.layer.{i}.{place}.adapters.{adapter_name}.')
      for site, place in places.items()
    }
    tree[f'layer_{i}'] = {leaf: p for leaf, p in here.items() if p}
  return tree


@pytest.mark.parametrize('architecture', PEERS)
@pytest.mark.parametrize(
  ('method', 'make', 'sites'),
  [
    ('seq_bn', adapter.pfeiffer, 1),
    ('double_seq_bn', functools.partial(adapter.houlsby, size=2, activation='silu'), 2),
    ('par_bn', functools.partial(adapter.parallel, size=16), 1),
    ('scaled_par_bn', functools.partial(adapter.parallel, size=16, learn_scale=True), 1),
    ('compacter_rf2', functools.partial(phm.compacter, reduction=2), 2),
    ('compacterpp_rf2', functools.partial(phm.compacter_plus, reduction=2), 1),
  ],
)
def test_adapterhub_gives_the_same_logits(architecture, method, make, sites):
  peer = peer_files.read('adapters', architecture, method)
  tree = adapters_of(peer, 'a')
  assert [len(layer) for layer in tree.values()] == [sites] * peer.cfg.layers
  if 'compacter' in method:
    tree['shared_a'] = {'rule': peer.tensors['shared_parameters.mytask.phm_rule']}
  peer.agrees({'a': make()}, tree)


@pytest.mark.parametrize('architecture', PEERS)
def test_adapterhub_invertible_gives_the_same_logits(architecture):
  peer = peer_files.read('adapters', architecture, 'seq_bn_inv')
  names = {
    f'{net}.{i}.{kind}': f'{net.lower()}_{"up" if i else "down"}{suffix}'
    for net, i, (kind, suffix) in itertools.product(
      'FG', (0, 2), (('weight', ''), ('bias', '_bias'))
    )
  }
  tree = adapters_of(peer, 'a')
  tree['embed_i'] = entry(peer.tensors, 'invertible_adapters.mytask.', names)
  peer.agrees({'i': adapter.invertible(), 'a': adapter.pfeiffer()}, tree)


@pytest.mark.parametrize('architecture', PEERS)
def test_adapterhub_union_gives_the_same_logits(architecture):
  peer = peer_files.read('adapters', architecture, 'union_lora_seqbn')
  tree = adapters_of(peer, 'a')
  for i in range(peer.cfg.layers):
    tree[f'layer_{i}']['attention'] = {
      name: {'matmul_lora': lora_of(peer, i, name)} for name in ('query', 'value')
    }
  peer.agrees({'a': adapter.pfeiffer(4), 'lora': lora.lora(4, 16.0)}, tree)


def lora_of(peer, layer: int, name: str) -> dict:
  stem = f'encoder.layer.{layer}.attention.self.{name}.loras.mytask.'
  names = {'lora_A': 'a', 'lora_B': 'b', 'gate.weight': 'gate', 'gate.bias': 'gate_bias'}
  p = entry(peer.tensors, stem, names)
  return p | {leaf: p[leaf].T for leaf in ('a', 'b')}


def draw(rng, *shape):
  return rng.normal(0, 1, shape).astype(np.float32)


def filled(rng, p):
  return {name: draw(rng, *x.shape) for name, x in p.items()}


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_compacter_kernels_are_sums_of_kronecker_products():
  rng = np.random.default_rng(0)
  rule, s, t = draw(rng, 3, 3, 3), draw(rng, 3, 4, 2), draw(rng, 3, 2, 5)
  expected = sum(np.kron(a, left @ right) for a, left, right in zip(rule, s, t, strict=True))
  close(phm.kernel(rule, s, t), expected)


def test_compacter_rounds_its_width_up():
  """25 / 6 is 4 units, which four terms divide; five terms of 25 need 5."""
  site = Site('layer_0/mlp_out', jnp.zeros((1, 2, 25)))
  p = phm.compacter(n=5, reduction=6).init(jax.random.key(0), site)
  assert p['down_t'].shape == (5, 1, 1) and p['up_s'].shape == (5, 1, 1)
  with pytest.raises(ValueError, match='n 4 does not divide'):
    phm.compacter().init(jax.random.key(0), site)


def test_adapter_plus_scales_channels_and_skips_examples():
  rng = np.random.default_rng(1)
  y = draw(rng, 2, 3, 8)
  seen = []

  def dropout(x, rate):
    seen.append((x.shape, rate))
    return x * jnp.asarray([0.0, 1 / (1 - rate)]).reshape(2, 1, 1)

  site = Site('layer_0/output', jnp.asarray(y), dropout=dropout)
  method = adapter.adapter_plus(reduction=96, activation='relu', depth_dropout=0.2)
  start = method.init(jax.random.key(0), site)
  assert start['down'].shape == (8, 1) and (start['scale'] == 1).all()
  assert 0 < np.abs(start['up']).max() <= 0.02 * 1.2
  p = filled(rng, start)
  hidden = np.maximum(y @ p['down'] + p['down_bias'], 0) @ p['up'] + p['up_bias']
  out = method.apply(p, site)
  np.testing.assert_array_equal(out[0], y[0])
  close(out[1], y[1] + hidden[1] * p['scale'] / 0.8)
  assert seen == [((2, 1, 1), 0.2)]


@pytest.mark.parametrize('d', [8, 9])
def test_invertible_adapter_can_be_inverted(d):
  rng = np.random.default_rng(2)
  x, mask = draw(rng, 2, 3, d), np.ones((2, 3), bool)
  site = Site('embed', (jnp.asarray(x), mask))
  method = adapter.invertible(activation='tanh')
  p = filled(rng, method.init(jax.random.key(0), site))
  y, seen = method.apply(p, site)
  assert seen is mask and np.abs(y - x).min(-1).max() > 0

  def net(name, h):
    inner = np.tanh(h @ p[f'{name}_down'] + p[f'{name}_down_bias'])
    return inner @ p[f'{name}_up'] + p[f'{name}_up_bias']

  y1, y2 = y[..., : d // 2], y[..., d // 2 :]
  x2 = y2 - net('g', y1)
  close(np.concatenate([y1 - net('f', x2), x2], -1), x, 1e-4)


def test_tiny_attention_is_attention_over_real_tokens():
  rng = np.random.default_rng(3)
  y, lengths, heads, size = draw(rng, 2, 4, 6), (4, 2), 3, 2
  mask = np.arange(4) < np.asarray(lengths)[:, None]
  site = Site('layer_0/attention_out', jnp.asarray(y), mask=mask)
  method = attention_adapter.tiny_attention(heads, size)
  p = filled(rng, method.init(jax.random.key(0), site))
  expected = y.copy()
  for b, t in itertools.product(range(2), range(4)):
    mixed = []
    for h in range(heads):
      own = slice(h * size, (h + 1) * size)
      q, k, v = (y[b] @ p[name][:, own] for name in ('query', 'key', 'value'))
      score = np.exp([q[t] @ k[j] / math.sqrt(size) for j in range(lengths[b])])
      mixed.append(sum(w * v[j] for j, w in enumerate(score / score.sum())))
    expected[b, t] += np.concatenate(mixed) @ p['out'] + p['out_bias']
  close(method.apply(p, site), expected, 1e-4)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'fn': 'adapter.adapter_plus', 'reduction': 0}, 'reduction 0'),
    ({'fn': 'adapter.invertible', 'activation': 'glu'}, "'glu'"),
    ({'fn': 'phm.compacter', 'rank': 0}, 'rank 0'),
    ({'fn': 'phm.compacter_plus', 'n': 0}, 'n 0'),
    ({'fn': 'attention_adapter.tiny_attention', 'heads': 0}, 'heads 0'),
  ],
)
def test_refuses(spec, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': spec})
