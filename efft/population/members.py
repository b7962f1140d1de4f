"""Who trains together: what members may differ in, and what they share."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efft import assemble, finetune, tree
from efft import config as configs
from efft.alike import VARIES, common, numbers
from efft.assemble import Job
from efft.data import batches
from efft.errors import InputError
from efft.training import loop

RATES = ('dropout', 'attention_dropout', 'head_dropout')
_WHERE, _FIX = 'population', 'train it by itself'


@dataclasses.dataclass
class Member:
  """A run among others.

  Attributes:
    job, workdir, feed: its data and model, its run folder, its batches.
    numbers: {field: float}, in which members differ; 'rate.dropout' and the like are the encoder's.
    memo: what it remembers of its evaluations.
    state: what trains, between the times that it has a place on the device.
    best: (weights to hand on, the step that they are of).
    sinks: where its records go.
    ended: ('', step) of its end, ('diverged', step), ('stopped', step) by a rung; None before.
  """

  job: Job
  workdir: Path
  feed: batches.Batches
  numbers: dict[str, float] = dataclasses.field(default_factory=dict)
  memo: loop.Memo = dataclasses.field(default_factory=loop.Memo)
  state: Any = None
  best: Any = None
  sinks: list = dataclasses.field(default_factory=list)
  ended: tuple[str, int] | None = None

  @property
  def config(self) -> dict:
    return self.job.config

  @property
  def labels(self) -> int:
    return self.job.base.cfg.num_labels


def gather(resolved: Sequence[dict], workdirs: Sequence[Path]) -> list[Member]:
  """Reads data and models of configs; what is frozen and equal in all is kept once.

  Raises:
    InputError: configs that cannot train together.
  """
  _check(resolved, workdirs)
  members = []
  for config, workdir in zip(resolved, workdirs, strict=True):
    job = assemble.prepare(config)
    feed, total, every = finetune.course(job)
    if members:
      first = members[0].job
      if job.data.kind != first.data.kind:
        found = f'{workdir} of kind {job.data.kind}'
        raise InputError(_WHERE, found, f'{first.data.kind}, as the others', _FIX)
      if (total, every) != finetune.course(first)[1:]:
        found = f'{workdir} of {total} steps, evaluated every {every}'
        raise InputError(_WHERE, found, 'one length', 'set train.steps and train.eval_steps')
      job = _sharing(job, first)
    members.append(Member(job, workdir, feed))
  heads = sorted({m.labels for m in members})
  options = members[0].config['train']
  even = members[0].job.data.kind == 'single'
  even = even and not (options['label_smoothing'] or options['consistency'])
  if len(heads) > 1 and not even:
    found = f'heads of {", ".join(map(str, heads))} outputs'
    expected = 'one size, but for classes without label smoothing and consistency'
    raise InputError(_WHERE, found, expected, _FIX)
  rows, pieces = options['batch_size'], options['accumulate']
  if rows % pieces:
    found = f'train.accumulate={pieces} of batches of {rows}'
    raise InputError(
      _WHERE, found, 'pieces of one size', 'set train.accumulate, or train one by one'
    )
  _differences(members)
  if _whole_leaves(members[0].config['optim']) and len({*map(_sizes, members)}) > 1:
    found = 'ranks or heads of several sizes with adafactor, which scales by whole matrices'
    raise InputError(_WHERE, found, 'adamw or lion, or one size', _FIX)
  return members


def _whole_leaves(options: Mapping) -> bool:
  groups = options['groups'].values()
  return 'adafactor' in {options['name'], *(group.get('name') for group in groups)}


def _sizes(m: Member) -> tuple:
  return tuple(sorted((p, np.shape(x)) for p, x in tree.flatten(m.job.parts.trainable).items()))


def _check(resolved: Sequence[dict], workdirs: Sequence[Path]) -> None:
  shared = [common(config) for config in resolved]
  for own, workdir in zip(shared, workdirs, strict=True):
    if own is None:
      found = f'{workdir} with stages, a teacher, a transform or several hosts'
      raise InputError(_WHERE, found, 'plain runs', _FIX)
    if own != shared[0]:
      name = next(n for n in sorted({*own, *shared[0]}) if own.get(n) != shared[0].get(n))
      expected = f'differences in {", ".join(VARIES)} alone'
      raise InputError(_WHERE, f'{workdir} with another config.{name}', expected, _FIX)


def _sharing(job: Job, first: Job) -> Job:
  """The job with the first one's arrays in place of equal ones of its own."""
  known = tree.flatten(first.variables)

  def shared(values, prefix=''):
    def share(path, x):
      other = known.get(prefix + path)
      return other if other is not None and equal(other, x) else x

    return tree.map_paths(share, values)

  values = shared(job.variables)
  parts = assemble.partition(values, job.config['rules'])
  base = dataclasses.replace(job.base, params=shared(job.base.params, 'params/'))
  return dataclasses.replace(job, variables=values, parts=parts, base=base)


def equal(a, b) -> bool:
  """Whether two leaves hold the same numbers."""
  leaves, others = jax.tree.leaves(a), jax.tree.leaves(b)
  return len(leaves) == len(others) and all(
    x is y or (x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x, y))
    for x, y in zip(leaves, others, strict=True)
  )


def _differences(members: list[Member]) -> None:
  """Finds the fields in which members differ, as numbers that a program is given.

  A smaller rank is the largest with another alpha: see `Delta.scale`.
  """
  for m in members:
    m.numbers = {f'rate.{name}': getattr(m.job.base.cfg, name) for name in RATES}
    m.numbers |= numbers(m.config)
  for name, spec in members[0].config['method'].items():
    ranks = [m.config['method'][name].get('rank') for m in members]
    if len(set(ranks)) == 1:
      continue
    for m, rank in zip(members, ranks, strict=True):
      scale = getattr(m.job.net.deltas[name], 'scale', None)
      if scale is None or spec.get('rank_pattern'):
        found = f'ranks {", ".join(map(str, sorted(set(ranks))))}'
        raise InputError(f'config.method.{name}', found, 'one rank of this method', _FIX)
      m.numbers[f'method.{name}.alpha'] *= scale(rank) / scale(max(ranks))
  same = {path for path in members[0].numbers if len({m.numbers[path] for m in members}) == 1}
  for m in members:
    m.numbers = {path: float(x) for path, x in m.numbers.items() if path not in same}


def put(config: Mapping, numbers: Mapping) -> dict:
  """The config with these numbers in it, traced ones too."""
  config = configs.plain(dict(config))
  for path, value in numbers.items():
    *groups, last = path.split('.')
    node = config
    for group in groups:
      node = node[group]
    node[last] = value
  return config
