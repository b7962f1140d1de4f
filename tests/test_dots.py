"""Products and dropout: values and gradients against plain jax.numpy, types, statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from efft import tree
from efft.models import dots
from efft.training import losses, step

B, T, S, H, K, N = 3, 5, 7, 2, 8, 6
SEED = jnp.array([123456789, 987654321], jnp.uint32)


def normal(seed, *shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def close(found, expected, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.float32(a), np.float32(b), rtol=tolerance, atol=tolerance
    ),
    found,
    expected,
  )


def with_gradients(fn, *args):
  """fn(*args) and the gradients of a sum of it that tells its elements apart."""
  y, pullback = jax.vjp(fn, *args)
  return y, pullback(normal(99, *y.shape).astype(y.dtype))


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_dot_general_is_einsum(dtype, tolerance):
  x, w = normal(0, B, T, K, dtype=dtype), normal(1, K, N)

  def ours(x, w):
    return dots.dot_general(x, w, (((2,), (0,)), ((), ())))

  def plain(x, w):
    return jnp.einsum('btk,kn->btn', x.astype(jnp.float32), w.astype(dtype).astype(jnp.float32))

  y, (dx, dw) = jax.jit(lambda x, w: with_gradients(ours, x, w))(x, w)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, dtype, jnp.float32)
  close((y, (dx, dw)), with_gradients(plain, x, w), tolerance)


@pytest.mark.parametrize('numbers', [(((1,), (0,)), ((), ())), (((2,), (1,)), ((), ()))])
def test_dot_general_refuses_other_contractions(numbers):
  with pytest.raises(ValueError, match='expected x'):
    dots.dot_general(normal(0, B, K, K), normal(1, K, K), numbers)


@pytest.mark.parametrize('rate', [0.0, 0.3])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_attend_is_softmax_attention(dtype, tolerance, rate):
  q, k, v = (normal(i, B, n, H, K, dtype=dtype) for i, n in enumerate((T, S, S)))
  seen = np.arange(S) < np.array([S, 4, 1])[:, None]
  bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)

  def ours(q, k, v):
    return dots.attend(q, k, v, bias, SEED if rate else None, rate)

  def plain(q, k, v):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum('bqhd,bkhd->bhqk', q, k) / np.sqrt(K)
    p = jax.nn.softmax(jnp.where(seen[:, None, None, :], scores, -jnp.inf))
    keep = dots.hash_bits(SEED, (B, H, T, S)) >= rate * 2**32
    return jnp.einsum('bhqk,bkhd->bqhd', jnp.where(keep, p / (1 - rate), 0.0), v)

  y, grads = jax.jit(lambda *a: with_gradients(ours, *a))(q, k, v)
  assert y.dtype == dtype and all(g.dtype == dtype for g in grads)
  close((y, grads), with_gradients(plain, q, k, v), tolerance)


def test_a_row_without_any_token_stays_finite():
  q, k, v = (normal(i, B, T, H, K) for i in range(3))
  bias = jnp.full((B, T), jnp.finfo(jnp.float32).min)
  out = with_gradients(lambda *a: dots.attend(*a, bias, None, 0.0), q, k, v)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))


def products(jaxpr):
  """(left, right, output) types of every dot_general in a jaxpr, inner ones included."""
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == 'dot_general':
      yield tuple(str(x.aval.dtype) for x in (*eqn.invars, *eqn.outvars))
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from products(inner)


@pytest.mark.parametrize('name', ['full', 'lora'])
def test_a_bfloat16_step_accumulates_every_product_in_float32(name):
  """Forward and backward; the pooler and the head alone multiply float32."""
  here = tiny.world(tiny.settings(name), dtype=jnp.bfloat16)
  opt = tiny.optimizer(here)
  take = step.make_step(here.logits, losses.single(), opt)
  state = step.init_state(here.trainable, opt, seed=0)
  traced = take.trace(state, step.cast_frozen(here.frozen, jnp.bfloat16), tiny.batch())
  found = list(products(traced.jaxpr.jaxpr))
  narrow, wide = ('bfloat16', 'bfloat16', 'float32'), ('float32',) * 3
  assert set(found) == {narrow, wide}
  if name == 'full':
    linears, attention, layers = 6 * 3, 2 * 3, 2  # each with its products for two gradients
    assert found.count(narrow) == layers * (linears + attention)
    assert found.count(wide) == 2 * 3


def test_dropout_rate_and_scale():
  for rate in (0.01, 0.1, 0.5, 0.9):
    n = 2**18
    x = normal(0, n, dtype=jnp.bfloat16)
    y = dots.drop(x, SEED, rate)
    dropped = np.asarray(y == 0)
    assert abs(dropped.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    assert y.dtype == x.dtype
    expected = (x[~dropped].astype(jnp.float32) / (1 - rate)).astype(jnp.bfloat16)
    close(y[~dropped], expected, 2**-8)
    # Rounded once: a factor that is itself rounded would shift all of them one way.
    ratio = np.float32(y[~dropped]) / np.float32(x[~dropped]) * (1 - rate)
    assert abs(ratio.mean() - 1) < 5e-4


def test_dropout_is_even_along_every_axis():
  """Each row and column of a matrix loses its share: no stripes from the index."""
  n, rate = 512, 0.1
  dropped = np.asarray(dots.drop(jnp.ones((n, n)), jnp.asarray(SEED, jnp.uint32), rate)) == 0
  for axis in (0, 1):
    share = dropped.mean(axis)
    assert np.abs(share - rate).max() < 5.5 * np.sqrt(rate * (1 - rate) / n)
    # The spread over rows is binomial too: neither clumped nor suspiciously level.
    assert 0.8 < share.var() / (rate * (1 - rate) / n) < 1.25


def test_a_rate_that_is_computed_with_drops_the_same():
  x, rates = normal(0, 4096), (0.0, 0.1, 0.25, 0.5)
  drop = jax.jit(jax.vmap(lambda rate: dots.drop(x, jnp.asarray(SEED, jnp.uint32), rate)))
  for row, rate in zip(drop(jnp.float32(rates)), rates, strict=True):
    close(row, dots.drop(x, jnp.asarray(SEED, jnp.uint32), rate), 1e-6)


def walsh(x):
  """The Walsh-Hadamard transform: for i -> i ^ c what the Fourier transform is for shifts."""
  h = 1
  while h < len(x):
    pairs = x.reshape(-1, 2, h)
    x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], 1).reshape(-1)
    h *= 2
  return x


def test_dropout_of_two_seeds_is_unrelated():
  """Not even up to a shift or an exclusive or of the index, both cheap ways to be the same mask.

  The seeds are such as the model draws, of successive steps: the hash alone does not separate
  seeds that differ in a few bits.
  """
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(24))
  seeds = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
  mask_of = jax.vmap(lambda seed: dots.hash_bits(seed, (2**16,)) < 0.1 * 2**32)

  def standardised(seeds):
    masks = np.asarray(mask_of(seeds))
    return (masks - masks.mean(1, keepdims=True)) / masks.std(1, keepdims=True)

  masks = standardised(seeds)
  count, n = masks.shape
  correlation = masks @ masks.T / n - np.eye(count)
  assert np.abs(correlation).max() < 5 / np.sqrt(n)
  # The same again for first halves that differ by little: the other half must set them apart.
  near = standardised(seeds.at[:, 0].set(jnp.arange(count, dtype=jnp.uint32) * 37))
  worst = 6.5 / np.sqrt(n)  # of n unrelated sums the largest is near 4.7
  for a, b in [*zip(masks[:4], masks[1:5], strict=True), *zip(near[:4], near[1:5], strict=True)]:
    shifted = np.fft.irfft(np.fft.rfft(a) * np.conj(np.fft.rfft(b)), n) / n
    assert np.abs(shifted).max() < worst
    assert np.abs(walsh(walsh(a) * walsh(b))).max() / n**2 < worst


def test_drop_without_seed_or_rate_is_nothing():
  x = normal(0, 4)
  assert dots.drop(x, None, 0.5) is x
  assert dots.drop(x, SEED, 0.0) is x


@pytest.mark.parametrize('shape', [(), (0, 3), (1,)])
def test_drop_takes_any_shape(shape):
  assert dots.drop(jnp.ones(shape), SEED, 0.5).shape == shape


def test_drop_under_vmap_and_remat():
  """The gradient draws the forward pass's mask again, whatever jax wraps around it."""
  x = normal(0, 4, 50)
  seeds = jax.random.bits(jax.random.key(0), (4, 2), jnp.uint32)

  def loss(x, seed):
    return jnp.sum(jnp.sin(dots.drop(x, seed, 0.4)))

  one_by_one = jnp.stack([jax.grad(loss)(a, s) for a, s in zip(x, seeds, strict=True)])
  kept = np.stack([np.asarray(dots.drop(jnp.ones(50), s, 0.4)) for s in seeds])
  np.testing.assert_array_equal(np.asarray(one_by_one) != 0, kept != 0)
  close(one_by_one, jnp.cos(x * kept) * kept, 1e-6)
  for form in (jax.grad(loss), jax.grad(jax.checkpoint(loss)), jax.checkpoint(jax.grad(loss))):
    close(jax.jit(jax.vmap(form))(x, seeds), one_by_one, 1e-6)


