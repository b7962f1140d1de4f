"""From a config, its data and its checkpoint to the functions and arrays that a run uses."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efft import bundle, files, quantize, starting, transfer, tree
from efft import config as configs
from efft.data import batches, packages, sources, tokens
from efft.data.splits import digest
from efft.errors import InputError
from efft.models import hub
from efft.models.encoder import Encoder, EncoderConfig
from efft.models.layers import Hooks
from efft.peft import base as peft
from efft.peft import transform
from efft.qtensor import QTensor
from efft.training import step

DATA = 'data.json'  # of a run folder: {split: sha256}
BASE = 'base.json'  # of a run folder: {model or run that it starts or learns from: sha256}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Network:
  """An encoder with its deltas attached, as plain functions.

  Attributes:
    model: the linen module.
    deltas: the named deltas on its tap.
    logits: (variables, batch, rngs=None) -> float32 [B, C].
    penalty: (variables) -> what the deltas add to the loss; None where they add nothing.
  """

  model: Encoder
  deltas: Mapping[str, Any]
  logits: Callable
  penalty: Callable | None = None


def network(cfg: EncoderConfig, method: Mapping, dtype: str, remat: bool = False) -> Network:
  """The network of a config's `method` section; see `efft.peft.base.build`."""
  deltas = peft.build(method)
  model = Encoder(cfg, Hooks(tap=peft.attach(deltas)), DTYPES[dtype], remat)
  logits = step.forward(model, lambda delta, key: peft.expand(deltas, delta, key))
  if not peft.has(deltas, 'penalty'):
    return Network(model, deltas, logits)
  return Network(model, deltas, logits, lambda values: peft.penalty(deltas, values['delta']))


def variables(
  net: Network,
  params: Mapping,
  key,
  encoded: tokens.Encoded | None = None,
  inherit: Callable = lambda values: values,
  forms=(),
) -> dict:
  """{'params': ..., 'delta': ...} at the start of training; no 'delta' where there is none.

  Args:
    net: of `network`.
    params: the checkpoint's.
    key: of the deltas' random numbers.
    encoded: the training split, which some deltas look at.
    inherit: from these variables to those with what other runs have trained.
    forms: config.model.quantize. Deltas begin beside the quantised weights, but for those that take
      a part of the weights over: what they leave is quantised.
  """
  takes_over = peft.has(net.deltas, 'rebase')
  if takes_over and quantize.held({'params': params}):
    raise InputError(
      'config.model.name', 'quantised matrices', f'float ones, of which {", ".join(net.deltas)} '
      'takes over a part', 'start from the float model, with config.model.quantize',
    )  # fmt: skip
  if not takes_over:
    params = quantize.quantized({'params': params}, forms)['params']
  wanted = peft.examples(net.deltas)
  batch = batches.Batches(encoded, wanted, seed=0).batch(0) if wanted else None
  delta = peft.init(net.model, net.deltas, params, key, batch)
  values = inherit({'params': params, 'delta': delta} if delta else {'params': params})
  if not takes_over:
    return values
  params = peft.rebase(net.deltas, values['params'], values['delta'])
  return quantize.quantized({**values, 'params': params}, forms)


def own_task(run: Path, labels: Sequence[str]) -> sources.Dataset | None:
  """The data set of a run folder whose head has these labels; None where the run has no task.

  Raises InputError where the data has other labels by now, or other texts to train on: a file that
  has grown is carved anew, and what was trained on would be among what is scored.
  """
  file = Path(run) / 'config.json'
  if not file.exists():
    return None
  config = files.read_json(file)
  data = sources.load(**config['task'], seed=config['seed'])
  if data.labels != tuple(labels):
    raise InputError(
      str(run), f'the labels {", ".join(data.labels)} in the data', ', '.join(labels),
      'restore the data that the run was trained on',
    )  # fmt: skip
  known = _known(Path(run), DATA)
  if 'train' in known:
    _unchanged(run, known, {'train': digest({'train': data.splits['train']})}, ' data')
  return data


def keep_start(run: Path, job: 'Job') -> None:
  """Writes down what a run begins on; InputError where it was begun on something else.

  That is its data, the base model, and the runs that it starts or learns from.
  """
  data = {name: digest({name: split}) for name, split in job.data.splits.items()}
  runs = [*job.config['model']['init_from'], job.config['distil']['teacher']]
  base = {other: bundle.identity(other) for other in filter(None, runs)}
  base[job.base.name] = job.base.sha256
  # A test split may come later: nothing hangs on it.
  now = {name: data[name] for name in ('train', 'validation')}
  _unchanged(run, _known(run, DATA), now, ' data')
  _unchanged(run, _known(run, BASE), base)
  files.write_json(run / DATA, data)
  files.write_json(run / BASE, base)


def _known(run: Path, name: str) -> dict[str, str]:
  return files.read_json(run / name) if (run / name).exists() else {}


def _unchanged(run, known: Mapping[str, str], now: Mapping[str, str], kind: str = '') -> None:
  """Raises InputError where something is not what it was when the run began."""
  for name, found in now.items():
    if found != known.get(name, found):
      raise InputError(
        f'{run}, {name}{kind}', f'sha256 {found[:12]}',
        f'{known[name][:12]}, as when the run began',
        'restore it; or train on what there is now, into another --workdir',
      )  # fmt: skip


