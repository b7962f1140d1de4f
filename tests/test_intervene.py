"""Scales and edits of representations: definitions, other libraries' numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
import tiny

from efft.errors import InputError
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import attention_adapter, base, intervene, scale

both = pytest.mark.parametrize('architecture', ('bert', 'roberta'))


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@both
@pytest.mark.parametrize('method', ['noreft', 'direft'])
def test_adapterhub_reft(architecture, method):
  """Its LoReFT rounds the signs of a reflection to integers and, once they have moved, is zero."""
  peer = peer_files.read('adapters', architecture, method)

  def unit(layer, name):
    return peer.tensors[f'encoder.layer.{layer}.reft_layer.refts.mytask.units.0.{name}']

  delta = {
    f'layer_{i}': {
      'output_m': {
        'r': unit(i, 'projection.weight').T,
        'w': unit(i, 'learned_source.weight').T,
        'b': unit(i, 'learned_source.bias'),
      }
    }
    for i in range(2)
  }
  options = {'rank': peer.config['r'], 'first': peer.config['prefix_positions']}
  peer.agrees({'m': getattr(intervene, method)(**options)}, delta)


@both
def test_peft_ia3(architecture):
  """Its default for BERT scales the input of both output layers."""
  peer = peer_files.read('peft', architecture, 'ia3_default')

  def vector(layer, name):
    return peer.tensors[f'encoder.layer.{layer}.{name}.ia3_l'].ravel()

  delta = {
    f'layer_{i}': {
      'attention': {
        'kv_m': {
          'k': vector(i, 'attention.self.key'),
          'v': vector(i, 'attention.self.value'),
        },
        'heads_m': {'out': vector(i, 'attention.output.dense')},
      },
      'mlp': {'act_m': {'ff': vector(i, 'output.dense')}},
    }
    for i in range(2)
  }
  deltas = {'m': scale.ia3(attention_out=True)}
  peer.agrees(deltas, delta)
  merged = base.merge(deltas, peer.params, delta)
  peer._replace(params=merged).agrees({}, {})


@both
def test_adapterhub_ia3(architecture):
  """Keys and values; the library's third scale is before the activation, so it folds into up."""
  peer = peer_files.read('adapters', architecture, 'ia3')
  delta, params = {}, dict(peer.params)
  for i in range(2):
    k, v, ff = (
      peer.tensors[f'encoder.layer.{i}.{name}.loras.mytask.lora_B'].ravel()
      for name in ('attention.self.key', 'attention.self.value', 'intermediate.dense')
    )
    layer = dict(params[f'layer_{i}'])
    up = {name: x * ff for name, x in layer['mlp']['up'].items()}
    params[f'layer_{i}'] = layer | {'mlp': layer['mlp'] | {'up': up}}
    delta[f'layer_{i}'] = {'attention': {'kv_m': {'k': k, 'v': v}}}
  peer._replace(params=params).agrees({'m': scale.ia3()}, delta)


@both
def test_peft_layernorm_tuning(architecture):
  """What trains there is parameters that we train in place."""
  peer = peer_files.read('peft', architecture, 'ln_tuning')
  assert not peer.tensors
  peer.agrees({}, {})


def edited(made, rank, ends):
  """(layer's output before, after, parameters, mask) of `made` in a one-layer encoder."""
  deltas, batch = {'m': made}, tiny.batch()
  args = tuple(batch[name] for name in ('input_ids', 'mask', 'token_types'))
  model = Encoder(tiny.SHORT, Hooks(tap=base.attach(deltas)))
  params = tiny.params(tiny.SHORT)
  delta = base.init(model, deltas, params, jax.random.key(0))
  leaves = delta['layer_0']['output_m']
  assert {name: x.shape for name, x in leaves.items()} == {
    f'{end}{name}': shape
    for end in ends
    for name, shape in (('r', (32, rank)), ('w', (32, rank)), ('b', (rank,)))
  }
  rng = np.random.default_rng(0)
  delta = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), delta)
  seen = {}

  def look(module, site, y, **context):
    after = base.attach(deltas)(module, site, y, **context)
    if site == 'output' and module.path:
      seen['before'], seen['after'] = np.asarray(y), np.asarray(after)
    return after

  variables = {'params': params, 'delta': base.expand(deltas, delta)}
  model.clone(hooks=Hooks(tap=look)).apply(variables, *args)
  p = {k: np.asarray(x, np.float64) for k, x in delta['layer_0']['output_m'].items()}
  return seen['before'], seen['after'], p, batch['mask']


