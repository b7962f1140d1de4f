"""Spectral and sharded updates: their definitions, and what HF PEFT computes."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
import tiny
from kernels import KEY, PATH, merged, moved, site

from efft import tree
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base, shards, spectral
from efft.peft.base import Site

RNG = np.random.default_rng(0)


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_fourierft_is_the_inverse_dft_of_few_entries():
  delta = spectral.fourierft(n_frequency=7, scaling=50.0)
  p, kernel = moved(delta, 6, 10)
  waves = [np.exp(2j * np.pi * np.outer(np.arange(d), np.arange(d)) / d) for d in (6, 10)]
  expected = 0
  for (row, column), c in zip(p['positions_6x10'].T, p['spectrum'], strict=True):
    expected = expected + c * np.outer(waves[0][row], waves[1][column])
  close(merged(delta, p, kernel) - kernel, 50 / 60 * expected.real)


def test_fourierft_positions_are_different_entries_that_kernels_of_a_shape_share():
  delta = spectral.fourierft(n_frequency=60)
  sites = {'a': site(6, 10), 'b': site(10, 6), 'c': site(6, 10)}
  shared = delta.shared(KEY, sites)
  assert shared.keys() == {'positions_6x10', 'positions_10x6'}
  assert {*map(tuple, shared['positions_6x10'].T.tolist())} == {
    *itertools.product(range(6), range(10))
  }
  first = spectral.positions(5, (768, 768), 777)
  # torch.randperm(768 * 768, generator=torch.Generator().manual_seed(777))[:5]
  assert (first[1] * 768 + first[0]).tolist() == [391271, 183699, 413551, 384200, 435559]
  assert not np.array_equal(first, spectral.positions(5, (768, 768), 1))


def test_fourierft_with_zeros_starts_unchanged():
  p = spectral.fourierft(n_frequency=7, init='zeros').init(KEY, site(6, 10))
  assert p['spectrum'].shape == (7,) and not p['spectrum'].any()


def test_c3a_blocks_are_circulant():
  delta = spectral.c3a(block_size=4)
  p, kernel = moved(delta, 8, 12)
  change = 8 * (merged(delta, p, kernel) - kernel)
  for i, j in itertools.product(range(8), range(12)):
    close(change[i, j], p['kernel'][j // 4, i // 4, (i - j) % 4])


def test_c3a_is_a_circular_convolution():
  """The paper's form: products of spectra, of c reversed."""
  delta = spectral.c3a()
  p, kernel = moved(delta, 6, 6)
  x = RNG.normal(size=(5, 6))
  by_fft = np.fft.ifft(np.fft.fft(x) * np.fft.fft(np.roll(p['kernel'][0, 0][::-1], 1))).real
  close(x @ (merged(delta, p, kernel) - kernel), by_fft / 6)


@pytest.mark.parametrize('init', ['xavier_uniform', 'kaiming_uniform', 'gaussian', 'zeros'])
def test_c3a_inits(init):
  c = spectral.c3a(init=init).init(KEY, site(64, 192))['kernel']
  assert c.shape == (3, 1, 64)
  spread = {'xavier_uniform': (2 / 256) ** 0.5, 'kaiming_uniform': (1 / 192) ** 0.5}
  expected = spread.get(init, float(init == 'gaussian'))
  np.testing.assert_allclose(np.std(c), expected, rtol=0.15)


@pytest.mark.parametrize('rank', [4, 5])
def test_miss_adds_one_matrix_to_every_shard(rank):
  delta = shards.miss(rank=rank)
  p, kernel = moved(delta, 12, 3)
  found = merged(delta, p, kernel) - kernel
  for i in range(12):
    close(found[i], p['block'][i % rank])


def test_miss_repeats_a_narrow_matrix():
  delta = shards.miss(rank=4, mini_r=3)
  p, kernel = moved(delta, 8, 6)
  assert p['block'].shape == (4, 3)
  wide = np.tile(p['block'], (2, 2))
  close(merged(delta, p, kernel) - kernel, wide)


def test_vblora_mixes_the_best_vectors_of_the_bank():
  delta = shards.vblora(rank=2, num_vectors=5, vector_length=3, topk=2)
  p, kernel = moved(delta, 6, 9)

  def column(logits):
    pieces = []
    for piece in np.asarray(logits):
      best = np.argsort(piece)[-2:]
      weights = np.exp(piece[best]) / np.exp(piece[best]).sum()
      pieces.append(weights @ p['bank'][best])
    return np.concatenate(pieces)

  expected = sum(np.outer(column(a), column(b)) for a, b in zip(p['a'], p['b'], strict=True))
  close(merged(delta, p, kernel) - kernel, expected)