def with_dropout(cfg: EncoderConfig, rate: float | None) -> EncoderConfig:
  """One rate for all of the encoder's dropout; None keeps the checkpoint's own."""
  if rate is None:
    return cfg
  return dataclasses.replace(cfg, dropout=rate, attention_dropout=rate, head_dropout=rate)


def _at_mean(params: Mapping, labels: np.ndarray) -> dict:
  """A new head for numbers begins by answering with their mean, where transformers' answers 0.

  Otherwise the first steps drive all that trains towards that one number, and many a run with a
  small learning rate or few steps is still there at its end (README, "Measured").
  """

  def start(path, x):
    return np.full_like(x, labels.mean()) if path == 'head/out/bias' else x

  return tree.map_paths(start, params)


def check_length(cfg: EncoderConfig, max_length: int) -> None:
  if max_length > cfg.max_length:
    raise InputError(
      'config.model.max_length',
      max_length,
      f'at most {cfg.max_length}, the positions of this encoder',
      f'pass --config.model.max_length={cfg.max_length}',
    )


def check_end(config: Mapping, where: str = 'config') -> None:
  """Refuses to hand on, or to stop at, a step before the schedule of a transform is at its end.

  An earlier evaluation, of an encoder that has lost less, is often the better one. An average over
  the steps still has what has been taken away meanwhile.
  """
  changes = transform.build(config['optim'])
  for group, change in changes.items():
    if config['optim']['ema'] is not None and (change.scheduled or change.outside == 'zero'):
      raise InputError(
        f'{where}.optim.ema', config['optim']['ema'],
        f'None, because the transform of group {group} takes numbers away, which an average over '
        'the steps keeps', 'leave it out, or leave out the transform',
      )  # fmt: skip
  groups = [group for group, change in changes.items() if change.scheduled]
  for field, needed in (('save', 'last'), ('patience', None)):
    if groups and (found := config['train'][field]) != needed:
      raise InputError(
        f'{where}.train.{field}', repr(found),
        f'{needed!r}, because group {groups[0]} is on a schedule to the end of the run',
        f'set it to {needed!r}, or leave out the transform',
      )  # fmt: skip


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
  """Rules -> labels -> what trains and what does not; integers never do.

  Raises InputError for rules as `tree.labels`, and for those that train a quantised matrix.
  """
  groups, flat = tree.labels(values, rules), tree.flatten(values)
  for path, group in groups.items():
    if group != 'frozen' and isinstance(flat[path], QTensor):
      raise InputError(
        'config.rules', f'{path} in group {group!r}, and held in {flat[path].codes}',
        "'frozen' for what is quantised", 'train a delta beside it, or leave model.quantize empty',
      )  # fmt: skip
  groups = {
    path: group
    for path, group in groups.items()
    if group != 'frozen' and jnp.issubdtype(flat[path].dtype, jnp.floating)
  }
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
  check_end(config)
  task, model = config['task'], config['model']
  data = sources.load(**task, seed=config['seed'])
  head_key, delta_key = jax.random.split(jax.random.key(config['seed']))
  found = starting.start(
    model['name'],
    num_labels=data.num_labels,
    labels=data.labels,
    pooling=model['pooling'],
    head='new' if model['init_from'] else model['head'],
    key=head_key,
  )
  base = found.base
  if data.kind == 'regression' and (model['init_from'] or model['head'] == 'new'):
    base = dataclasses.replace(base, params=_at_mean(base.params, data.splits['train'].labels))
  base = dataclasses.replace(base, cfg=with_dropout(base.cfg, model['dropout']))
  check_length(base.cfg, model['max_length'])
  tokenizer = hub.tokenizer(base.folder, base.cfg.vocab_size)
  net = network(base.cfg, config['method'], model['dtype'], model['remat'])
  cache = packages.cache_root() / 'tokens'
  encoded = {
    name: tokens.encode(split, tokenizer, model['max_length'], cache)
    for name, split in data.splits.items()
  }

  def inherit(values):
    if not model['init_from']:
      return values
    return transfer.inherit(
      values, model['init_from'],
      method=config['method'], params=base.params, sha256=base.sha256,
      trains=partition(values, config['rules']).groups, weights=model['init_weights'],
      head=data.labels if model['head'] == 'keep' else None, pooling=base.cfg.pooling,
    )  # fmt: skip

  values = variables(net, base.params, delta_key, encoded['train'], inherit, model['quantize'])
  if delta := starting.taken_over(found, net.deltas, config['method'], values.get('delta', {})):
    values = {**values, 'delta': delta}
  if net.deltas:
    # What a method adds to the longest text has to fit too; better now than at its batch.
    longest = jax.ShapeDtypeStruct((1, model['max_length']), jnp.int32)
    jax.eval_shape(net.logits, values, dict.fromkeys(('input_ids', 'mask', 'token_types'), longest))
  parts = partition(values, config['rules'])
  return Job(config, data, encoded, base, tokenizer, net, values, parts)
