"""Low-rank methods against their definitions."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from kernels import KEY, PATH, matrix, shifted, site

from efft import config
from efft.errors import InputError
from efft.peft import base, kron, lora, shared_lowrank, spectral_init


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_closed_forms_are_the_printed_numbers():
  rows = {row.config: row.trains for row in importlib.import_module('rows_lowrank').ROWS}
  assert rows['vera'] == 43_008
  assert rows['loraplus'] == rows['dylora'] == rows['pissa'] == 294_912
  assert rows['dora'] == 294_912 + 18_432


def test_patterns_choose_rank_and_alpha_by_site():
  """Given as a table or as pairs; merged with the same scales as applied."""
  ranks = {r'layer_1/.*': 3, r'layer_\d+/attention/value/matmul': 2}
  alphas = {r'.*/value/matmul': 32.0}
  for make in (dict, lambda pairs: [list(pair) for pair in pairs.items()]):
    method = {
      'fn': 'lora.lora', 'rank': 4, 'use_rslora': True, 'lora_bias': True,
      'rank_pattern': make(ranks), 'alpha_pattern': make(alphas),
    }  # fmt: skip
    delta = base.build({'lora': method})['lora']
    for path, rank, alpha in (
      ('layer_0/attention/query/matmul', 4, 16.0),
      ('layer_0/attention/value/matmul', 2, 32.0),
      ('layer_1/attention/value/matmul', 3, 32.0),
    ):
      here = site(path=path)
      p = shifted(delta.init(KEY, here))
      assert p['a'].shape == (32, rank)
      update = alpha / rank**0.5 * p['a'] @ p['b']
      bias = alpha / rank**0.5 * p['bias']
      grown = delta.expand(p, path, None)
      close(matrix(delta, grown, here), update + bias, 1e-4)
      merged = delta.merge(grown, {'kernel': here.w, 'bias': jnp.ones(48)})
      close(merged['kernel'], here.w + update, 1e-4)
      close(merged['bias'], 1 + bias, 1e-4)


def test_a_pattern_with_dots_goes_through_a_config():
  found = config.default('task=sst2')
  found.method = {'lora': {'fn': 'lora.lora', 'rank_pattern': [('layer_.*', 4)]}}
  found.rules = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('params/.*', 'frozen'))
  delta = base.build(config.resolve(found)['method'])['lora']
  assert delta.init(KEY, site())['a'].shape == (32, 4)


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ({'fn': 'lora.lora', 'rank_pattern': {'layer_(': 4}}, 'missing'),
    ({'fn': 'lora.lora', 'rank_pattern': {'layer_0': 1.5}}, 'rank_pattern'),
    ({'fn': 'lora.lora', 'alpha_pattern': ['layer_0']}, 'alpha_pattern'),
    ({'fn': 'lora.embedding', 'rank': 0}, 'rank 0'),
    ({'fn': 'lora.dora', 'rank': 0}, 'rank 0'),
    ({'fn': 'lora.adalora', 'orth_reg_weight': -1.0}, 'orth_reg_weight'),
    ({'fn': 'lora.dylora', 'eval_rank': 9}, 'eval_rank 9'),
    ({'fn': 'spectral_init.pissa', 'alpha': 0.0}, 'alpha'),
    ({'fn': 'spectral_init.loftq', 'quantizer': 'int9'}, "'int9'"),
    ({'fn': 'spectral_init.loftq', 'steps': 0}, 'steps 0'),
    ({'fn': 'spectral_init.eva', 'examples': 0}, 'examples 0'),
    ({'fn': 'shared_lowrank.vera', 'rank': 0}, 'rank 0'),
    ({'fn': 'shared_lowrank.said', 'dim': 0}, 'dim 0'),
    ({'fn': 'kron.krona', 'shape': [4]}, 'shape [4]'),
    ({'fn': 'kron.lokr', 'decompose_factor': 0}, 'decompose_factor 0'),
    ({'fn': 'kron.loha', 'rank': 0}, 'rank 0'),
  ],
)
def test_options_that_cannot_be_are_refused(spec, message):
  with pytest.raises(InputError) as error:
    base.build({'m': spec})
  assert error.value.where == 'config.method.m' and message in str(error.value)


@pytest.mark.parametrize(
  ('delta', 'here', 'message'),
  [
    (spectral_init.pissa(rank=33), site(), 'rank 33'),
    (spectral_init.loftq(block=100), site(), 'blocks of 100'),
    (kron.krona((5, 4)), site(), 'does not divide'),
    (lora.lora(), site()._replace(w=None), 'without a kernel'),
    (lora.embedding(), site(), 'without a table'),
  ],
)
def test_sizes_that_do_not_fit_the_kernel_are_refused(delta, here, message):
  with pytest.raises(ValueError, match=message):
    delta.init(KEY, here)


def test_dora_has_the_norms_that_it_trains_and_no_gradient_through_them():
  delta, here = lora.dora(4), site()
  p = shifted(delta.init(KEY, here))
  close(np.linalg.norm(here.w + matrix(delta, p, here), axis=0), np.abs(p['m']), 1e-4)
  fixed = p['m'] / jnp.linalg.norm(here.w + 4 * p['a'] @ p['b'], axis=0)
  out = jnp.asarray(np.random.default_rng(2).normal(size=here.y.shape))
  found = jax.grad(lambda p: jnp.sum(delta.apply(p, here) * out))(p)
  low = jax.grad(lambda p: jnp.sum(fixed * (here.y + 4 * here.x @ p['a'] @ p['b']) * out))(p)
  close(found['a'], low['a'], 1e-4)
  close(found['b'], low['b'], 1e-4)


def test_adalora_and_its_penalty():
  delta, here = lora.adalora(rank=6, alpha=3.0, orth_reg_weight=0.2), site()
  start = delta.init(KEY, here)
  assert start['e'].shape == (6,) and 0.015 < start['a'].std() < 0.025
  p = {leaf: np.asarray(x) for leaf, x in shifted(start).items()}
  update = 0.5 * p['a'] @ np.diag(p['e']) @ p['b']
  close(matrix(delta, p, here), update)
  close(delta.merge(p, {'kernel': here.w})['kernel'], here.w + update)
  grams = p['a'].T @ p['a'], p['b'] @ p['b'].T
  close(delta.penalty(p, PATH), 0.2 * sum(np.sum((g - np.eye(6)) ** 2) for g in grams), 1e-4)
  q, _ = np.linalg.qr(p['a'])
  assert delta.penalty({**p, 'a': q, 'b': q[:, :6].T}, PATH) < 1e-9


def test_dylora_draws_one_rank_a_step():
  delta, here = lora.dylora(rank=4, alpha=8.0), site()
  p = shifted(delta.init(KEY, here))
  grow = jax.jit(lambda key: delta.expand(p, PATH, key))
  seen = set()
  for i in range(40):
    key = jax.random.key(i)
    grown = grow(key)
    r = int((np.abs(grown['b']).sum(1) > 0).sum())
    seen.add(r)
    close(matrix(delta, grown, here), 8.0 / r * p['a'][:, :r] @ p['b'][:r], 1e-4)
    other = delta.expand(p, 'layer_1/attention/value/matmul', key)
    np.testing.assert_array_equal(other['b'], grown['b'])
  assert seen == {1, 2, 3, 4}
  np.testing.assert_array_equal(delta.expand(p, PATH, None)['b'], p['b'])
  cut = lora.dylora(rank=4, alpha=8.0, eval_rank=2).expand(p, PATH, None)
  close(matrix(delta, cut, here), 4.0 * p['a'][:, :2] @ p['b'][:2], 1e-4)


def test_vera_cuts_what_is_shared_to_each_kernel():
  delta = shared_lowrank.vera(rank=6)
  wide, tall = site(8, 24), site(16, 4)
  common = delta.shared(KEY, {'wide': wide, 'tall': tall})
  assert common['a'].shape == (16, 6) and common['b'].shape == (6, 24)
  assert 0.9 < np.abs(common['a']).max() / (6 / 16) ** 0.5 <= 1
  assert 0.9 < np.abs(common['b']).max() / (6 / 6) ** 0.5 <= 1
  for here in (wide, tall):
    p = delta.init(KEY, here)
    assert (p['lambda_d'] == 0.1).all() and not p['lambda_b'].any()
    p = {**shifted(p), **common}
    d_in, d_out = here.w.shape
    update = common['a'][:d_in] @ np.diag(p['lambda_d']) @ common['b'][:, :d_out]
    close(matrix(delta, p, here), update @ np.diag(p['lambda_b']))


@pytest.mark.parametrize('dim', [7, 100, 5000])
def test_said_projects_one_vector_with_orthogonal_columns(dim):
  delta, here = shared_lowrank.said(dim), site(16, 24)
  p = {**delta.init(KEY, here), **delta.shared(KEY, {})}
  w = jnp.zeros_like(here.w)

  def moved(v, seed=p['seed']):
    return delta.merge({**p, 'v': v, 'seed': seed}, {'kernel': w})['kernel'].ravel()

  columns = np.asarray(jax.jacfwd(moved)(p['v']))
  gram = columns.T @ columns
  assert np.count_nonzero(gram - np.diag(np.diag(gram))) == 0
  assert (np.count_nonzero(columns, axis=1) == 1).all()
  used = np.diag(gram)[: 16 * 24]
  assert 0.5 < used.min() and used.max() < 1.001
  signs = np.sign(columns.sum(1))
  seed = delta.init(jax.random.key(1), here)['seed']
  other = np.asarray(jax.jacfwd(lambda v: moved(v, seed))(p['v'])).sum(1)
  assert abs(signs.mean()) < 0.2 and abs((signs * np.sign(other)).mean()) < 0.2
  close(delta.merge({**p, 'v': p['v'] + 1, 'lambda': 3 * p['lambda']}, {'kernel': w})['kernel'],
        3 * moved(p['v'] + 1).reshape(w.shape), 1e-5)  # fmt: skip


@pytest.mark.parametrize('rank', [2, 8])
@pytest.mark.parametrize('decompose_both', [False, True])
def test_lokr_is_a_kronecker_product(rank, decompose_both):
  delta, here = kron.lokr(rank, 4.0, decompose_both), site(36, 48)
  start = delta.init(KEY, here)
  assert not matrix(delta, start, here).any()
  p = shifted(start)
  w1 = p['w1'] if 'w1' in p else p['w1_a'] @ p['w1_b']
  w2 = p['w2'] if 'w2' in p else p['w2_a'] @ p['w2_b']
  assert ('w1' in p) == (not decompose_both or rank == 8) and ('w2' in p) == (rank == 8)
  assert w1.shape == (6, 6) and w2.shape == (6, 8)
  update = 4.0 / rank * np.kron(w1, w2)
  close(matrix(delta, p, here), update, 1e-4)
  close(delta.merge(p, {'kernel': here.w})['kernel'], here.w + update, 1e-4)


def test_krona_is_a_kronecker_product():
  delta, here = kron.krona((4, 6), scale=0.5), site(32, 48)
  p = shifted(delta.init(KEY, here))
  assert p['a'].shape == (4, 6) and p['b'].shape == (8, 8)
  close(matrix(delta, p, here), 0.5 * np.kron(p['a'], p['b']), 1e-4)


@pytest.mark.parametrize(
  ('side', 'limit', 'expected'),
  [
    (256, -1, (16, 16)), (128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)),
    (768, -1, (24, 32)), (768, 5, (4, 192)), (16, 8, (8, 2)),
  ],
)  # fmt: skip
def test_factors(side, limit, expected):
  """The first four are the examples of LyCORIS and HF PEFT."""
  assert kron.factors(side, limit) == expected


def test_loha_is_a_hadamard_product():
  delta, here = kron.loha(3, 6.0), site()
  p = shifted(delta.init(KEY, here))
  update = 2.0 * (p['a1'] @ p['b1']) * (p['a2'] @ p['b2'])
  close(matrix(delta, p, here), update, 1e-4)
  assert np.linalg.matrix_rank(update, tol=1e-3) == 9


def test_loraplus_gives_b_its_rate():
  resolved = tiny.settings('loraplus')
  groups = tiny.world(resolved, tiny.SHORT).groups
  assert {path[-1] for path, group in groups.items() if group == 'b'} == {'b'}
  assert resolved['optim']['groups']['b']['lr'] == 16 * resolved['optim']['lr']
