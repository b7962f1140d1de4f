"""Rotations of kernels, OFT, BOFT, HRA and RoAd: their definitions, and what HF PEFT computes."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import peer_files
import pytest
from kernels import KEY, merged, moved, site

from efft import tree
from efft.peft import orthogonal


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def explicit_cayley(q, size):
  skew = np.zeros((size, size))
  skew[np.triu_indices(size, 1)] = q
  skew -= skew.T
  return (np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew)


def block_diagonal(blocks):
  width = sum(len(block) for block in blocks)
  matrix, start = np.zeros((width, width)), 0
  for block in blocks:
    matrix[start : start + len(block), start : start + len(block)] = block
    start += len(block)
  return matrix


def assert_orthogonal(r, tolerance=1e-5):
  assert np.abs(r - np.eye(len(r))).max() > 0.1
  assert np.abs(r.T @ r - np.eye(len(r))).max() < tolerance


@pytest.mark.parametrize('share', [False, True])
def test_oft_is_a_block_diagonal_rotation(share):
  delta = orthogonal.oft(block_size=4, block_share=share)
  p, kernel = moved(delta, 12, 5)
  assert p['q'].shape == ((1 if share else 3), 6)
  rotation = block_diagonal([explicit_cayley(p['q'][0 if share else i], 4) for i in range(3)])
  found = merged(delta, p, jnp.eye(12))
  close(found, rotation)
  assert_orthogonal(found)
  close(merged(delta, p, kernel), rotation @ kernel)


def test_oft_by_the_neumann_series_turns_the_other_way():
  exact = orthogonal.oft(block_size=4)
  p, _ = moved(exact, 8, 8, spread=0.03)
  worst = []
  for terms in (4, 6, 9):
    series = orthogonal.oft(block_size=4, use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    worst.append(np.abs(merged(series, p, jnp.eye(8)) - merged(exact, p, jnp.eye(8)).T).max())
  assert worst[0] > worst[1] > worst[2] and worst[2] < 1e-6
  q = orthogonal.skew(p['q'], 4)
  powers = [functools.reduce(jnp.matmul, [q] * n) for n in range(1, 5)]
  expected = 2 * (powers[0] + powers[1] + powers[2]) + powers[3]
  close(orthogonal.cayley_neumann(q, 5), expected, 1e-7)


def butterfly_permutation(width, level, block):
  """Of the factor of a level: even half blocks first, then odd ones, within 2^level blocks."""
  halves = np.arange(width).reshape(-1, 2 ** (level + 1), block // 2)
  order = [*range(0, 2 ** (level + 1), 2), *range(1, 2 ** (level + 1), 2)]
  return np.eye(width)[halves[:, order].reshape(-1)]


@pytest.mark.parametrize('factors', [1, 3])
def test_boft_is_a_product_of_butterfly_factors(factors):
  delta = orthogonal.boft(block_size=4, factors=factors)
  p, kernel = moved(delta, 16, 6)
  rotation = np.eye(16)
  for level in range(factors):
    permutation = butterfly_permutation(16, level, 4)
    blocks = block_diagonal([explicit_cayley(q, 4) for q in p['q'][level]])
    rotation = permutation @ blocks @ permutation.T @ rotation
  close(merged(delta, p, kernel), rotation @ kernel * p['s'])
  found = merged(delta, p | {'s': 1.0}, jnp.eye(16))
  assert_orthogonal(found)
  assert (np.abs(found) > 1e-7).all() == (factors == 3), 'everything reaches everything'


def test_hra_is_a_chain_of_reflections():
  delta = orthogonal.hra(rank=4)
  p, kernel = moved(delta, 12, 5)
  rotation = np.eye(12)
  for u in p['u'].T:
    rotation = (np.eye(12) - 2 * np.outer(u, u) / (u @ u)) @ rotation
  found = merged(delta, p, jnp.eye(12))
  close(found, rotation)
  assert_orthogonal(found)
  close(merged(delta, p, kernel), rotation @ kernel)


def test_hra_starts_with_pairs_that_cancel():
  here = site(12, 5)
  u = orthogonal.hra(rank=4).init(KEY, here)['u']
  assert (u[:, 0] == u[:, 1]).all() and (u[:, 2] == u[:, 3]).all() and (u[:, 0] != u[:, 2]).all()
  close(merged(orthogonal.hra(rank=4), {'u': u}, here.w), here.w, 1e-6)


def test_hra_penalty_is_the_distance_from_orthogonal():
  assert orthogonal.hra().penalty is None
  delta = orthogonal.hra(rank=4, regularization=0.5)
  p, _ = moved(delta, 12, 5)
  cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in itertools.permutations(p['u'].T, 2)]
  close(delta.penalty(p, ''), 0.5 * np.sum(np.square(cosines)))


@pytest.mark.parametrize('variant', [1, 2, 4])
def test_road_turns_pairs(variant):
  delta = orthogonal.road(variant=f'road_{variant}', group_size=4)
  p, kernel = moved(delta, 3, 8)
  assert p['theta'].size + p['alpha'].size == 8 * variant
  found = merged(delta, p, kernel)
  for group, i in itertools.product(range(2), range(2)):
    one, two = 4 * group + i, 4 * group + i + 2
    # Index of angle and scale: (cos of the first, sin of the first, sin and cos of the second).
    index = {
      1: [2 * group + i] * 4,
      2: [one, one, two, two],
      4: [8 * group + i, 8 * group + 4 + i, 8 * group + 6 + i, 8 * group + 2 + i],
    }[variant]
    t, a = p['theta'][np.array(index)], p['alpha'][np.array(index)]
    matrix = np.array([[a[0] * np.cos(t[0]), -a[1] * np.sin(t[1])],
                       [a[2] * np.sin(t[2]), a[3] * np.cos(t[3])]])  # fmt: skip
    close(found[:, [one, two]], kernel[:, np.array([one, two])] @ matrix.T)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: orthogonal.oft(block_size=1), 'below 2'),
    (lambda: orthogonal.oft(num_cayley_neumann_terms=3), 'below 4'),
    (lambda: orthogonal.oft(block_size=4), 'does not divide 6'),
    (lambda: orthogonal.boft(factors=0), 'at least 2 and 1'),
    (lambda: orthogonal.boft(block_size=3), 'odd'),
    (lambda: orthogonal.boft(block_size=2), 'does not divide 6'),
    (lambda: orthogonal.hra(rank=3), 'even'),
    (lambda: orthogonal.road(variant='road_3'), 'road_3'),
    (lambda: orthogonal.road(group_size=3), 'even'),
    (lambda: orthogonal.road(group_size=4), 'does not divide 10'),
  ],
)
def test_options_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    make().init(KEY, site(6, 10))


def oft_of(config):
  options = ('block_share', 'use_cayley_neumann', 'num_cayley_neumann_terms')
  return orthogonal.oft(config['oft_block_size'], **{name: config[name] for name in options})


def boft_leaves(p):
  r, size = p['boft_R'], p['boft_R'].shape[-1]
  rows, columns = np.triu_indices(size, 1)
  skew = 0.5 * (r - r.swapaxes(-1, -2))
  return {'q': skew[..., rows, columns], 's': p['boft_s'][:, 0]}


# Of each method: the delta from adapter_config.json, and a kernel's leaves from its tensors.
PEFT = {
  'oft': (oft_of, lambda p: {'q': p['oft_R.weight']}),
  'boft': (
    lambda c: orthogonal.boft(c['boft_block_size'], c['boft_n_butterfly_factor']),
    boft_leaves,
  ),
  'hra': (lambda c: orthogonal.hra(c['r']), lambda p: {'u': p['hra_u']}),
  'road': (
    lambda c: orthogonal.road(c['variant'], c['group_size']),
    lambda p: {'theta': p['road_theta'], 'alpha': p['road_alpha']},
  ),
}


@pytest.mark.parametrize('architecture', ['bert', 'roberta'])
@pytest.mark.parametrize('method', PEFT)
def test_peft_checkpoints_give_the_same_logits(method, architecture):
  peer = peer_files.read('peft', architecture, method)
  make, leaves = PEFT[method]
  deltas, kernels = {'it': make(peer.config)}, peer_files.kernels(peer.tensors)
  delta = {f'{path}/matmul_it': leaves(p) for path, p in kernels.items()}
  delta = jax.tree.map(jnp.asarray, tree.unflatten(tree.flatten(delta)))
  if method == 'road':
    # HF PEFT turns the bias too; ours acts before it.
    params = tree.flatten(peer.params)
    for path in kernels:
      p = tree.flatten(delta)
      p = {name: p[f'{path}/matmul_it/{name}'] for name in ('theta', 'alpha')}
      bias = {'kernel': params[f'{path}/bias'][None]}
      params[f'{path}/bias'] = deltas['it'].merge(p, bias)['kernel'][0]
    peer = peer._replace(params=tree.unflatten(params))
  peer.agrees(deltas, delta)
