"""From a config, its data and its checkpoint to the functions and arrays that a run uses."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from efft import config as configs
from efft import tree
from efft.data import packages, sources, tokens
from efft.errors import InputError
from efft.models import hub
from efft.models.encoder import Encoder, EncoderConfig
from efft.models.layers import Hooks
from efft.peft import base as peft
from efft.training import step

DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Network:
  """An encoder with its deltas attached, as plain functions.

  Attributes:
    model: the linen module.
    deltas: the named deltas on its tap.
    logits: (variables, batch, rngs=None) -> float32 [B, C].
  """

  model: Encoder
  deltas: Mapping[str, Any]
  logits: Callable


def network(cfg: EncoderConfig, method: Mapping, dtype: str, remat: bool = False) -> Network:
  """The network of a config's `method` section; see `efft.peft.base.build`."""
  deltas = peft.build(method)
  model = Encoder(cfg, Hooks(tap=peft.attach(deltas)), DTYPES[dtype], remat)
  return Network(model, deltas, step.forward(model, lambda delta: peft.expand(deltas, delta)))


def variables(net: Network, params: Mapping, key) -> dict:
  """{'params': ..., 'delta': ...} at the start of training; no 'delta' where there is none."""
  delta = peft.init(net.model, net.deltas, params, key)
  return {'params': params, 'delta': delta} if delta else {'params': params}


def with_dropout(cfg: EncoderConfig, rate: float | None) -> EncoderConfig:
  """One rate for all of the encoder's dropout; None keeps the checkpoint's own."""
  if rate is None:
    return cfg
  return dataclasses.replace(cfg, dropout=rate, attention_dropout=rate, head_dropout=rate)


def check_length(cfg: EncoderConfig, max_length: int) -> None:
  if max_length > cfg.max_length:
    raise InputError(
      'config.model.max_length',
      max_length,
      f'at most {cfg.max_length}, the positions of this encoder',
      f'pass --config.model.max_length={cfg.max_length}',
    )


@dataclasses.dataclass(frozen=True)
class Partition:
  """Variables cut by the rules.

  Attributes:
    trainable, frozen: disjoint nested dictionaries.
    groups: {path: group} of the trainable leaves.
  """

  trainable: dict
  frozen: dict
  groups: dict[str, str]


def partition(values: Mapping, rules) -> Partition:
  """Rules -> labels -> what trains and what does not."""
  groups = tree.labels(values, rules)
  groups = {path: group for path, group in groups.items() if group != 'frozen'}
  trainable, frozen = tree.split(values, groups.__contains__)
  return Partition(trainable, frozen, groups)


@dataclasses.dataclass(frozen=True)
class Job:
  """A config with its data and model read, before anything is placed on a device."""

  config: dict
  data: sources.Dataset
  encoded: dict[str, tokens.Encoded]
  base: hub.Base
  tokenizer: object
  net: Network
  variables: dict
  parts: Partition


def prepare(config) -> Job:
  """Reads data and checkpoint of a config and checks all that can be checked without training."""
  config = configs.resolve(config)
  task, model = config['task'], config['model']
  data = sources.load(**task, seed=config['seed'])
  head_key, delta_key = jax.random.split(jax.random.key(config['seed']))
  base = hub.load(
    model['name'],
    num_labels=data.num_labels,
    pooling=model['pooling'],
    head=model['head'],
    key=head_key,
  )
  base = dataclasses.replace(base, cfg=with_dropout(base.cfg, model['dropout']))
  check_length(base.cfg, model['max_length'])
  tokenizer = hub.tokenizer(base.folder, base.cfg.vocab_size)
  net = network(base.cfg, config['method'], model['dtype'], model['remat'])
  values = variables(net, base.params, delta_key)
  parts = partition(values, config['rules'])
  cache = packages.cache_root() / 'tokens'
  encoded = {
    name: tokens.encode(split, tokenizer, model['max_length'], cache)
    for name, split in data.splits.items()
  }
  return Job(config, data, encoded, base, tokenizer, net, values, parts)


def handed_on(weights: Mapping, frozen: Mapping) -> dict:
  """{path: array} of what a bundle must hold: all that trained, all deltas, the head."""
  kept = {
    path: x
    for path, x in tree.flatten(frozen).items()
    if path.startswith(('delta/', 'params/head/'))
  }
  return {path: jax.device_get(x) for path, x in {**tree.flatten(weights), **kept}.items()}