def test_attend_under_vmap_and_remat():
  q, k, v = (normal(i, 2, B, T, H, K) for i in range(3))
  bias, seeds = jnp.zeros((B, T)), jax.random.bits(jax.random.key(0), (2, 2), jnp.uint32)

  def loss(q, k, v, seed):
    return jnp.sum(jnp.sin(dots.attend(q, k, v, bias, seed, 0.2)))

  grad = jax.grad(loss, (0, 1, 2))
  expected = [grad(q[i], k[i], v[i], seeds[i]) for i in range(2)]
  for form in (grad, jax.grad(jax.checkpoint(loss), (0, 1, 2))):
    found = jax.jit(jax.vmap(form))(q, k, v, seeds)
    close([jax.tree.map(lambda g, i=i: g[i], found) for i in range(2)], expected, 1e-5)


def test_frozen_matrices_are_cast_once():
  here = tiny.world(tiny.settings('lora'))
  cast = tree.flatten(step.cast_frozen(here.frozen, jnp.bfloat16))
  narrow = {path for path, x in cast.items() if x.dtype == jnp.bfloat16}
  assert 'params/layer_0/mlp/up/kernel' in narrow and 'params/embed/word/embedding' in narrow
  assert not [p for p in narrow if p.endswith(('bias', 'scale')) or '/pooler/' in p]
