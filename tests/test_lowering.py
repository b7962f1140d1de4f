"""The training step and the forward pass lower for devices that are not here."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from efft.training import losses, step


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_step_and_forward_lower(platform):
  here = tiny.world(tiny.settings('lora', dropout=0.1), tiny.SHORT, dtype=jnp.bfloat16)
  frozen = step.cast_frozen(here.frozen, jnp.bfloat16)
  optimizer = tiny.optimizer(here)
  state = step.init_state(here.trainable, optimizer, seed=0)
  take = step.make_step(here.logits, losses.single(), optimizer)
  batch = tiny.batch()
  exported = jax.export.export(take, platforms=[platform])(state, frozen, batch)
  assert exported.platforms == (platform,) and exported.nr_devices == 1
  forward = jax.export.export(jax.jit(here.logits), platforms=[platform])
  assert forward(here.variables, batch).out_avals[0].dtype == jnp.float32
