"""The encoder's structure: parameters, sites, dropout, types. Its logits: test_convert."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from efft import tree
from efft.models import dots
from efft.models.encoder import HEADS, Encoder, EncoderConfig, init_params
from efft.models.layers import ACTIVATIONS, Hooks
from efft.peft import base

ROBERTA = dataclasses.replace(
  tiny.CFG, architecture='roberta', positions_from_pad=True, pad_id=1, token_types=1
)
ELECTRA = dataclasses.replace(tiny.CFG, architecture='electra', embed_dim=16, pooling='mean')


def apply(cfg, params, batch, key=None, **fields):
  """Not jitted, so that Python sees what passes."""
  rngs = None if key is None else {'dropout': key}
  args = batch['input_ids'], batch['mask'], batch['token_types']
  return Encoder(cfg, **fields).apply({'params': params}, *args, rngs=rngs)


def shapes(cfg):
  return jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))


def test_config_survives_json_and_stays_hashable():
  again = EncoderConfig.from_dict(json.loads(json.dumps(ELECTRA.to_dict())))
  assert again == ELECTRA and hash(again) == hash(ELECTRA)
  assert (tiny.CFG.layers, tiny.CFG.max_length, ROBERTA.max_length) == (2, 24, 22)


@pytest.mark.parametrize('pooling', ['cls', 'mean'])
@pytest.mark.parametrize('architecture', HEADS)
def test_heads_have_the_parts_of_their_architecture(architecture, pooling):
  cfg = dataclasses.replace(tiny.CFG, architecture=architecture, pooling=pooling, token_types=0)
  tops = {path.rpartition('/')[0] for path in tree.flatten(shapes(cfg))}
  own = {
    'bert': {'pooler', 'head/out'},
    'roberta': {'head/dense', 'head/out'},
    'xlm-roberta': {'head/dense', 'head/out'},
    'camembert': {'head/dense', 'head/out'},
    'distilbert': {'head/dense', 'head/out'},
    'electra': {'head/dense', 'head/out'},
  }[architecture]
  found = {path for path in tops if not path.startswith(('embed', 'layer_'))}
  assert found == (own if pooling == 'cls' else {'head/out'})
  assert 'embed/token_type' not in tops


def test_layers_may_differ_in_width():
  cfg = dataclasses.replace(tiny.CFG, heads=(4, 1), mlp=(48, 16))
  flat = {path: x.shape for path, x in tree.flatten(shapes(cfg)).items()}
  assert flat['layer_1/attention/query/kernel'] == (32, 8)
  assert flat['layer_1/attention/out/kernel'] == (8, 32)
  assert flat['layer_1/mlp/up/kernel'] == (32, 16)
  assert flat['layer_0/mlp/up/kernel'] == (32, 48)
  logits = jax.eval_shape(lambda params: apply(cfg, params, tiny.batch()), shapes(cfg))
  assert logits.shape == (8, 3) and logits.dtype == jnp.float32


def test_initial_parameters():
  params = tree.flatten(jax.jit(lambda key: init_params(tiny.SHORT, key))(jax.random.key(0)))
  for path, x in params.items():
    kind = path.rpartition('/')[2]
    if kind in ('kernel', 'embedding'):
      assert abs(float(x.std()) / 0.02 - 1) < 0.3, path
    else:
      assert (x == (kind == 'scale')).all(), path


BLOCKS = {
  'attention': ['query', 'key', 'value', 'kv', 'heads', 'out'],
  'mlp': ['up', 'act', 'down'],
}


def test_sites_are_those_of_the_table_in_order():
  expected = ['embed/words', 'embed/project/matmul', 'embed']
  for i in range(2):
    for block, sites in BLOCKS.items():
      inner = [s if s in ('kv', 'heads', 'act') else f'{s}/matmul' for s in sites]
      expected += [f'layer_{i}/{block}/{site}' for site in inner] + [f'layer_{i}/{block}_out']
    expected += [f'layer_{i}/output']
  expected += ['output', 'head/out/matmul']
  assert list(base.sites(Encoder(ELECTRA), shapes(ELECTRA))) == expected
  # A model that recomputes its layers has the same paths, or no delta would be found.
  assert list(base.sites(Encoder(ELECTRA, remat=True), shapes(ELECTRA))) == expected


def test_taps_receive_what_the_table_says():
  seen = {}

  def tap(module, site, y, **context):
    given = {name for name, value in context.items() if value is not None}
    seen['/'.join((*module.path, site))] = jax.tree.map(jnp.shape, y), given
    return y

  apply(tiny.CFG, tiny.params(), tiny.batch(), hooks=Hooks(tap=tap))
  bt, d, heads, f = (8, 12), (8, 12, 32), (8, 12, 4, 8), (8, 12, 48)
  layer = 'layer_1/'
  for site, expected in {
    'embed/words': ((d, bt, bt), {'ids', 'w'}),
    'embed': ((d, bt), {'ids'}),
    layer + 'attention/query/matmul': (d, {'x', 'w', 'mask'}),
    layer + 'attention/kv': ((heads, heads, bt), {'x', 'mask', 'q'}),
    layer + 'attention/heads': (heads, {'x', 'mask'}),
    layer + 'mlp/up/matmul': (f, {'x', 'w', 'mask'}),
    layer + 'mlp/act': (f, {'x', 'mask'}),
    layer + 'attention_out': (d, {'x', 'norm', 'mask'}),
    layer + 'mlp_out': (d, {'x', 'norm', 'mask'}),
    layer + 'output': (d, {'mask'}),
    'output': ((d, bt), {'features'}),
    'pooler/matmul': ((8, 32), {'x', 'w'}),
  }.items():
    assert seen[site] == expected, site


@pytest.fixture
def drawn(monkeypatch):
  """The dropout seeds and rates of a forward pass, in order."""
  found, drop, attend = [], dots.drop, dots.attend

  def record(seed, rate):
    found.append((None if seed is None else tuple(np.asarray(seed).tolist()), rate))

  def recorded_drop(x, seed, rate):
    record(seed, rate)
    return drop(x, seed, rate)

  def recorded_attend(q, k, v, bias, seed, rate):
    record(seed, rate)
    return attend(q, k, v, bias, seed, rate)

  monkeypatch.setattr(dots, 'attend', recorded_attend)
  monkeypatch.setattr(dots, 'drop', recorded_drop)
  return found


def test_every_dropout_draws_its_own_seed(drawn):
  cfg = dataclasses.replace(tiny.CFG, dropout=0.11, attention_dropout=0.12, head_dropout=0.13)
  params, batch = tiny.params(cfg), tiny.batch()
  rates = [0.11] + 2 * [0.12, 0.11, 0.11] + [0.13]
  everything = set()
  for i in range(3):
    drawn.clear()
    apply(cfg, params, batch, jax.random.fold_in(jax.random.key(0), i))
    assert [rate for _, rate in drawn] == rates
    seeds = {seed for seed, _ in drawn}
    assert len(seeds) == 8 and None not in seeds
    everything |= seeds
  assert len({half for seed in everything for half in seed}) == 3 * 8 * 2


def test_evaluation_and_zero_rates_draw_nothing(drawn):
  params, batch = tiny.params(), tiny.batch()
  still = dataclasses.replace(tiny.CFG, dropout=0.0, attention_dropout=0.0, head_dropout=0.0)
  evaluated = apply(tiny.CFG, params, batch)
  trained = apply(still, params, batch, jax.random.key(0))
  assert {seed for seed, _ in drawn} == {None}
  np.testing.assert_array_equal(evaluated, trained)


def test_distilbert_does_not_drop_the_attention_output(drawn):
  cfg = dataclasses.replace(tiny.CFG, architecture='distilbert', token_types=0, dropout=0.2)
  apply(cfg, tiny.params(cfg), tiny.batch(), jax.random.key(0))
  assert [rate for seed, rate in drawn if seed and rate == 0.2] == 3 * [0.2]


@pytest.fixture(scope='module')
def passes():
  """{form: ((loss, logits), gradient, flops)} with dropout; each form is compiled once."""
  params, batch = tiny.params(tiny.SHORT), tiny.batch()
  key = jax.random.key(5)

  def run(**fields):
    def loss(params):
      logits = apply(tiny.SHORT, params, batch, key, **fields)
      return jnp.mean(jnp.square(logits)), logits

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params).compile()
    return *compiled(params), compiled.cost_analysis()['flops']

  forms = {'plain': {}, 'remat': {'remat': True}, 'bf16': {'dtype': jnp.bfloat16}}
  return {name: run(**fields) for name, fields in forms.items()}


def test_remat_changes_nothing(passes):
  """Dropout included: the second forward pass draws what the first did."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    passes['remat'][:2],
    passes['plain'][:2],
  )
  assert passes['remat'][2] > 1.1 * passes['plain'][2], 'there is a second forward pass'