@pytest.mark.parametrize('shape', [(6, 9), (9, 6), (6, 6)])
def test_randlora_scales_random_bases_to_full_rank(shape):
  delta = shards.randlora(rank=2, alpha=3.0)
  p, kernel = moved(delta, *shape)
  a, b = p['a'], np.asarray(p['b']).reshape(max(shape), -1)
  expected = 0
  for i, j in itertools.product(range(2), range(3)):
    row = p['lambda'][i, j] * a[i] * p['gamma'][j]
    expected = expected + np.outer(row, b[:, 3 * i + j])
  expected = 3 / 2 * (expected if shape[0] <= shape[1] else expected.T)
  found = merged(delta, p, kernel) - kernel
  close(found, expected)
  assert np.linalg.matrix_rank(expected, 1e-4) == 6


def test_randlora_shares_bases_as_large_as_the_largest_kernel():
  delta = shards.randlora(rank=2)
  shared = delta.shared(KEY, {'a': site(6, 9), 'b': site(8, 4)})
  assert shared['a'].shape == (2, 8) and shared['b'].shape == (9, 4, 2)
  np.testing.assert_allclose(np.std(shared['b']), 1.0, atol=0.1)


def test_delora_holds_the_strength_whatever_the_lengths():
  delta = shards.delora(rank=3, delora_lambda=2.0)
  p, kernel = moved(delta, 8, 5)
  p['w_norm'] = jnp.ones(8)
  change = merged(delta, p, kernel) - kernel
  expected = sum(
    np.outer(a, b) / np.linalg.norm(a) / np.linalg.norm(b)
    for a, b in zip(p['a'].T, p['b'], strict=True)
  )
  close(change, p['lambda'] / 3 * expected)
  longer = p | {'a': 7 * p['a'], 'b': p['b'] / 3}
  close(merged(delta, longer, kernel) - kernel, change)
  start = delta.init(KEY, Site(PATH, None, kernel[None], kernel))
  close(start['w_norm'], np.sqrt((np.asarray(kernel) ** 2).sum(1)))
  total = jax.jit(jax.grad(lambda p: delta.merge(p, {'kernel': kernel})['kernel'].sum()))
  slope = total(start)
  assert all(np.isfinite(x).all() for x in slope.values()) and slope['b'].any()


def test_shira_changes_that_many_different_entries():
  delta = shards.shira(rank=2)
  p, kernel = moved(delta, 10, 6)
  changed = merged(delta, p, kernel) != kernel
  assert changed.sum() == 2 * 16 and changed[p['rows'], p['columns']].all()
  close((merged(delta, p, kernel) - kernel)[p['rows'], p['columns']], p['values'])
  other = delta.init(jax.random.key(5), site(10, 6))
  assert not np.array_equal(other['rows'], p['rows'])


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: spectral.fourierft(n_frequency=0), 'below 1'),
    (lambda: spectral.fourierft(init='ones'), "'ones'"),
    (lambda: spectral.fourierft(n_frequency=61), 'more than a kernel'),
    (lambda: spectral.c3a(block_size=-1), 'below 0'),
    (lambda: spectral.c3a(init='ones'), "'ones'"),
    (lambda: spectral.c3a(block_size=3), 'does not divide'),
    (lambda: shards.miss(rank=0), 'at least 1'),
    (lambda: shards.miss(rank=7), 'do not fit'),
    (lambda: shards.miss(rank=2, mini_r=3), 'do not fit'),
    (lambda: shards.vblora(topk=300), 'topk 300'),
    (lambda: shards.vblora(vector_length=3), 'does not divide'),
    (lambda: shards.randlora(rank=0), 'below 1'),
    (lambda: shards.delora(rank=0), 'below 1'),
    (lambda: shards.shira(rank=0), 'below 1'),
    (lambda: shards.shira(rank=4), '64 entries'),
    (lambda: shards.shira(rank=1)._replace(at='x'), None),
  ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(make, message):
  if message is None:
    with pytest.raises(ValueError, match='without a kernel'):
      make().init(KEY, Site('layer_0/mlp/act', jnp.zeros((1, 1, 4))))
    return
  with pytest.raises(ValueError, match=re.escape(message)):
    make().init(KEY, site(6, 10))


