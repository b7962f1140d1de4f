"""Simulated quantisers against explicit loops, and what grouping dimensions is worth."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from efft.errors import InputError
from efft.models import quantized
from efft.models.encoder import Encoder
from efft.peft import activations, base
from efft.peft.activations import Grid
from efft.peft.base import Site

D = 10
rng = np.random.default_rng(0)
MASK = np.arange(6) < np.array([[6], [4]])


def planted(seed=0, size=D):
  """[2, 6, D]: two dimensions are thirty times as large as the others; padding is larger still."""
  v = np.random.default_rng(seed).normal(size=(2, 6, size)).astype(np.float32)
  v[..., [3, 7]] = 30 * v[..., [3, 7]] - 10
  v[~MASK] *= 100
  return v


def by_hand(v, bits, groups, permute, symmetric):
  """(v^, steps, zeros, group of each dimension), number by number in float64."""
  low_end, top = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
  low_end = -top if symmetric else low_end
  real = np.float64(v)[MASK]
  lows = [min(0.0, *real[:, d]) for d in range(v.shape[-1])]
  highs = [max(0.0, *real[:, d]) for d in range(v.shape[-1])]
  spread = [max(-a, b) if symmetric else b - a for a, b in zip(lows, highs, strict=True)]
  order = sorted(range(len(spread)), key=lambda d: spread[d]) if permute else range(len(spread))
  group = np.zeros(len(spread), int)
  for place, d in enumerate(order):
    group[d] = place * groups // len(spread)
  steps, zeros = [], []
  for g in range(groups):
    low = min(lows[d] for d in range(len(spread)) if group[d] == g)
    high = max(highs[d] for d in range(len(spread)) if group[d] == g)
    if symmetric:
      steps.append(max(-low, high) / top)
      zeros.append(0)
    else:
      steps.append((high - low) / (top - low_end))
      zeros.append(int(np.clip(np.rint(low_end - low / steps[-1]), low_end, top)))
  out = np.zeros(v.shape)
  for place in np.ndindex(*v.shape):
    s, z = steps[group[place[-1]]], zeros[group[place[-1]]]
    out[place] = s * (np.clip(np.rint(np.float64(v[place]) / s) + z, low_end, top) - z)
  return out, steps, zeros, group


@pytest.mark.parametrize('symmetric', [False, True])
@pytest.mark.parametrize(
  ('bits', 'groups', 'permute'),
  [(8, 1, True), (8, 5, True), (4, 5, False), (8, 3, True), (16, 1, True)],
)
def test_a_grid_is_the_formulas(bits, groups, permute, symmetric):
  v = planted()
  grid = Grid(bits, groups, permute, symmetric)
  p = grid.calibrated('x', jnp.asarray(v), jnp.asarray(MASK))
  wanted, steps, zeros, group = by_hand(v, bits, groups, permute, symmetric)
  np.testing.assert_allclose(p['x_scale'], steps, rtol=1e-5)
  np.testing.assert_array_equal(p['x_zero'], zeros)
  assert p['x_zero'].dtype == jnp.int32 and ('x_group' in p) == (groups > 1)
  if groups > 1:
    np.testing.assert_array_equal(p['x_group'], group)
    sizes = np.bincount(group)
    assert sizes.max() - sizes.min() <= 1
  found = grid.rounded('x', p, jnp.asarray(v))
  # A number between two integers may fall on either side in float32.
  step = np.asarray(steps)[group]
  off = np.abs(np.asarray(found, np.float64) - wanted) / step
  assert ((off < 0.02) | (np.abs(off - 1) < 0.02)).all() and (off > 0.5).mean() < 0.02


def test_integers_are_those_of_the_int8_product():
  v = jnp.asarray(planted())
  p = Grid().calibrated('x', v, jnp.asarray(MASK))
  whole, step = Grid().integers('x', p, v)
  expected = quantized.static(v, p['x_scale'][0], p['x_zero'][0]).astype(jnp.float32)
  np.testing.assert_array_equal(whole + p['x_zero'][0], expected)
  np.testing.assert_array_equal(whole * step, Grid().rounded('x', p, v))


USUAL = [0, 1, 2, 4, 5, 6, 8, 9]


def error(grid, v, dims=slice(None)):
  p = grid.calibrated('x', jnp.asarray(v), jnp.asarray(MASK))
  off = np.asarray(grid.rounded('x', p, jnp.asarray(v))) - v
  return float(np.square(off)[MASK][:, dims].mean())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_groups_by_range_beat_one_range_and_groups_as_they_come(seed):
  v = planted(seed)
  one, five, unsorted = (error(Grid(4, *g), v, USUAL) for g in ((1,), (5,), (5, False)))
  assert five < unsorted < one
  assert error(Grid(16), v) < 1e-3 * five
  for groups in (1, 5):
    least = error(Grid(4, groups, ranges='mse'), v)
    assert least <= 1.001 * error(Grid(4, groups), v)


def test_features_of_heads_and_inputs_without_tokens():
  """[B, T, H, K] is grouped over H K features, and [B, D] has no axis of tokens."""
  v = planted(size=12)
  flat = Grid(8, 3)
  p = flat.calibrated('x', jnp.asarray(v), jnp.asarray(MASK))
  heads = flat.calibrated('x', jnp.asarray(v.reshape(2, 6, 3, 4)), jnp.asarray(MASK))
  jax.tree.map(np.testing.assert_array_equal, p, heads)
  found = flat.rounded('x', p, jnp.asarray(v.reshape(2, 6, 3, 4)))
  np.testing.assert_array_equal(found.reshape(v.shape), flat.rounded('x', p, jnp.asarray(v)))
  rows = v[MASK]
  again = flat.calibrated('x', jnp.asarray(rows))
  jax.tree.map(np.testing.assert_array_equal, p, again)
  np.testing.assert_array_equal(
    flat.rounded('x', p, jnp.asarray(rows)), np.asarray(flat.rounded('x', p, jnp.asarray(v)))[MASK]
  )


def test_a_group_of_zeros_gets_the_range_of_all():
  v = planted()
  v[..., [0, 1]] = 0
  p = Grid(8, 5).calibrated('x', jnp.asarray(v), jnp.asarray(MASK))
  assert p['x_group'][0] == p['x_group'][1] == 0
  whole = Grid().calibrated('x', jnp.asarray(v), jnp.asarray(MASK))
  np.testing.assert_allclose(p['x_scale'][0], whole['x_scale'][0], rtol=1e-6)


X, H = (jnp.asarray(planted(seed)) for seed in (1, 2))
W = jnp.asarray(rng.normal(size=(D, 4)), jnp.float32)


def residual(**options):
  place = Site('layer_0/mlp_out', H, x=X, norm=lambda x: x, mask=jnp.asarray(MASK))
  delta = activations.activations('residual', **options)
  return delta, delta.init(None, place), place


def test_a_residual_is_what_the_norm_sees():
  """x + what is returned = the rounded sum of x and h, rounded each."""
  delta, p, place = residual(groups=5)
  grid = Grid(8, 5)
  p_x, p_h, p_y = (grid.calibrated('v', v, jnp.asarray(MASK)) for v in (X, H, X + H))
  both = grid.rounded('v', p_x, X) + grid.rounded('v', p_h, H)
  np.testing.assert_allclose(
    X + delta.apply(p, place), grid.rounded('v', p_y, both), rtol=1e-5, atol=2e-4
  )


def test_gradients_pass_straight_through():
  """Within ranges; padding, which is a hundred times as large, is cut off."""
  delta, p, place = residual(groups=5)
  pull = jax.jit(
    jax.grad(lambda x, h: jnp.sum(x + delta.apply(p, place._replace(x=x, y=h))), (0, 1))
  )
  for slope in map(np.asarray, pull(X, H)):
    np.testing.assert_allclose(slope, np.rint(slope), atol=1e-5)
    assert (slope[MASK] > 0.5).mean() > 0.8 and slope.max() < 1.5
    assert (slope[~MASK] == 0).mean() > 0.5


def test_what_groups_are_worth_where_residuals_meet():
  """One range of 8 bits is the worst of the three; 16 bits are the best."""
  wanted = np.asarray(X + H)[MASK]

  def off(**options):
    delta, p, place = residual(**options)
    found = np.asarray(X + delta.apply(p, place))[MASK]
    return np.square(found - wanted)[:, USUAL].mean()

  assert 100 * off(bits=16) < 10 * off(groups=5) < off()


@pytest.mark.parametrize('groups', [1, 5])
def test_inputs_and_values(groups):
  place = Site(
    'layer_0/mlp/up/matmul', base.product(X, W), x=X, w=W, mask=jnp.asarray(MASK),
    contract=base.product,
  )  # fmt: skip
  grid = Grid(8, groups)
  delta = activations.activations('inputs', groups=groups)
  expected = grid.rounded('x', grid.calibrated('x', X, jnp.asarray(MASK)), X) @ W
  found = delta.apply(delta.init(None, place), place)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
  delta = activations.activations('value', bits=4)
  expected = Grid(4).rounded('y', Grid(4).calibrated('y', place.y, jnp.asarray(MASK)), place.y)
  np.testing.assert_array_equal(delta.apply(delta.init(None, place), place), expected)


def test_all_linears_and_residuals_are_rounded_once():
  parts = activations.w8a8(groups=6)
  found = base.sites(Encoder(tiny.CFG), tiny.params())
  for path in found:
    wanted = path.endswith(('/matmul', '_out', 'embed/words')) and not path.startswith('head/')
    assert sum(bool(re.fullmatch(part.at, path)) for part in parts) == wanted, path


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'bits': 1}, 'bits 1'),
    ({'bits': 17}, 'bits 17'),
    ({'groups': 0}, 'groups 0'),
    ({'ranges': 'max'}, "ranges 'max'"),
    ({'what': 'outputs'}, "what 'outputs'"),
    ({'examples': 0}, 'examples 0'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': {'fn': 'activations.activations', **options}})


def test_sites_that_do_not_fit_are_refused():
  many = Site('layer_0/attention/kv', (X, X, MASK), x=X)
  with pytest.raises(ValueError, match='several values'):
    activations.activations('value').init(None, many)
  with pytest.raises(ValueError, match='no residual'):
    activations.activations('residual').init(None, Site('layer_0/output', X))
  with pytest.raises(ValueError, match='11 groups'):
    Grid(groups=11).calibrated('x', X)