def test_bfloat16_is_close_to_float32(passes):
  ((_, exact), gradient, _), ((_, narrow), rounded, _) = passes['plain'], passes['bf16']
  assert narrow.dtype == jnp.float32
  np.testing.assert_allclose(narrow, exact, atol=0.05 * float(jnp.abs(exact).max()))
  whole, other = (
    jnp.concatenate([x.astype(jnp.float32).ravel() for x in jax.tree.leaves(g)])
    for g in (gradient, rounded)
  )
  assert jnp.dot(whole, other) / jnp.linalg.norm(whole) / jnp.linalg.norm(other) > 0.99
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(rounded)), 'as the parameters'


@pytest.mark.parametrize('cfg', [tiny.CFG, ROBERTA, ELECTRA], ids=lambda c: c.architecture)
def test_padding_is_not_seen(cfg):
  """Neither what stands there nor how much of it."""
  params, batch = tiny.params(cfg), tiny.batch(length=10, cfg=cfg)
  run = jax.jit(lambda batch: apply(cfg, params, batch))
  expected = run(batch)
  rng = np.random.default_rng(0)
  longer = {
    name: np.concatenate([batch[name], np.zeros((8, 6), batch[name].dtype)], 1)
    for name in ('input_ids', 'mask', 'token_types')
  }
  noise = rng.integers(0, cfg.vocab_size, longer['mask'].shape)
  longer['input_ids'] = np.where(longer['mask'], longer['input_ids'], noise)
  np.testing.assert_allclose(run(longer), expected, rtol=1e-5, atol=1e-5)