@pytest.mark.parametrize('name', ['loreft', 'noreft', 'direft'])
@pytest.mark.parametrize('tied', [True, False])
def test_reft_token_by_token(name, tied):
  """The last tokens are the last real ones; a short text has fewer, never one twice."""
  first, last, rank = 2, 3, 2
  ends = ('',) if tied else ('first_', 'last_')
  made = getattr(intervene, name)(rank, first, last, tied)
  before, after, p, mask = edited(made, rank, ends)
  expected = before.astype(np.float64)
  for row, length in enumerate(mask.sum(1)):
    for t in range(length):
      end = 'first_' if t < first else 'last_' if t >= length - last else None
      if end is None:
        continue
      r, w, b = (p[f'{"" if tied else end}{leaf}'] for leaf in 'rwb')
      if name == 'loreft':
        q, upper = np.linalg.qr(r)
        r = q * np.sign(np.diag(upper))
      h = before[row, t]
      expected[row, t] += r @ (h @ w + b - (0 if name == 'direft' else h @ r))
  assert 3 <= mask.sum(1).min() < first + last < mask.sum(1).max(), 'texts of both kinds'
  close(after, expected, 1e-4)
  assert (after == before).all(-1).sum() == mask.size - np.minimum(mask.sum(1), 5).sum()


def test_loreft_sets_what_the_subspace_sees():
  """After the edit, the projection on R is h W + b, whatever it was; the rest is as before."""
  before, after, p, mask = edited(intervene.loreft(2, 1), 2, ('',))
  r = np.asarray(intervene.orthonormal_columns(jnp.asarray(p['r'], jnp.float32)))
  close(after[:, 0] @ r, before[:, 0] @ p['w'] + p['b'], 1e-4)
  away = np.eye(32) - r @ r.T
  close(after[:, 0] @ away, before[:, 0] @ away, 1e-4)


def test_orthonormal_columns():
  a = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
  a[:, 5] = a[:, 4] + 1e-3 * a[:, 5]  # nearly dependent, where once would not be enough
  basis = np.asarray(intervene.orthonormal_columns(jnp.asarray(a)))
  close(basis.T @ basis, np.eye(8), 1e-5)
  close(basis @ (basis.T @ a), a, 1e-5)
  close(intervene.orthonormal_columns(jnp.asarray(basis)), basis, 1e-5)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'rank': 0}, 'rank 0'),
    ({'first': 0}, 'no token'),
    ({'first': -1, 'last': 2}, 'first -1'),
  ],
)
@pytest.mark.parametrize('name', ['loreft', 'noreft', 'direft'])
def test_bad_options_are_refused(name, options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': {'fn': f'intervene.{name}', **options}})


@pytest.mark.parametrize(
  ('options', 'message'),
  [({'rank': 33}, 'rank 33 of representations of 32'), ({'at': 'embed'}, "at='embed'")],
)
def test_sites_that_do_not_fit_are_refused(options, message):
  deltas = {'m': intervene.loreft(**options)}
  model = Encoder(tiny.SHORT, Hooks(tap=base.attach(deltas)))
  with pytest.raises(InputError, match=message):
    base.init(model, deltas, tiny.params(tiny.SHORT), jax.random.key(0))


def test_small_scales_act_in_bfloat16():
  """Scales are not rounded, whose neighbours above 1 are 2^-7 apart; products are, once."""
  rng = np.random.default_rng(0)
  y, values = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.bfloat16), np.full(8, 1.003, np.float32)
  expected = (np.asarray(y, np.float32) * values).astype(jnp.bfloat16)
  assert np.mean(expected != y) > 0.2
  here = base.Site('layer_0/mlp/act', y)
  kv, ff, heads = scale.ia3(attention_out=True)
  np.testing.assert_array_equal(ff.apply({'ff': values}, here), expected)
  by_head = y.reshape(2, 5, 2, 4)
  found = heads.apply({'out': values}, here._replace(y=by_head))
  np.testing.assert_array_equal(found.reshape(y.shape), expected)
  for found in kv.apply({'k': values, 'v': values}, here._replace(y=(by_head, by_head, None)))[:2]:
    np.testing.assert_array_equal(found.reshape(y.shape), expected)
  hadamard = attention_adapter.hadamard()
  found = hadamard.apply({'weight': values, 'bias': np.zeros(8, np.float32)}, here)
  np.testing.assert_array_equal(found, expected)
