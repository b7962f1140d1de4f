"""Masks over pretrained kernels by thresholds on trained scores: their definition in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efft.errors import InputError
from efft.peft import base, diff
from efft.peft.base import Site

PATH = 'layer_0/mlp/up/matmul'
KEY = jax.random.key(0)


def site(d_in=40, d_out=30):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5, d_in), (d_in, d_out)))
  return Site(PATH, x @ w, x=x, w=w)


def test_what_scores_leave_of_the_kernel():
  """Exactly 0 and 1, applied as merged, and beside what other deltas have added."""
  delta, here = diff.threshold_mask(tau=0.2), site()
  scores = np.random.default_rng(1).normal(size=here.w.shape).astype(np.float32)
  scores[0, :2] = 0.2  # on the threshold is not above it
  mask = np.where(scores > np.float32(0.2), 1, 0)
  assert 0.3 < mask.mean() < 0.6
  p = delta.expand({'scores': jnp.asarray(scores)}, PATH, None)
  np.testing.assert_array_equal(p['mask'], mask)
  stored = delta.pack({'scores': jnp.asarray(scores)})['scores']
  assert stored.dtype == bool
  again = delta.expand({'scores': stored.astype(jnp.float32)}, PATH, None)
  np.testing.assert_array_equal(again['mask'], mask)
  kept = np.asarray(here.x) @ (mask * np.asarray(here.w))
  np.testing.assert_allclose(delta.apply(p, here), kept, atol=1e-4)
  other = here._replace(y=here.y + 7)
  np.testing.assert_allclose(delta.apply(p, other), kept + 7, atol=1e-4)
  merged = delta.merge(p, {'kernel': here.w, 'bias': jnp.ones(30)})
  np.testing.assert_array_equal(merged['kernel'], mask * np.asarray(here.w))
  np.testing.assert_array_equal(merged['bias'], np.ones(30))


def test_gradients_pass_straight_through_to_all_scores():
  delta, here = diff.threshold_mask(init_sparsity=0.5), site()
  out = np.random.default_rng(2).normal(size=here.y.shape).astype(np.float32)

  def loss(p):
    return jnp.sum(delta.apply(delta.expand(p, PATH, None), here) * out)

  found = jax.grad(loss)(delta.init(KEY, here))['scores']
  # Of the kernel m * W, times what the mask multiplies.
  expected = np.einsum('btk,btn->kn', here.x, out) * here.w
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('sparsity', [0.0, 0.05, 0.5])
def test_scores_start_uniform_around_the_threshold(sparsity):
  delta, here = diff.threshold_mask(0.01, sparsity, width=0.6), site(200, 150)
  p = delta.init(KEY, here)
  scores = np.asarray(p['scores'])
  low, high = 0.01 - 0.6 * sparsity, 0.01 + 0.6 * (1 - sparsity)
  assert low <= scores.min() < low + 1e-3 and high - 1e-3 < scores.max() <= high + 1e-6
  np.testing.assert_allclose(scores.mean(), (low + high) / 2, atol=5e-3)
  np.testing.assert_allclose(scores.std(), 0.6 / 12**0.5, rtol=2e-2)
  closed = 1 - np.mean(delta.expand(p, PATH, None)['mask'])
  assert closed == 0 if sparsity == 0 else abs(closed - sparsity) < 0.01
  if sparsity == 0:
    np.testing.assert_array_equal(delta.apply(delta.expand(p, PATH, None), here), here.y)


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'tau': 1.0}, 'tau 1.0'),
    ({'init_sparsity': 1.0}, 'init_sparsity 1.0'),
    ({'init_sparsity': -0.1}, 'init_sparsity -0.1'),
    ({'width': 0.0}, 'width 0.0'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': {'fn': 'diff.threshold_mask', **options}})


def test_a_site_without_a_kernel_is_refused():
  with pytest.raises(ValueError, match='without a kernel'):
    diff.threshold_mask().init(KEY, Site('layer_0/mlp/act', jnp.zeros((1, 1, 4))))