def test_token_types_default_to_zero():
  params, batch = tiny.params(), tiny.batch()
  zeros = batch | {'token_types': np.zeros_like(batch['token_types'])}
  bare = Encoder(tiny.CFG).apply({'params': params}, batch['input_ids'], batch['mask'])
  np.testing.assert_array_equal(bare, apply(tiny.CFG, params, zeros))
  assert not np.allclose(bare, apply(tiny.CFG, params, batch))


def test_a_table_of_one_token_type_serves_both_texts():
  """As in klue/roberta, whose tokenizer counts the second text as 1."""
  cfg = dataclasses.replace(tiny.SHORT, token_types=1)
  batch = tiny.batch()
  ids, mask = batch['input_ids'], batch['mask']
  model, params = Encoder(cfg), {'params': tiny.params(cfg)}
  first, second = (model.apply(params, ids, mask, np.full_like(ids, i)) for i in range(2))
  assert np.isfinite(first).all()
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(('dtype', 'tolerance'), [('float32', 1e-6), ('bfloat16', 1e-2)])
def test_gelu_and_its_gradient_are_the_definition(dtype, tolerance):
  x = jnp.asarray(np.linspace(-12, 12, 2001), dtype)
  gelu, exact = ACTIVATIONS['gelu'], np.float64(x)
  y, back = jax.vjp(gelu, x)
  assert y.dtype == x.dtype and gelu(x).dtype == x.dtype
  np.testing.assert_allclose(np.float64(y), exact * stats.norm.cdf(exact), tolerance, tolerance)
  slope = stats.norm.cdf(exact) + exact * stats.norm.pdf(exact)
  for found in (back(jnp.ones_like(y))[0], jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1]):
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.float64(found), slope, tolerance, tolerance)
  curvature = jax.vmap(jax.grad(jax.grad(gelu)))(jnp.float32(exact))
  wanted = (2 - exact**2) * stats.norm.pdf(exact)
  np.testing.assert_allclose(curvature, wanted, 1e-4, 1e-5)
