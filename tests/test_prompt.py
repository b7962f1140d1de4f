"""Prompts and prefixes: definitions by loops, two forms that agree, other libraries' numbers."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
import tiny

from efft.errors import InputError
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base, lora, prefix, prompt

ARCHITECTURES = ('bert', 'roberta')
both = pytest.mark.parametrize('architecture', ARCHITECTURES)
BATCH = tiny.batch()
ARGS = tuple(BATCH[name] for name in ('input_ids', 'mask', 'token_types'))
# Parts that only take tokens away have a parameter that says that they are there.
GONE = {'length': jnp.int32(0)}
ROBERTA = dataclasses.replace(tiny.SHORT, positions_from_pad=True, architecture='roberta')
DISTILBERT = dataclasses.replace(tiny.SHORT, architecture='distilbert', token_types=0)
CFGS = {'bert': tiny.SHORT, 'roberta': ROBERTA, 'distilbert': DISTILBERT}


def attached(deltas, cfg=tiny.SHORT, seed=1):
  """(model, variables) of a tiny encoder with deltas at their start."""
  model = Encoder(cfg, Hooks(tap=base.attach(deltas)))
  params = tiny.params(cfg)
  return model, {
    'params': params,
    'delta': base.init(model, deltas, params, jax.random.key(seed)),
  }


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def layers(deltas_of):
  """{'layer_0': ..., 'layer_1': ...} from the delta of each layer's attention."""
  return {f'layer_{i}': {'attention': {'kv_m': deltas_of(i)}} for i in range(2)}


@both
@pytest.mark.parametrize('method', ['prompt', 'ptuning_mlp'])
def test_peft_prompts(architecture, method):
  """Before [CLS], which moves up, and whose place the first prompt takes when pooling."""
  peer = peer_files.read('peft', architecture, method)
  rows = peer.tensors['prompt_embeddings']
  make = prompt.prompt if method == 'prompt' else prompt.ptuning
  delta = {'embed': {'words_m': {'prompt': rows}}}
  peer.agrees({'m': make(len(rows), pooled='first')}, delta)


@pytest.mark.parametrize('method', ['prefix', 'prefix_proj'])
def test_peft_prefixes(method):
  """On BERT alone: with RoBERTa the library itself fails. A prefix moves positions there."""
  peer = peer_files.read('peft', 'bert', method)
  rows = peer.tensors['prompt_embeddings']
  kv = rows.reshape(len(rows), -1, 2, peer.cfg.hidden)
  delta = layers(lambda i: {'k': kv[:, i, 0], 'v': kv[:, i, 1]})
  delta |= {'embed': {'words_m': GONE}, 'embed_m': GONE}
  peer.agrees({'m': prefix.prefix(len(rows), shift=True)}, delta)


@both
def test_adapterhub_prompt(architecture):
  """On the texts without padding: the library lets prompts see the padding of the others."""
  peer = peer_files.read('adapters', architecture, 'prompt_tuning')
  (rows,) = peer.tensors.values()
  batch = {name: x[:1] for name, x in peer.batch.items()}
  assert batch['mask'].all()
  peer = peer._replace(batch=batch, logits=peer.logits[:1])
  deltas = {'m': prompt.prompt(len(rows), init='random', at='embed', pooled='first')}
  peer.agrees(deltas, {'embed_m': {'prompt': rows}})


@both
def test_adapterhub_prefixes(architecture):
  peer = peer_files.read('adapters', architecture, 'prefix_tuning_flat')
  (flat,) = peer.tensors.values()
  kv = flat.reshape(peer.config['prefix_length'], -1, 2, peer.cfg.hidden)
  delta = layers(lambda i: {'k': kv[:, i, 0], 'v': kv[:, i, 1]})
  peer.agrees({'m': prefix.prefix(len(kv))}, delta)


@both
def test_adapterhub_prefixes_from_a_network(architecture):
  peer = peer_files.read('adapters', architecture, 'prefix_tuning')
  own = {re.sub(r'.*self_prefix\.', '', name): x.T for name, x in peer.tensors.items()}
  hidden = peer.config['bottleneck_size']
  up = own['control_trans.2.weight'].reshape(hidden, -1, 2, peer.cfg.hidden)
  bias = own['control_trans.2.bias'].reshape(-1, 2, peer.cfg.hidden)
  delta = layers(
    lambda i: {
      'k_up': up[:, i, 0],
      'v_up': up[:, i, 1],
      'k_up_bias': bias[i, 0],
      'v_up_bias': bias[i, 1],
    }
  )
  delta['shared_m'] = {
    'inputs': own['wte.weight'].T,
    'down': own['control_trans.0.weight'],
    'down_bias': own['control_trans.0.bias'],
  }
  peer.agrees({'m': prefix.prefix(peer.config['prefix_length'], hidden)}, delta)


