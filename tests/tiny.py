"""The small world that tests share: an encoder of two layers, a batch, and what trains in it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efft import assemble, config, mesh, tree
from efft.models.encoder import Encoder, EncoderConfig, init_params
from efft.models.layers import Hooks
from efft.peft import base
from efft.training import losses, optim, prepare, step

CFG = EncoderConfig(
  architecture='bert',
  vocab_size=96,
  hidden=32,
  heads=(4, 4),
  head_dim=8,
  mlp=(48, 48),
  max_positions=24,
  token_types=2,
  embed_dim=32,
  num_labels=3,
)
# Compiling is what tests wait for, and training steps take longest: one layer where that will do.
SHORT = dataclasses.replace(CFG, heads=CFG.heads[:1], mlp=CFG.mlp[:1])


class World(NamedTuple):
  """A model with its deltas, and its variables cut into what trains and what does not."""

  model: Encoder
  deltas: dict
  variables: dict
  groups: dict
  trainable: Any
  frozen: Any
  transforms: dict = {}

  def logits(self, variables, batch, rngs=None):
    def grow(delta, key):
      return base.expand(self.deltas, delta, key)

    return step.forward(self.model, grow)(variables, batch, rngs)

  @property
  def penalty(self):
    if not base.has(self.deltas, 'penalty'):
      return None
    return lambda variables: base.penalty(self.deltas, variables['delta'])


def params(cfg: EncoderConfig = CFG, seed: int = 0) -> dict:
  """Weights that pass signals on; at their usual start biases and scales would go unseen."""
  rng = np.random.default_rng(seed)

  def draw(path, x):
    spread = x.shape[0] ** -0.5 if path.endswith('/kernel') else 0.2
    centre = 1.0 if path.endswith('/scale') else 0.0
    return jnp.asarray(rng.normal(centre, spread, x.shape), jnp.float32)

  return tree.map_paths(draw, jax.eval_shape(lambda k: init_params(cfg, k), jax.random.key(0)))


def batch(rows: int = 8, length: int = 12, seed: int = 0, cfg: EncoderConfig = CFG) -> dict:
  """Rows of 3 to `length` tokens, one of them of full length, each in two segments."""
  rng = np.random.default_rng(seed)
  lengths = np.r_[length, rng.integers(3, length, rows - 1)]
  mask = np.arange(length) < lengths[:, None]
  ids = rng.integers(1, cfg.vocab_size, (rows, length))
  return {
    'input_ids': np.where(mask, ids, cfg.pad_id).astype(np.int32),
    'mask': mask,
    'token_types': (mask & (np.arange(length) >= lengths[:, None] // 2)).astype(np.int32),
    'labels': rng.integers(0, cfg.num_labels, rows).astype(np.int32),
    'weights': np.ones(rows, np.float32),
  }


def settings(name: str = 'lora', **options) -> dict:
  """The resolved config of configs/<name>.py, with other options of its method."""
  resolved = config.resolve(config.load(f'configs/{name}.py:task=sst2'))
  if options:
    (method,) = resolved['method'].values()
    method.update(options)
  return resolved


def world(resolved: dict, cfg: EncoderConfig = CFG, **fields) -> World:
  """The encoder with the method and rules of a resolved config; `fields` are the Encoder's."""
  deltas = base.build(resolved['method'])
  model = Encoder(cfg, Hooks(tap=base.attach(deltas)), **fields)
  variables = {'params': params(cfg)}
  if deltas:
    looked_at = batch(length=16, cfg=cfg)
    delta = base.init(model, deltas, variables['params'], jax.random.key(1), looked_at)
    variables = {'params': base.rebase(deltas, variables['params'], delta), 'delta': delta}
  parts = assemble.partition(variables, resolved['rules'])
  groups = resolved.get('optim', {}).get('groups', {})
  transforms = {
    group: {'transform': fields['transform']}
    for group, fields in groups.items()
    if 'transform' in fields
  }
  return World(model, deltas, variables, parts.groups, parts.trainable, parts.frozen, transforms)


class Feed:
  """Training batches of the small world."""

  def __init__(self, cfg: EncoderConfig = CFG, rows: int = 8):
    self.cfg, self.rows = cfg, rows

  def batch(self, index: int) -> dict:
    return batch(self.rows, seed=index, cfg=self.cfg)


def prepared(
  here: World, fields: dict, steps: int = 100, examples: int = 16, seed: int = 0
) -> dict:
  """What the transforms of `fields`, the config's 'optim', find out on that feed."""
  return prepare.prepare(
    fields, here.groups, here.trainable, here.frozen,
    logits=here.logits, loss=losses.single(),
    make_step=lambda optimizer: step.make_step(here.logits, losses.single(), optimizer),
    batches=Feed(here.model.cfg), put=lambda rows: rows, examples=examples, steps=steps, seed=seed,
  )  # fmt: skip


def optimizer(here: World, steps: int = 100, **options):
  """AdamW over what trains, with the world's transforms and the config's own defaults but for
  `options`."""
  fields = config.resolve(config.default('task=sst2'))['optim']
  fields |= {'groups': here.transforms} | options
  return optim.optimizer(fields, here.groups, steps, prepared(here, fields, steps))


def losses_on(devices: mesh.Mesh, steps: int = 4) -> list[float]:
  """Losses of a short LoRA run with dropout on a mesh: the same numbers on every mesh."""
  here = world(settings('lora', dropout=0.1), SHORT)
  opt = optimizer(here, lr=1e-2)
  state = mesh.replicate(step.init_state(here.trainable, opt, seed=3, ema=0.9), devices)
  frozen = mesh.place(here.frozen, devices)
  take = step.make_step(here.logits, losses.single(), opt, accumulate=2, ema=0.9)
  found = []
  for i in range(steps):
    rows = mesh.put_batch(batch(rows=14, seed=i), devices, multiple=2)
    state, metrics = take(state, frozen, rows)
    found.append(float(mesh.gather(metrics['loss'])))
  return found
