"""Operations and memory of programs: closed forms by hand, and what the compiler says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from efft import config, programs
from efft.models.encoder import Encoder
from efft.training import losses, step

B, T = 4, 12
CFG = dataclasses.replace(tiny.CFG, dropout=0.0, attention_dropout=0.0, head_dropout=0.0)


def forward(cfg=CFG, rows=B, length=T) -> int:
  """Multiplications and additions of BERT's matrix products, by its shapes."""
  tokens, products = rows * length, 0
  for heads, units in zip(cfg.heads, cfg.mlp, strict=True):
    products += 4 * tokens * cfg.hidden * heads * cfg.head_dim  # query, key, value, out
    products += 2 * rows * heads * length * length * cfg.head_dim  # scores, sums of values
    products += 2 * tokens * cfg.hidden * units
  return 2 * (products + rows * cfg.hidden * (cfg.hidden + cfg.num_labels))  # pooler, head


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def training(name: str, **options):
  """(jitted step, what it takes) of a method of the configs, without dropout."""
  here = tiny.world(config.resolve(config.load(f'configs/{name}.py:task=sst2')), CFG)
  optimizer = optax.sgd(1e-2)
  take = step.make_step(here.logits, losses.single(), optimizer, **options)
  state = step.init_state(here.trainable, optimizer, seed=0)
  return take, shapes((state, here.frozen, tiny.batch(B, T)))


def test_a_dense_layer():
  def dense(x, w, b):
    return jnp.tanh(x @ w + b)

  args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 256), (256, 512), (512,))]
  assert programs.operations(dense, *args) == (2 * 64 * 256 * 512, 2 * 64 * 512)
  compiled = jax.jit(dense).lower(*args).compile()
  found = compiled.cost_analysis()
  found = found[0] if isinstance(found, list) else found
  assert found['flops'] == pytest.approx(programs.flops(dense, *args), rel=0.01)
  numbers = 64 * 256 + 256 * 512 + 512
  # Besides the arguments a product may be held until its bias is there.
  assert 4 * numbers <= programs.memory(compiled) <= 4 * (numbers + 2 * 64 * 512)


@pytest.mark.parametrize('kind', [jnp.int8, jnp.bfloat16])
def test_products_count_in_any_type(kind):
  x, w = (jax.ShapeDtypeStruct(s, kind) for s in ((8, 16), (16, 4)))
  assert programs.flops(lambda x, w: jax.lax.dot(x, w, preferred_element_type=jnp.float32), x, w) \
    == 2 * 8 * 16 * 4  # fmt: skip


def test_an_encoder_s_products_and_what_its_compiler_counts():
  model = Encoder(CFG)
  batch = tiny.batch(B, T)
  args = shapes(({'params': tiny.params(CFG)}, batch['input_ids'], batch['mask']))
  found = programs.operations(model.apply, *args)
  assert found.products == forward()
  said = jax.jit(model.apply).lower(*args).compile().cost_analysis()
  said = said[0] if isinstance(said, list) else said
  assert forward() < said['flops'] < 1.5 * sum(found) and sum(found) < 1.5 * said['flops']


def test_a_full_step_is_three_forward_passes():
  take, args = training('full')
  assert programs.operations(take, *args).products == 3 * forward()


def test_gradients_that_nobody_wants_do_not_count():
  """A frozen encoder runs forward; of the head, the gradient of its own matrix is left."""
  take, args = training('head')
  own = 2 * B * CFG.hidden * CFG.num_labels
  assert programs.operations(take, *args).products == forward() + own


def test_a_scan_s_iterations_count():
  whole, cut = (training('full', accumulate=n) for n in (1, 4))
  assert programs.operations(cut[0], *cut[1]).products == 3 * forward()
  assert programs.operations(whole[0], *whole[1]).products == 3 * forward()


def test_of_branches_the_dearest_and_integers_none():
  def fn(x, i):
    y = jax.lax.cond(i > 0, lambda x: x @ x, lambda x: x + 1.0, x)
    return y, i * 3 + i

  x, i = jax.ShapeDtypeStruct((8, 8), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
  assert programs.operations(fn, x, i) == (2 * 8**3, 0)


def test_fourier_transforms():
  x = jax.ShapeDtypeStruct((3, 16), jnp.complex64)
  assert programs.operations(jnp.fft.fft, x) == (0, 5 * 3 * 16 * np.log2(16))