@pytest.mark.parametrize('architecture', CFGS)
def test_a_prompt_of_words_is_those_words(architecture):
  """Prompting with the rows of tokens is writing the tokens before the text, in segment 0."""
  cfg, tokens = CFGS[architecture], [7, 3, 90]
  deltas = {'m': prompt.prompt(3, 'tokens', tokens, pooled='first')}
  model, variables = attached(deltas, cfg)
  ids, mask, types = ARGS
  ahead = np.broadcast_to(np.array(tokens, np.int32), (len(ids), 3))
  written = (
    np.concatenate([ahead, ids], 1),
    np.concatenate([ahead > 0, mask], 1),
    np.concatenate([ahead * 0, types], 1),
  )
  plain = Encoder(cfg)
  found = model.apply(variables, *ARGS)
  close(found, plain.apply({'params': variables['params']}, *written))
  # With pooled='cls' what is pooled is the token behind them.
  first, cut = prompt.prompt(3, 'tokens', tokens)
  model, variables = attached({'m': (first, cut)}, cfg)

  def pool_fourth(module, site, y, **context):
    return (y[0][:, 3:], y[1][:, 3:]) if site == 'output' and not module.path else y

  behind = plain.clone(hooks=Hooks(tap=pool_fourth))
  after = model.apply(variables, *ARGS)
  close(after, behind.apply({'params': variables['params']}, *written))
  assert np.abs(after - found).max() > 1e-2


def test_mean_pooling_leaves_the_prompt_out_unless_told():
  cfg = dataclasses.replace(tiny.SHORT, pooling='mean')
  scores = {}
  for pooled in prompt.POOLED:
    model, variables = attached({'m': prompt.prompt(3, pooled=pooled)}, cfg)
    seen = {}

    def look(module, site, y, seen=seen, tap=model.hooks.tap, **context):
      y = tap(module, site, y, **context)
      seen['/'.join((*module.path, site))] = y
      return y

    scores[pooled] = model.clone(hooks=Hooks(tap=look)).apply(variables, *ARGS)
    assert seen['embed'][1].sum() == BATCH['mask'].sum() + 3 * len(BATCH['mask'])
    x, mask = seen['output']
    head = variables['params']['head']['out']
    mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    close(scores[pooled], mean @ head['kernel'] + head['bias'])
    assert x.shape[1] == BATCH['mask'].shape[1] + 3 * (pooled == 'first')
  assert np.abs(scores['cls'] - scores['first']).max() > 1e-2


def test_where_prompts_start():
  table = np.asarray(tiny.params(tiny.SHORT)['embed']['word']['embedding'])

  def start(**options):
    deltas = {'m': prompt.prompt(**options)}
    return np.asarray(attached(deltas)[1]['delta']['embed']['words_m']['prompt'])

  rows = start(length=10)
  ids = [np.flatnonzero((table == row).all(1)) for row in rows]
  assert all(len(found) == 1 for found in ids) and len(np.unique(ids)) == 10
  named = start(length=4, init='tokens', tokens=[5, [6, 8, 9]])
  close(named[:2], [table[5], table[[6, 8, 9]].mean(0)])
  assert all((table == row).all(1).any() for row in named[2:])
  random = start(length=12, init='random')
  assert 0.45 < np.abs(random).max() <= 0.5 and abs(random.mean()) < 0.05


def test_lstm_is_torchs():
  """Its equations one token at a time, forwards and backwards, two layers of them."""
  deltas = {'m': prompt.ptuning(5, 'lstm', 6)}
  p = {k: np.asarray(x) for k, x in attached(deltas)[1]['delta']['embed']['words_m'].items()}
  (grown,) = base.expand(deltas, {'embed': {'words_m': p}})['embed']['words_m'].values()

  def sigmoid(x):
    return 1 / (1 + np.exp(-x))

  x = p['inputs']
  for layer in range(2):
    ways = []
    for way, order in (('forward', range(5)), ('backward', range(4, -1, -1))):
      w, u, b = (p[f'lstm_{layer}_{way}_{leaf}'] for leaf in 'wub')
      h, c, out = np.zeros(6), np.zeros(6), [None] * 5
      for t in order:
        gates = x[t] @ w + h @ u + b
        i, f, g, o = gates[:6], gates[6:12], gates[12:18], gates[18:]
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out[t] = h
      ways.append(np.array(out))
    x = np.concatenate(ways, 1)
  close(grown, np.maximum(x @ p['mlp_0_w'] + p['mlp_0_b'], 0) @ p['mlp_1_w'] + p['mlp_1_b'])


@pytest.mark.parametrize(
  ('made', 'flat'),
  [
    (prompt.ptuning(4, hidden=6), prompt.prompt(4)),
    (prefix.prefix(4, hidden=6), prefix.prefix(4)),
    (prefix.prefix(4, hidden=6, shift=True), prefix.prefix(4, shift=True)),
  ],
  ids=['ptuning', 'prefix', 'shifted'],
)
def test_what_expands_is_the_flat_method(made, flat):
  """Its parameters once more, with nothing left of the network that made them."""
  model, variables = attached({'m': made}, tiny.CFG)
  grown = base.expand({'m': made}, variables['delta'])
  other, start = attached({'m': flat}, tiny.CFG)
  shape = jax.tree.map(jnp.shape, dict(grown))
  assert shape == jax.tree.map(jnp.shape, dict(start['delta']))
  twice = base.expand({'m': flat}, grown)
  after = other.apply({**variables, 'delta': twice}, *ARGS)
  close(after, model.apply({**variables, 'delta': grown}, *ARGS), 1e-6)
  assert np.abs(after - other.apply(start, *ARGS)).max() > 1e-3