# Of each method: the delta from adapter_config.json, a kernel's leaves from its tensors, and what
# is shared from all tensors.
PEFT = {
  'fourierft': (
    lambda c: spectral.fourierft(c['n_frequency'], c['scaling'], c['random_loc_seed']),
    lambda p: {'spectrum': p['fourierft_spectrum']},
    lambda c, _: {
      'positions_32x32': spectral.positions(c['n_frequency'], (32, 32), c['random_loc_seed'])
    },
  ),
  'c3a': (lambda c: spectral.c3a(c['block_size']), lambda p: {'kernel': p['c3a_kernel']}, None),
  'miss': (lambda c: shards.miss(c['r']), lambda p: {'block': p['miss_block']}, None),
  'vblora': (
    lambda c: shards.vblora(c['r'], c['num_vectors'], c['vector_length'], c['topk']),
    lambda p: {'a': p['vblora_logits_A'], 'b': p['vblora_logits_B'].swapaxes(0, 1)},
    lambda _, tensors: {'bank': tensors['vblora_vector_bank']},
  ),
  'randlora': (
    lambda c: shards.randlora(c['r'], c['randlora_alpha']),
    lambda p: {'lambda': p['randlora_lambda'], 'gamma': p['randlora_gamma']},
    lambda _, tensors: {'a': tensors['randlora_A'][:, 0], 'b': tensors['randlora_B']},
  ),
  'delora': (
    lambda c: shards.delora(c['r']),
    lambda p: {
      'a': p['delora_A'].T,
      'b': p['delora_B'].T,
      'lambda': p['delora_lambda'],
      'w_norm': p['delora_w_norm'],
    },
    None,
  ),
  'shira': (
    lambda c: shards.shira(c['r']),
    lambda p: {
      'values': p['shira_weight'],
      'rows': p['shira_indices'][1],
      'columns': p['shira_indices'][0],
    },
    None,
  ),
}  # fmt: skip


@pytest.mark.parametrize('architecture', ['bert', 'roberta'])
@pytest.mark.parametrize('method', PEFT)
def test_peft_checkpoints_give_the_same_logits(method, architecture):
  peer = peer_files.read('peft', architecture, method)
  make, leaves, shared = PEFT[method]
  deltas, kernels = {'it': make(peer.config)}, peer_files.kernels(peer.tensors)
  delta = {f'{path}/matmul_it': leaves(p) for path, p in kernels.items()}
  if shared:
    delta['shared_it'] = shared(peer.config, peer.tensors)
  delta = jax.tree.map(jnp.asarray, tree.unflatten(tree.flatten(delta)))
  if method == 'delora':
    for path, p in kernels.items():
      kernel = tree.flatten(peer.params)[f'{path}/kernel']
      close(p['delora_w_norm'], np.linalg.norm(kernel, axis=1))
  peer.agrees(deltas, delta)


@pytest.mark.parametrize('architecture', ['bert', 'roberta'])
def test_peft_beft_is_a_bias_of_the_values(architecture):
  peer = peer_files.read('peft', architecture, 'beft')
  params = tree.flatten(peer.params)
  for path, p in peer_files.kernels(peer.tensors).items():
    assert path.endswith('/value')
    params[f'{path}/bias'] = params[f'{path}/bias'] + p['beft_bias'][0]
  model = Encoder(peer.cfg)
  args = (peer.batch[name] for name in ('input_ids', 'mask', 'token_types'))
  logits = model.apply({'params': tree.unflatten(params)}, *args)
  np.testing.assert_allclose(logits, peer.logits, rtol=0, atol=1e-5)


def test_shared_parts_are_stored_once_and_reach_every_kernel():
  deltas = {'f': spectral.fourierft(n_frequency=9), 'v': shards.vblora(2, 6, 8)}
  model = Encoder(tiny.CFG, Hooks(tap=base.attach(deltas)))
  found = jax.eval_shape(lambda p: base.init(model, deltas, p, KEY), tiny.params())
  assert found['shared_f'].keys() == {'positions_32x32'}
  assert found['shared_v']['bank'].shape == (6, 8)
  assert not [path for path in tree.flatten(found) if 'layer_' in path and 'bank' in path]
