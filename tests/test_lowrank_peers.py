"""Low-rank methods against what HF PEFT and AdapterHub computed."""

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
from kernels import KEY, site

from efft import tree
from efft.models import convert
from efft.peft import base, kron, lora, shared_lowrank, spectral_init

# Leaves of the other libraries: {the end of the name: ours}. Matrices are transposed.
LEAVES = {
  'lora_A.weight': 'a', 'lora_B.weight': 'b', 'lora_B.bias': 'bias', 'lora_A': 'a', 'lora_B': 'b',
  'lora_E': 'e', 'lora_magnitude_vector': 'm', 'm.weight': 'm', 'lora_embedding_A': 'a',
  'lora_embedding_B': 'b', 'vera_lambda_b': 'lambda_b', 'vera_lambda_d': 'lambda_d',
  'lokr_w1': 'w1', 'lokr_w2': 'w2', 'hada_w1_a': 'b1', 'hada_w1_b': 'a1', 'hada_w2_a': 'b2',
  'hada_w2_b': 'a2',
}  # fmt: skip
VECTORS = ('e', 'm')


def entries(peer):
  """({site: {leaf: array}}, {path of a tensor without a site: array}) of a peer's tensors."""
  _, rows, head = convert.NAMES[peer.cfg.architecture]
  modules = {
    hf.format(i=i): path.format(i=i)
    for i in range(peer.cfg.layers)
    for path, hf in {**rows, **head}.items()
  }
  found, others = {}, {}
  for key, x in peer.tensors.items():
    module = max((m for m in modules if key.startswith(f'{m}.')), key=len, default=None)
    if module is None:
      others[key] = x
      continue
    leaf = LEAVES[key[len(module) + 1 :].removeprefix('loras.mytask.')]
    place = f'{modules[module]}/matmul'.replace('embed/word/matmul', 'embed/words')
    found.setdefault(place, {})[leaf] = x.ravel() if leaf in VECTORS else x.T
  return found, others


def nested(found, name):
  return tree.unflatten(
    {f'{path}_{name}/{leaf}': x for path, p in found.items() for leaf, x in p.items()}
  )


LORA = {
  'lora_default': {},
  'lora_rslora': {'use_rslora': True},
  'lora_alllinear': {},
  'lora_pattern': {
    'rank_pattern': {r'layer_0/attention/query/\w+': 2},
    'alpha_pattern': {r'layer_1/attention/value/\w+': 64},
  },
  'lora_r4_a16_drop': {'dropout': 0.1},
  'lora_layer1only': {},
  'lora_lora_bias': {'lora_bias': True},
}
both = pytest.mark.parametrize('architecture', ['bert', 'roberta'])


@both
@pytest.mark.parametrize('method', LORA)
def test_lora_is_pefts(architecture, method):
  peer = peer_files.read('peft', architecture, method)
  found, others = entries(peer)
  assert found and not others
  delta = lora.lora(peer.config['r'], peer.config['lora_alpha'], at='|'.join(found), **LORA[method])
  # Sizes are as a new one of these options would have them.
  for path, p in found.items():
    fresh = delta.init(KEY, site(p['a'].shape[0], p['b'].shape[1], path=path))
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(np.shape, p)
  # What `lora_bias` moves is small.
  peer.agrees({'lora': delta}, nested(found, 'lora'), 1e-6)


@both
def test_lora_of_words_is_pefts(architecture):
  peer = peer_files.read('peft', architecture, 'lora_embedding')
  found, _ = entries(peer)
  words = {path: p for path, p in found.items() if path == 'embed/words'}
  assert len(words) == 1 and len(found) == 3
  rank, alpha = peer.config['r'], peer.config['lora_alpha']
  deltas = {'lora': (lora.lora(rank, alpha), lora.embedding(rank, alpha))}
  peer.agrees(deltas, nested(found, 'lora'))


METHODS = {
  'lora_dora': lambda c: lora.dora(c['r'], c['lora_alpha']),
  'adalora': lambda c: lora.adalora(c['init_r'], c['lora_alpha']),
  'lokr': lambda c: kron.lokr(c['r'], c['alpha'], c['decompose_both'], c['decompose_factor']),
  'loha': lambda c: kron.loha(c['r'], c['alpha']),
}


@both
@pytest.mark.parametrize('method', METHODS)
def test_relatives_are_pefts(architecture, method):
  peer = peer_files.read('peft', architecture, method)
  found, others = entries(peer)
  delta = METHODS[method](peer.config)
  assert len(found) == 4 and not others
  for p in found.values():
    assert jax.tree.map(jnp.shape, delta.init(KEY, site(32, 32))) == jax.tree.map(np.shape, p)
  peer.agrees({'m': delta}, nested(found, 'm'))


@both
def test_vera_is_pefts(architecture):
  peer = peer_files.read('peft', architecture, 'vera')
  found, others = entries(peer)
  common = {'a': others['vera_A'].T, 'b': others['vera_B'].T}
  delta = shared_lowrank.vera(peer.config['r'], peer.config['d_initial'])
  peer.agrees({'vera': delta}, {**nested(found, 'vera'), 'shared_vera': common})


@both
def test_pissa_is_pefts(architecture):
  """PEFT keeps A and B alone: the kernel beside them follows from the pretrained one."""
  peer = peer_files.read('peft', architecture, 'lora_pissa')
  found, _ = entries(peer)
  delta = spectral_init.pissa(peer.config['r'], peer.config['lora_alpha'], at='|'.join(found))
  flat = tree.flatten(peer.params)
  for path, p in found.items():
    kernel = flat[path.replace('/matmul', '/kernel')]
    start = delta.init(KEY, site(*kernel.shape)._replace(w=jnp.asarray(kernel)))
    assert np.abs(start['a'] - p['a']).max() > 1e-3, 'it has been trained'
    p.update({leaf: start[leaf] for leaf in ('a0', 'b0')})
  values = nested(found, 'lora')
  residual = base.rebase({'lora': delta}, peer.params, values)
  peer._replace(params=residual).agrees({'lora': delta}, values)


@both
@pytest.mark.parametrize('method', ['lora', 'lora_full'])
def test_lora_is_adapterhubs(architecture, method):
  peer = peer_files.read('adapters', architecture, method)
  found, others = entries(peer)
  assert len(found) == (8 if method == 'lora_full' else 4) and not others
  delta = lora.lora(peer.config['r'], float(peer.config['alpha']), at='|'.join(found))
  peer.agrees({'lora': delta}, nested(found, 'lora'))


@both
def test_dora_is_adapterhubs_but_for_the_bias(architecture):
  """AdapterHub's scale acts behind the linear's bias, the paper's on the kernel."""
  peer = peer_files.read('adapters', architecture, 'dora')
  found, others = entries(peer)
  assert len(found) == 4 and not others
  delta = lora.dora(peer.config['r'], float(peer.config['alpha']))
  flat = tree.flatten(peer.params)
  for path, p in found.items():
    kernel, bias = (path.replace('matmul', leaf) for leaf in ('kernel', 'bias'))
    flat[bias] = flat[bias] * p['m'] / np.linalg.norm(flat[kernel] + p['a'] @ p['b'], axis=0)
  scaled = peer._replace(params=tree.unflatten(flat))
  scaled.agrees({'m': delta}, nested(found, 'm'))