def test_prefix_is_attention_over_longer_keys():
  """One head at a time, every query over the prefixes and the real tokens."""
  deltas = {'m': prefix.prefix(3)}
  model, variables = attached(deltas)
  seen = {}

  def look(module, site, y, **context):
    y = base.attach(deltas)(module, site, y, **context)
    seen['/'.join((*module.path, site))] = (y, context)
    return y

  model.clone(hooks=Hooks(tap=look)).apply(variables, *ARGS)
  p = variables['delta']['layer_0']['attention']['kv_m']
  w = variables['params']['layer_0']['attention']
  heads, context = seen['layer_0/attention/heads']
  x, width = np.asarray(context['x'], np.float64), tiny.SHORT.head_dim
  for row in range(2):
    real = x[row][BATCH['mask'][row]]
    for head in range(tiny.SHORT.heads[0]):
      cut = slice(head * width, (head + 1) * width)
      q, k, v = (
        rows @ np.asarray(w[name]['kernel'])[:, cut] + np.asarray(w[name]['bias'])[cut]
        for name, rows in (('query', x[row]), ('key', real), ('value', real))
      )
      k, v = np.r_[p['k'][:, cut], k], np.r_[p['v'][:, cut], v]
      scores = np.exp(q @ k.T / width**0.5)
      close(heads[row, :, head], scores / scores.sum(1, keepdims=True) @ v, 1e-4)
  assert seen['layer_0/attention/kv'][0][0].shape[1] == 15


@pytest.mark.parametrize(
  ('fn', 'options', 'message'),
  [
    ('prompt.prompt', {'length': 0}, 'length 0'),
    ('prompt.prompt', {'init': 'words'}, "init 'words'"),
    ('prompt.prompt', {'at': 'layer_0/output'}, "'layer_0/output'"),
    ('prompt.prompt', {'pooled': 'mean'}, "pooled 'mean'"),
    ('prompt.prompt', {'init': 'tokens'}, 'with 0 tokens'),
    ('prompt.prompt', {'tokens': [1]}, 'with 1 tokens'),
    ('prompt.prompt', {'init': 'tokens', 'tokens': [1, []]}, 'not ids'),
    ('prompt.prompt', {'init': 'tokens', 'tokens': [-1]}, 'not ids'),
    ('prompt.prompt', {'init': 'tokens', 'tokens': [1, 2], 'length': 1}, 'length 1'),
    ('prompt.prompt', {'at': 'embed'}, 'no word table'),
    ('prompt.ptuning', {'encoder': 'gru'}, "'gru'"),
    ('prompt.ptuning', {'hidden': 0}, 'hidden 0'),
    ('prefix.prefix', {'length': 0}, 'length 0'),
    ('prefix.prefix', {'hidden': -1}, 'hidden -1'),
  ],
)
def test_bad_options_are_refused(fn, options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': {'fn': fn, **options}})


def test_a_token_beyond_the_vocabulary_is_refused():
  with pytest.raises(InputError, match='token 96 of a vocabulary of 96'):
    attached({'m': prompt.prompt(3, 'tokens', [96])})


def test_a_prompt_that_does_not_fit_is_refused():
  """The table has 24 positions; the same prompt after positions were added takes none of them."""
  batch = tiny.batch(length=16)
  for at, fits in (('embed/words', False), ('embed', True)):
    options = {'fn': 'prompt.prompt', 'length': 9, 'at': at, 'init': 'random'}
    here = tiny.world({'method': {'prompt': options}, 'rules': [('.*', 'all')]}, tiny.SHORT)
    if fits:
      assert np.isfinite(here.logits(here.variables, batch)).all()
    else:
      with pytest.raises(InputError, match='at most 24 together'):
        here.logits(here.variables, batch)


@pytest.mark.parametrize('at', ['embed/words', 'embed'])
def test_a_prompt_and_trained_words_act_in_either_order(at):
  """Trained words are added to the words, wherever these stand by then."""
  parts = {'prompt': prompt.prompt(3, 'random', at=at), 'words': lora.embedding(2)}
  model, variables = attached(parts)
  rng = np.random.default_rng(0)
  moved = jax.tree.map(lambda x: x + rng.normal(0, 0.3, x.shape), variables['delta'])
  own = moved['embed'].pop('words_words')
  params = variables['params']
  merged = {**params, 'embed': parts['words'].merge(own, params['embed'])}
  alone, _ = attached({'prompt': parts['prompt']})
  expected = alone.apply({'params': merged, 'delta': moved}, *ARGS)
  delta = {**moved, 'embed': {**moved['embed'], 'words_words': own}}
  for order in (('prompt', 'words'), ('words', 'prompt')):
    model, _ = attached({name: parts[name] for name in order})
    close(model.apply({'params': params, 'delta': delta}, *ARGS), expected)
