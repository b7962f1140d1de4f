"""Slicing against gates, and against an encoder written out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from efft import tree
from efft.compress import slicing
from efft.compress.base import Gates, Keep, closed, gated
from efft.errors import InputError
from efft.models.encoder import Encoder, init_params
from efft.models.layers import Hooks, compose
from efft.peft import base as peft

CFG = dataclasses.replace(
  tiny.CFG, heads=(4, 4, 4), mlp=(20, 24, 16), hidden=24, embed_dim=24, head_dim=4
)
ARCHITECTURES = {
  'bert': CFG,
  'roberta': dataclasses.replace(
    CFG, architecture='roberta', positions_from_pad=True, pad_id=1, token_types=1
  ),
  'distilbert': dataclasses.replace(CFG, architecture='distilbert', token_types=0),
  'electra': dataclasses.replace(CFG, architecture='electra', embed_dim=12),
  'mean': dataclasses.replace(CFG, pooling='mean'),
}
NUMBERS = {name: tiny.params(cfg) for name, cfg in ARCHITECTURES.items()}
BATCH = {name: tiny.batch(cfg=cfg) for name, cfg in ARCHITECTURES.items()}


def logits(cfg, variables, batch, tap=None):
  hooks = Hooks(tap=tap) if tap else Hooks()
  args = batch['input_ids'], batch['mask'], batch['token_types']
  return Encoder(cfg, hooks).apply(variables, *args)


# One program for all masks of an encoder: gates are arguments of it.
@jax.jit
def bert_gated(gates, batch):
  return logits(CFG, {'params': NUMBERS['bert']}, batch, gated(gates))


def subsets(sizes):
  return st.tuples(
    *(st.sets(st.integers(0, size - 1)).map(lambda s: tuple(sorted(s))) for size in sizes)
  )


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(heads=subsets(CFG.heads), units=subsets(CFG.mlp))
def test_sliced_equals_masked(heads, units):
  keep = Keep(heads=heads, units=units)
  cfg, values = slicing.cut(CFG, {'params': NUMBERS['bert']}, keep)
  assert (cfg.heads, cfg.mlp) == (tuple(map(len, heads)), tuple(map(len, units)))
  expected = bert_gated(closed(CFG, keep), BATCH['bert'])
  np.testing.assert_allclose(logits(cfg, values, BATCH['bert']), expected, atol=1e-5)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_every_encoder(name):
  cfg, params, batch = ARCHITECTURES[name], NUMBERS[name], BATCH[name]
  keep = Keep(
    layers=(0, 2), heads=((1, 3), (0, 1, 2), ()), units=((), (0, 1), (2, 3, 5, 7, 11, 13))
  )
  small, values = slicing.cut(cfg, {'params': params}, keep)
  assert (small.heads, small.mlp) == ((2, 0), (0, 6))
  shapes = jax.eval_shape(lambda k: init_params(small, k), jax.random.key(0))
  assert not tree.diff(shapes, values['params'])
  tap = compose(
    gated(closed(cfg, keep._replace(layers=None))), slicing.skipping(np.isin(range(3), keep.layers))
  )
  expected = logits(cfg, {'params': params}, batch, tap)
  np.testing.assert_allclose(logits(small, values, batch), expected, atol=1e-5)


def test_skipped_layers_are_skipped():
  """The reference of the test above, against an encoder that never had the layer."""
  params = {k: v for k, v in NUMBERS['bert'].items() if k != 'layer_2'}
  short = dataclasses.replace(CFG, heads=CFG.heads[:2], mlp=CFG.mlp[:2])
  expected = logits(short, {'params': params}, BATCH['bert'])

  def skipped(stays):
    return logits(CFG, {'params': NUMBERS['bert']}, BATCH['bert'], slicing.skipping(stays))

  stays = np.array([True, True, False])
  np.testing.assert_array_equal(skipped(stays), expected)
  np.testing.assert_allclose(jax.jit(skipped)(stays), expected, atol=1e-5)


def by_hand(cfg, p, batch, kept):
  """BERT in numpy, its norms over the dimensions `kept` [D] alone, the others 0 throughout."""
  kept = kept.astype(np.float64)

  def linear(x, q):
    return x @ np.float64(q['kernel']) + np.float64(q['bias'])

  def norm(x, q):
    mean = (x * kept).sum(-1, keepdims=True) / kept.sum()
    variance = ((x - mean) ** 2 * kept).sum(-1, keepdims=True) / kept.sum()
    return ((x - mean) / np.sqrt(variance + cfg.eps) * q['scale'] + q['bias']) * kept

  table = {k: np.float64(p['embed'][k]['embedding']) for k in ('word', 'position', 'token_type')}
  ids, mask = batch['input_ids'], batch['mask']
  x = (
    table['word'][ids]
    + table['position'][: ids.shape[1]]
    + table['token_type'][batch['token_types']]
  )
  x = norm(x * kept, p['embed']['norm'])
  for i, heads in enumerate(cfg.heads):
    q = p[f'layer_{i}']
    split = [
      linear(x, q['attention'][name]).reshape(*x.shape[:2], heads, -1)
      for name in ('query', 'key', 'value')
    ]
    scores = np.einsum('bqhd,bkhd->bhqk', *split[:2]) / np.sqrt(cfg.head_dim)
    scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum('bhqk,bkhd->bqhd', weights, split[2]).reshape(*x.shape[:2], -1)
    x = norm((x + linear(y, q['attention']['out'])) * kept, q['attention_norm'])
    h = linear(x, q['mlp']['up'])
    h = np.float64(jax.nn.gelu(jnp.float32(h), approximate=False))
    x = norm((x + linear(h, q['mlp']['down'])) * kept, q['mlp_norm'])
  pooled = np.tanh(linear(x[:, 0], p['pooler'])) * kept
  return linear(pooled, p['head']['out'])


@settings(max_examples=4, deadline=None)
@given(hidden=st.sets(st.integers(0, CFG.hidden - 1), min_size=2))
def test_hidden_dimensions_against_numpy(hidden):
  hidden = tuple(sorted(hidden))
  cfg, values = slicing.cut(CFG, {'params': NUMBERS['bert']}, Keep(hidden=hidden))
  assert cfg.hidden == cfg.embed_dim == len(hidden)
  kept = np.isin(np.arange(CFG.hidden), hidden)
  expected = by_hand(CFG, NUMBERS['bert'], BATCH['bert'], kept)
  np.testing.assert_allclose(logits(cfg, values, BATCH['bert']), expected, atol=2e-5)


def test_by_hand_is_the_encoder():
  everything = np.ones(CFG.hidden, bool)
  expected = by_hand(CFG, NUMBERS['bert'], BATCH['bert'], everything)
  found = logits(CFG, {'params': NUMBERS['bert']}, BATCH['bert'])
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_electra_keeps_its_embeddings():
  cfg = ARCHITECTURES['electra']
  small, values = slicing.cut(cfg, {'params': NUMBERS['electra']}, Keep(hidden=(0, 1, 5, 9)))
  assert (small.hidden, small.embed_dim) == (4, cfg.embed_dim)
  shapes = jax.eval_shape(lambda k: init_params(small, k), jax.random.key(0))
  assert not tree.diff(shapes, values['params'])


def test_words():
  batch = BATCH['bert']
  used = np.unique(np.r_[CFG.pad_id, batch['input_ids'].ravel()])
  cfg, values = slicing.cut(CFG, {'params': NUMBERS['bert']}, Keep(words=tuple(used.tolist())))
  assert cfg.vocab_size == len(used)
  mapped = {**batch, 'input_ids': np.searchsorted(used, batch['input_ids']).astype(np.int32)}
  expected = logits(CFG, {'params': NUMBERS['bert']}, batch)
  np.testing.assert_array_equal(logits(cfg, values, mapped), expected)


SMALLER = {
  'heads and units': Keep(heads=((1, 3), ()), units=((0, 5, 7), ())),
  'layers': Keep(layers=(0,)),
}


@pytest.mark.parametrize('keep', SMALLER.values(), ids=SMALLER)
@pytest.mark.parametrize('name', ['lora', 'ia3', 'prefix', 'pfeiffer', 'lora_embedding'])
def test_deltas_follow(name, keep):
  here = tiny.world(tiny.settings(name))
  rng = np.random.default_rng(0)
  delta = tree.map_paths(
    lambda path, x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), here.variables['delta']
  )
  variables = {**here.variables, 'delta': delta}
  cfg, values = slicing.cut(tiny.CFG, variables, keep, here.deltas)
  layers = (0, 1) if keep.layers is None else keep.layers
  attached = peft.attach(here.deltas)
  gates = gated(closed(tiny.CFG, keep._replace(layers=None)))
  tap = compose(attached, gates, slicing.skipping(np.isin(range(2), layers)))
  batch = tiny.batch()
  expected = logits(tiny.CFG, variables, batch, tap)
  np.testing.assert_allclose(logits(cfg, values, batch, attached), expected, atol=2e-5)


def test_words_of_a_delta_follow():
  here = tiny.world(tiny.settings('lora_embedding'))
  words = tuple(range(0, 96, 2))
  cfg, values = slicing.cut(tiny.CFG, here.variables, Keep(words=words), here.deltas)
  rows = {p: x.shape for p, x in tree.flatten(values['delta']).items() if 'embed/' in p}
  assert cfg.vocab_size in {size for shape in rows.values() for size in shape}


@pytest.mark.parametrize('name', ['vera', 'fourierft', 'said'])
def test_deltas_that_cannot_follow(name):
  """Their numbers say something about whole matrices."""
  here = tiny.world(tiny.settings(name))
  rng = np.random.default_rng(0)
  delta = tree.map_paths(
    lambda path, x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
    if jnp.issubdtype(x.dtype, jnp.floating) else x,
    here.variables['delta'],
  )  # fmt: skip
  keep = Keep(heads=((1, 3), (0,)), units=((0, 5, 7), (1, 2)))
  with pytest.raises(InputError, match=f'{name}.*merge the run first'):
    slicing.cut(tiny.CFG, {**here.variables, 'delta': delta}, keep, here.deltas)


@pytest.mark.parametrize(
  'keep, found',
  [
    (Keep(layers=()), 'nothing that stays'),
    (Keep(layers=(0, 9)), 'indices from 0 to 2'),
    (Keep(heads=((0,), (1,))), '3, one a layer'),
    (Keep(units=((1, 0), (), ())), 'ascending'),
    (Keep(words=(1, 2)), 'the id of padding'),
  ],
)
def test_indices_that_are_not_there(keep, found):
  with pytest.raises(InputError, match=found):
    slicing.cut(CFG, {'params': NUMBERS['bert']}, keep)


def test_roberta_keeps_the_place_of_padding():
  with pytest.raises(InputError, match='positions count'):
    slicing.cut(ARCHITECTURES['roberta'], {'params': NUMBERS['roberta']}, Keep(words=(1, 2, 3)))


def test_gates_of_blocks():
  """A gate of 0 on a block's output is the block's input through its norm."""
  off = Gates(attention=jnp.zeros(3), mlp=jnp.zeros(3))
  found = logits(CFG, {'params': NUMBERS['bert']}, BATCH['bert'], gated(off))
  p = tree.map_paths(
    lambda path, x: jnp.zeros_like(x) if '/out/' in path or '/down/' in path else x,
    {k: v for k, v in NUMBERS['bert'].items() if k != 'head'},
  )
  p = {**p, 'head': NUMBERS['bert']['head']}
  np.testing.assert_allclose(found, logits(CFG, {'params': p}, BATCH['bert']), atol=1e-5)


def test_electra_does_not_lose_its_projection():
  with pytest.raises(InputError, match='the width of the embeddings'):
    slicing.cut(
      ARCHITECTURES['electra'], {'params': NUMBERS['electra']}, Keep(hidden=tuple(range(12)))
    )
