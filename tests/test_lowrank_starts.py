"""Low-rank updates that start from the kernel or its input: PiSSA, OLoRA, EVA, LoftQ, LoRA-XS."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from kernels import KEY, matrix, site

from efft import tree
from efft.peft import spectral_init


def close(a, b, tolerance=2e-5):
  np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_pissa_starts_from_the_principal_part():
  delta, here = spectral_init.pissa(rank=4, alpha=8.0), site()
  p = delta.init(KEY, here)
  u, s, vt = np.linalg.svd(here.w)
  close(2.0 * p['a'] @ p['b'], (u[:, :4] * s[:4]) @ vt[:4], 1e-4)
  close(p['a'].T @ p['a'], np.diag(s[:4]) / 2, 1e-4)
  residual = delta.rebase(p, {'kernel': here.w})['kernel']
  close(np.linalg.svd(residual)[1], np.r_[s[4:], np.zeros(4)], 1e-4)
  # Training moves a and b, and leaves what they stand beside.
  after = delta.rebase({**p, 'a': p['a'] + 1, 'b': p['b'] + 1}, {'kernel': here.w})['kernel']
  np.testing.assert_array_equal(after, residual)


def test_olora_starts_from_qr():
  delta, here = spectral_init.olora(rank=4, alpha=8.0), site()
  p = delta.init(KEY, here)
  q, r = np.linalg.qr(np.asarray(here.w).T)
  close(p['b'] @ p['b'].T, np.eye(4), 1e-5)
  close(p['a'] @ p['b'], (q[:, :4] @ r[:4]).T, 1e-4)
  close(delta.rebase(p, {'kernel': here.w})['kernel'], here.w - 2.0 * p['a'] @ p['b'], 1e-5)


def test_eva_starts_from_the_activations_of_real_tokens():
  mask = np.arange(5) < np.array([[5], [2]])
  delta, here = spectral_init.eva(rank=3), site(mask=mask)
  p = delta.init(KEY, here)
  _, _, vt = np.linalg.svd(np.asarray(here.x)[mask], full_matrices=False)
  close(np.abs(vt[:3] @ p['a']), np.eye(3), 1e-4)
  assert not p['b'].any() and delta.examples == 64
  noise = jnp.where(mask[..., None], here.x, 7.0)
  close(delta.init(KEY, here._replace(x=noise))['a'], p['a'], 1e-6)


@functools.cache
def eva_world():
  return tiny.world(tiny.settings('eva'), tiny.SHORT)


def test_eva_reads_activations_through_the_model():
  """Query and value see the same input: the word, normed, of the batch that init was given."""
  found = tree.flatten(eva_world().variables['delta'])
  a, other = (found[f'layer_0/attention/{name}/matmul_eva/a'] for name in ('query', 'value'))
  np.testing.assert_array_equal(a, other)
  here, seen = eva_world(), {}

  def record(module, site, y, **context):
    if (*module.path, site) == ('layer_0', 'attention', 'query', 'matmul'):
      seen.update(context)
    return y

  batch = tiny.batch(length=16, cfg=tiny.SHORT)
  model = here.model.clone(hooks=type(here.model.hooks)(tap=record))
  model.apply({'params': tiny.params(tiny.SHORT)}, batch['input_ids'], batch['mask'],
              batch['token_types'])  # fmt: skip
  _, _, vt = np.linalg.svd(np.asarray(seen['x'])[batch['mask']], full_matrices=False)
  close(np.abs(vt[:8] @ a), np.eye(8), 2e-3)


def quantized(w, levels, block):
  """By loops: every number goes to the nearest level of its block."""
  out = []
  for row in np.asarray(w).T.reshape(-1, block):
    largest = np.abs(row).max()
    out.append([levels[np.abs(levels - v / largest).argmin()] * largest for v in row])
  return np.asarray(out, np.float32).reshape(w.T.shape).T


@pytest.mark.parametrize(
  ('quantizer', 'levels'),
  [
    ('nf4', np.array(spectral_init.NF4)),
    ('int2', np.array([-1.0, 0.0, 1.0])),
    ('int3', np.arange(-3, 4) / 3),
  ],
)
def test_loftq_alternates(quantizer, levels):
  here = site()
  delta = spectral_init.loftq(rank=4, alpha=8.0, quantizer=quantizer, block=16, steps=3)
  p = delta.init(KEY, here)
  w, low = np.asarray(here.w), np.zeros_like(here.w)
  for _ in range(3):
    q = quantized(w - low, levels, 16)
    u, s, vt = np.linalg.svd(w - q, full_matrices=False)
    low = (u[:, :4] * s[:4]) @ vt[:4]
  found = delta.rebase(p, {'kernel': here.w})['kernel']
  close(found, q, 1e-4)
  close(2.0 * p['a'] @ p['b'], low, 1e-3)
  plain = quantized(w, levels, 16)
  assert np.linalg.norm(w - found - low) < 0.95 * np.linalg.norm(w - plain)


def test_nf4_is_what_normal_quantiles_give():
  """Eight levels above zero and seven below, evenly spaced in probability up to 0.9677."""
  from statistics import NormalDist

  offset = 0.9677083
  rises = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
  falls = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
  levels = np.sort([*falls, 0.0, *rises])
  close(spectral_init.NF4, levels / levels.max(), 1e-5)


def test_lora_xs_lives_between_singular_vectors():
  delta, here = spectral_init.lora_xs(rank=4, alpha=8.0), site()
  p = delta.init(KEY, here)
  assert 0 < np.abs(p['r']).max() < 1e-4
  u, s, vt = np.linalg.svd(here.w)
  close(p['a'] @ p['b'], (u[:, :4] * s[:4]) @ vt[:4], 1e-4)
  close(p['b'] @ p['b'].T, np.eye(4), 1e-5)
  p['r'] = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
  close(matrix(delta, p, here), 2.0 * p['a'] @ p['r'] @ p['b'], 1e-4)
