"""Statistics of inputs, one token at a time; ranges by brute force over all numbers."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import assemble, qtensor
from efft.compress import base, calibrate
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.training import losses

F = np.float32
CFG = dataclasses.replace(tiny.SHORT, embed_dim=16)
PLACES = ['embed/project', 'layer_0/attention/key', 'layer_0/mlp/down', 'pooler', 'head/out']


def inputs(x, hessian=None) -> calibrate.Inputs:
  x = np.asarray(x, F)
  return calibrate.Inputs(x.min(0), x.max(0), x, hessian)


def some(seed=0, n=60, k=12, spread=2.0):
  """Numbers whose columns differ in size, some of them of one sign."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(n, k)) * np.exp(spread * rng.normal(size=k))
  x[:, 1::3] = np.abs(x[:, 1::3])
  return inputs(x)


@pytest.fixture(scope='module')
def subject():
  batches = [tiny.batch(rows=4, seed=i, cfg=CFG) for i in range(2)]
  batches[1]['weights'][2:] = 0
  net = assemble.network(CFG, {}, 'float32')
  return base.Subject(net, {'params': tiny.params(CFG)}, losses.single(), batches)


@pytest.fixture(scope='module')
def tokens(subject):
  """{place: [n, K]}: what goes into the linears there, token by token."""

  @jax.jit
  def seen(ids, mask, types):
    found = {}

    def tap(module, site, y, x=None, **context):
      if site == 'matmul':
        found['/'.join(module.path)] = x
      return y

    Encoder(CFG, Hooks(tap=tap)).apply(subject.variables, ids, mask, types)
    return found

  found = {place: [] for place in PLACES}
  for batch in subject.batches:
    x = jax.device_get(seen(batch['input_ids'], batch['mask'], batch['token_types']))
    for place in PLACES:
      for row in np.flatnonzero(batch['weights']):
        real = batch['mask'][row]
        found[place] += list(x[place][row][real] if x[place].ndim == 3 else [x[place][row]])
  return {place: np.array(rows, np.float64) for place, rows in found.items()}


def observed(subject):
  return calibrate.observe(subject, PLACES, tokens=1000, hessians=True)


def sorted_rows(x):
  return x[np.lexsort(np.round(x, 4).T)]


