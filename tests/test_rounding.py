"""GPTQ against its definition, an inverse at a time, and against rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import qtensor
from efft.compress import calibrate, rounding

LEVELS = {'int8': np.arange(-127, 128), 'int4': np.arange(-7, 8), 'nf4': np.asarray(qtensor.NF4)}
FORMATS = [('int8', 0), ('int4', 4), ('nf4', 6), ('int4', 0)]


def layer(inputs=12, outputs=6, examples=80, seed=0):
  """x [examples, K] of correlated inputs, w [K, N]."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(inputs, inputs)) / inputs**0.5 + np.eye(inputs) / 2
  x = rng.normal(size=(examples, inputs)) @ mixing
  return x, rng.normal(size=(inputs, outputs))


def naive(w, h, codes, block, dampening=0.01):
  """One input after the other, with the inverse of what is left each time."""
  k, n = w.shape
  h = h + dampening * np.mean(np.diag(h)) * np.eye(k)
  w, size = w.copy(), block or k
  found, scales, levels = np.zeros((k, n)), np.zeros((k // size, n)), LEVELS[codes]
  for i in range(k):
    if i % size == 0:
      scales[i // size] = np.abs(w[i : i + size]).max(0) / levels[-1]
    inverse = np.linalg.inv(h[i:, i:])
    for j in range(n):
      found[i, j] = np.abs(levels - w[i, j] / scales[i // size, j]).argmin()
    q = levels[found[i].astype(int)] * scales[i // size]
    w[i:] -= np.outer(inverse[:, 0], (w[i] - q) / inverse[0, 0])
  low = 0 if codes == 'nf4' else levels[0]
  return found + low, scales


def error(x, w, codes, scale, kind):
  """[N]: ||X w - X q||^2."""
  return np.sum((x @ (qtensor.values(codes, kind, scale) - w)) ** 2, 0)


@pytest.mark.parametrize('codes, block', FORMATS)
def test_codes_are_those_of_the_definition(codes, block):
  x, w = layer()
  h = 2 * x.T @ x
  expected, scales = naive(w, h, codes, block)
  found, used = rounding.gptq(w, h, codes, block)
  assert found.dtype == np.int8 and used.shape == (12 // (block or 12), 6)
  plain = qtensor.scales(w, codes, block)
  nearest = qtensor.encode(w, codes, plain)
  better = error(x, w, expected.astype(int), scales, codes) <= error(x, w, nearest, plain, codes)
  assert better.sum() >= 4, 'most outputs, so that the definition is seen at all'
  np.testing.assert_array_equal(found[:, better], expected[:, better])
  np.testing.assert_allclose(used[:, better], scales[:, better], rtol=1e-5)
  np.testing.assert_array_equal(found[:, ~better], nearest[:, ~better])
  np.testing.assert_array_equal(used[:, ~better], plain[:, ~better])


@settings(deadline=None, max_examples=40)
@given(
  st.sampled_from(FORMATS), st.integers(2, 60), st.integers(0, 2**32 - 1),
  st.sampled_from(['max', 'mse']),
)  # fmt: skip
def test_no_output_is_worse_than_by_rounding(form, examples, seed, how):
  (codes, block), (x, w) = form, layer(examples=examples, seed=seed)

  def scales(w, codes, block=0):
    return calibrate.scales(w, codes, block, how=how)

  found, used = rounding.gptq(w, 2 * x.T @ x, codes, block, scales)
  plain = scales(w, codes, block)
  rounded = error(x, w, qtensor.encode(w, codes, plain), plain, codes)
  assert (error(x, w, found, used, codes) <= rounded * (1 + 1e-5)).all()
  if block:  # and what a QTensor holds is what was found
    q = qtensor.from_codes(found, codes, used, inputs='float')
    q.check()
    np.testing.assert_array_equal(qtensor.dequantize(q), qtensor.values(found, codes, used))


@pytest.mark.parametrize('codes, block', FORMATS)
def test_errors_of_correlated_inputs_are_made_up_for(codes, block):
  """Wherever inputs repeat each other, by a lot."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(300, 4)) @ rng.normal(size=(4, 48)) + 0.05 * rng.normal(size=(300, 48))
  w = rng.normal(size=(48, 10))
  found, used = rounding.gptq(w, 2 * x.T @ x, codes, block)
  plain = qtensor.scales(w, codes, block)
  rounded = error(x, w, qtensor.encode(w, codes, plain), plain, codes).sum()
  assert error(x, w, found, used, codes).sum() < 0.5 * rounded


@pytest.mark.parametrize('codes, block', FORMATS)
def test_late_updates_change_nothing(codes, block):
  x, w = layer(inputs=36)
  first, *others = (rounding.gptq(w, 2 * x.T @ x, codes, block, lazy=n) for n in (1, 7, 12, 100))
  for other in others:
    np.testing.assert_array_equal(first[0], other[0])
    np.testing.assert_allclose(first[1], other[1], rtol=1e-6)


def test_inputs_that_never_occur_are_rounded_and_change_nothing():
  x, w = layer()
  x[:, [2, 5]] = 0
  h, scale = 2 * x.T @ x, qtensor.scales(w, 'int8')
  found, _ = rounding.gptq(w, h, 'int8', scales=lambda *_: scale)
  np.testing.assert_array_equal(found[[2, 5]], qtensor.encode(w, 'int8', scale)[[2, 5]])
  rest = np.delete(np.arange(12), [2, 5])
  other, _ = rounding.gptq(
    w[rest], h[np.ix_(rest, rest)], 'int8', scales=lambda *_: scale, dampening=0.01 * 10 / 12
  )
  np.testing.assert_array_equal(found[rest], other)
  nothing, scale = rounding.gptq(w, np.zeros((12, 12)), 'int4', 4)
  np.testing.assert_array_equal(nothing, qtensor.encode(w, 'int4', scale))


def test_what_does_not_fit_is_refused():
  x, w = layer()
  h = 2 * x.T @ x
  with pytest.raises(ValueError, match='12 inputs, which are not cut into blocks of 5'):
    rounding.gptq(w, h, 'int4', 5)
  with pytest.raises(ValueError, match='12 inputs with H of'):
    rounding.gptq(w, h[:11, :11], 'int4')
  for bad in (np.inf, np.nan):
    with pytest.raises(ValueError, match='finite'):
      rounding.gptq(np.where(w == w[0, 0], bad, w), h, 'int4')
    with pytest.raises(ValueError, match='finite'):
      rounding.gptq(w, h * bad, 'int4')