def test_observations_are_of_every_real_token(subject, tokens):
  found = observed(subject)
  assert found.keys() == set(PLACES)
  for place, x in tokens.items():
    one = found[place]
    np.testing.assert_allclose(one.low, x.min(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.high, x.max(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one.hessian, 2 * x.T @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(sorted_rows(one.rows), sorted_rows(x), rtol=1e-4, atol=1e-4)


def test_a_sample_is_of_different_real_tokens_of_each_batch(subject, tokens):
  found = calibrate.observe(subject, ['layer_0/mlp/down', 'head/out'], tokens=8)
  first = subject.batches[0]['mask'].sum()
  x, rows = tokens['layer_0/mlp/down'], found['layer_0/mlp/down'].rows
  nearest = [int(np.abs(x - row).max(1).argmin()) for row in rows]
  np.testing.assert_allclose(rows, x[nearest], rtol=1e-4, atol=1e-4)
  assert len(set(nearest)) == 8 and sum(i < first for i in nearest) == 4
  assert len(found['head/out'].rows) == 4 + 2, 'all there are'
  assert found['head/out'].hessian is None


def test_what_cannot_be_observed_is_refused(subject):
  with pytest.raises(ValueError, match='no examples'):
    calibrate.observe(dataclasses.replace(subject, batches=[]), PLACES)
  nobody = [{**b, 'weights': 0 * b['weights']} for b in subject.batches]
  broken = jax.tree.map(np.asarray, subject.variables)
  broken['params']['layer_0']['mlp']['up']['bias'] = np.full(48, np.nan, F)
  for bad, found in (
    ({'batches': nobody}, 'or there are none'), ({'variables': broken}, 'layer_0/mlp/down .*finite')
  ):  # fmt: skip
    with pytest.raises(ValueError, match=found):
      observed(dataclasses.replace(subject, **bad))


def test_minmax_is_of_all_tokens_not_of_the_sample():
  seen = some()._replace(rows=np.zeros((1, 12), F))
  low, high = float(seen.low.min()), float(seen.high.max())
  assert calibrate.minmax(seen, False) == (low, high)
  assert calibrate.minmax(seen, True) == (-max(-low, high), max(-low, high))
  above = inputs([[1, 2], [3, 4]])
  assert calibrate.minmax(above, False) == (0, 4), '0 is in every range'


def test_percentiles_leave_out_that_share_of_all_numbers():
  seen = some(n=1000)
  x = np.sort(seen.rows.ravel())
  low, high = calibrate.percentile(seen, False, 99.0)
  assert abs((x < low).mean() - 0.01) < 1e-4 and abs((x > high).mean() - 0.01) < 1e-4
  low, high = calibrate.percentile(seen, True, 99.0)
  assert low == -high and abs((np.abs(x) > high).mean() - 0.01) < 1e-4
  assert calibrate.percentile(seen, True, 100.0)[1] == np.abs(x).max()


def error(x, low, high, symmetric):
  """Mean squared error of the integers of a range, by the definition of `models.quantized`."""
  if symmetric:
    step, zero, least = high / 127, 0, -127
  else:
    step = (high - low) / 255
    zero, least = np.clip(np.rint(-128 - low / step), -128, 127), -128
  integers = np.clip(np.rint(x / step) + zero, least, 127)
  return np.mean(((integers - zero) * step - x) ** 2)


@pytest.mark.parametrize('spread', [0.0, 1.5])
def test_least_squared_error_against_all_numbers(spread):
  seen = some(n=400, spread=spread)
  x = seen.rows.astype(np.float64)
  low, high = calibrate.mse(seen, True)
  top = np.abs(x).max()
  by_force = min(error(x, 0, share * top, True) for share in np.geomspace(1, 0.01, 400))
  assert low == -high and error(x, low, high, True) <= 1.01 * by_force
  low, high = calibrate.mse(seen, False)
  pairs = [(a, b) for a in np.geomspace(1, 0.02, 60) for b in np.geomspace(1, 0.02, 60)]
  by_force = min(error(x, a * x.min(), b * x.max(), False) for a, b in pairs)
  assert error(x, low, high, False) <= 1.05 * by_force


def test_outliers_are_cut_off_where_that_pays():
  x = np.random.default_rng(0).normal(size=(50000, 8))
  x[0, 0] = 100.0
  seen = inputs(x)
  assert calibrate.minmax(seen, True)[1] == 100
  for symmetric in (True, False):
    assert calibrate.mse(seen, symmetric)[1] < 70
    assert calibrate.percentile(seen, symmetric, 99.9)[1] < 5
  high = calibrate.mse(seen, False)[1]
  plain = error(x, x.min(), x.max(), False)
  assert error(x, *calibrate.mse(seen, False), False) < plain and high > 0


@given(st.floats(-1e4, 0), st.floats(0, 1e4))
def test_steps_cover_the_range_and_hold_zero(low, high):
  if high - low < 1e-6:
    return
  step, zero = calibrate.steps(low, high, False)
  assert -128 <= zero <= 127 and isinstance(zero, int)
  for end in (low, high):
    integer = np.clip(np.rint(end / step) + zero, -128, 127)
    assert abs((integer - zero) * step - end) <= step * (1 + 1e-6)
  if high > 1e-6:
    step, zero = calibrate.steps(-high, high, True)
    assert zero == 0 and np.rint(high / step) == 127


@pytest.mark.parametrize('ranges', calibrate.RANGES)
@pytest.mark.parametrize('symmetric', [True, False])
def test_groups_are_of_like_ranges_each_with_its_own(ranges, symmetric):
  seen = some(k=12)
  fields = calibrate.static(seen, ranges, groups=3, symmetric=symmetric)
  order, x = fields['order'], seen.rows
  spread = np.abs(x).max(0) if symmetric else x.max(0) - x.min(0)
  assert (np.diff(spread[order]) >= 0).all() and sorted(order) == list(range(12))
  assert order.dtype == np.int32 and fields['x_scale'].dtype == F
  for group in range(3):
    part = order[4 * group : 4 * group + 4]
    low, high = calibrate.RANGES[ranges](inputs(x[:, part]), symmetric)
    step, zero = calibrate.steps(low, high, symmetric)
    assert fields['x_scale'][group] == F(step)
    assert ('x_zero' in fields) != symmetric
    assert symmetric or fields['x_zero'][group] == zero
  alone = calibrate.static(seen, ranges, symmetric=symmetric)
  assert 'order' not in alone and alone['x_scale'].shape == (1,)


def test_inputs_without_a_range():
  x = some().rows.copy()
  x[:, :6] = 0
  fields = calibrate.static(inputs(x), groups=3)
  assert fields['x_scale'][0] == F(np.abs(x).max() / 127), 'the range of all inputs'
  for bad in (np.zeros((3, 4)), np.full((3, 4), 1e-36)):
    with pytest.raises(ValueError, match='inputs that range from'):
      calibrate.static(inputs(bad), groups=2)
  with pytest.raises(ValueError, match='12 inputs, which 5 groups'):
    calibrate.static(some(), groups=5)


@pytest.mark.parametrize('alpha', [0.3, 1.0])
def test_smoothing_moves_outliers_and_leaves_the_product(alpha):
  seen, w = some(), np.random.default_rng(1).normal(size=(12, 5)).astype(F)
  x = seen.rows.copy()
  x[:, 2], w[4] = 0, 0
  seen = inputs(x, 2 * x.T @ x)
  s = calibrate.smoothing(seen, w, alpha)
  for j in range(12):
    top, weight = np.abs(x[:, j]).max(), np.abs(w[j]).max()
    expected = top**alpha / weight ** (1 - alpha) if top and weight else 1
    assert s[j] == pytest.approx(expected, rel=1e-5)
  divided = seen.divided(s)
  np.testing.assert_allclose(divided.rows @ (w * s[:, None]), x @ w, rtol=1e-4, atol=1e-4)
  again = inputs(divided.rows)
  np.testing.assert_array_equal(again.low, divided.low)
  np.testing.assert_array_equal(again.high, divided.high)
  hessian = 2 * divided.rows.T.astype(np.float64) @ divided.rows
  np.testing.assert_allclose(divided.hessian, hessian, rtol=1e-3, atol=1e-4)
  index = np.array([3, 1, 7])
  np.testing.assert_array_equal(
    seen.picked(index).hessian, [[seen.hessian[i, j] for j in index] for i in index]
  )


@settings(deadline=None, max_examples=20)
@given(
  st.sampled_from(['int8', 'int4', 'nf4']), st.sampled_from([0, 4]), st.sampled_from([0, 1]),
  st.integers(0, 99),
)  # fmt: skip
def test_weight_ranges_of_the_least_error_by_brute_force(codes, block, axis, seed):
  rng = np.random.default_rng(seed)
  w = rng.standard_t(3, size=(8, 12)).astype(F)
  scale = calibrate.scales(w, codes, block, axis, 'mse')
  largest = calibrate.scales(w, codes, block, axis)
  np.testing.assert_array_equal(largest, qtensor.scales(w, codes, block, axis))
  levels = np.asarray(qtensor.NF4) if codes == 'nf4' else None
  size = block or w.shape[axis]
  for place, top in np.ndenumerate(largest):
    start = [place[0] * size, place[1]] if axis == 0 else [place[0], place[1] * size]
    part = w[start[0] : start[0] + size, start[1]] if axis == 0 else w[start[0]][start[1] :][:size]

    def off(scale, part=part):
      if levels is None:
        last = {'int8': 127, 'int4': 7}[codes]
        near = np.clip(np.rint(part / scale), -last, last) * scale
      else:
        near = levels[np.abs(part[:, None] / scale - levels).argmin(1)] * scale
      return np.sum((near - part) ** 2)

    best = min(off(top * (1 - 0.02 * i)) for i in range(31))
    assert off(scale[place]) <= best * (1 + 1e-4) + 1e-9
