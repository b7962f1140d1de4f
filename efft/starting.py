"""What a run starts from: a pretrained checkpoint, or the whole model that another run left.

A bundle that stands alone (fully fine-tuned, merged, pruned) is a checkpoint like any other:
`config.model.name=runs/pruned`. One that still has deltas can only be gone on with, by a config of
the same method.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from efft import bundle, transfer, tree
from efft.errors import InputError
from efft.models import convert, hub
from efft.models.encoder import EncoderConfig
from efft.peft import base as peft

log = logging.getLogger(__name__)

_WHERE = 'config.model.name'


class Start(NamedTuple):
  """Attributes:
  base: the encoder, with the head that the run begins with.
  method, delta: config.method of the run that was there, and its 'delta' collection; {} for most.
  """

  base: hub.Base
  method: Mapping[str, Any]
  delta: Mapping[str, Any]


def start(
  name: str, *, num_labels: int, labels: Sequence[str] = (), pooling: str = 'auto',
  head: str = 'new', key: jax.Array,
) -> Start:  # fmt: skip
  """Reads the model that `name` leads to.

  Args:
    name: a run folder or a bundle; otherwise see `hub.resolve`.
    num_labels: outputs of the head.
    labels: class names of the task, to which the head that is there is matched by head='keep'.
    pooling, head, key: as for `hub.load`.

  Raises:
    InputError: a bundle that needs its base, another pooling or labels; as `hub.load`.
  """
  folder = Path(name).expanduser()
  if not bundle.is_there(folder):
    base = hub.load(name, num_labels=num_labels, pooling=pooling, head=head, key=key)
    return Start(_in_order(base, labels) if head == 'keep' else base, {}, {})
  content = bundle.load(folder)
  if content.needs_base:
    raise InputError(
      _WHERE, f'{name}, whose numbers stand beside {content.base["name"]}', 'a whole model',
      'merge it (efft merge), or name its base and pass --config.model.init_from=' + name,
    )  # fmt: skip
  cfg = EncoderConfig.from_dict(content.encoder)
  if pooling not in ('auto', cfg.pooling):
    fix = 'leave config.model.pooling at auto'
    raise InputError(_WHERE, f'{name} with {cfg.pooling} pooling', pooling, fix)
  if head == 'keep' and tuple(labels) != content.labels:
    raise InputError(
      'config.model.head', f"'keep' with the labels {', '.join(content.labels)} of {name}",
      f'{", ".join(labels)}, those of this task', "use head='new'",
    )  # fmt: skip
  leaves = transfer.whole(content, dict)
  if head == 'new':
    cfg = dataclasses.replace(cfg, num_labels=num_labels)
    rest = {path: x for path, x in leaves.items() if not path.startswith('params/head/')}
    drawn = {f'params/{path}': x for path, x in convert.new_head(cfg, key).items()}
    leaves = rest | drawn
  values = tree.unflatten(leaves)
  place = bundle.inside(folder)
  params = jax.tree.map(np.asarray, values['params'])
  base = hub.Base(
    cfg, params, place, str(name), bundle.identity(place), content.kind, content.labels
  )
  return Start(base, content.method, values.get('delta', {}))


def _in_order(base: hub.Base, labels: Sequence[str]) -> hub.Base:
  """A checkpoint whose own head has its classes in the order of the task's labels.

  Names are matched whatever their case. Those that do not match are taken to be in order: a
  checkpoint may well say 'entailment' for what a csv file calls '0'.
  """
  own = base.labels or ()
  have, want = ([name.casefold() for name in names] for names in (own, labels))
  if not own or not want or have == want:
    return base
  if sorted(have) != sorted(want) or len(set(want)) < len(want):
    log.warning(
      '%s: its head of %s is kept for %s, in this order', base.name, ', '.join(own),
      ', '.join(labels),
    )  # fmt: skip
    return base
  leaves = transfer.reordered(tree.flatten({'params': base.params}), have, want)
  log.info('%s: the classes of its head in the order %s', base.name, ', '.join(labels))
  return dataclasses.replace(base, params=tree.unflatten(leaves)['params'], labels=tuple(labels))


def taken_over(found: Start, deltas: peft.Deltas, method: Mapping, made: Mapping) -> Mapping:
  """The 'delta' collection of a run that goes on with the deltas that it found.

  Args:
    found: of `start`.
    deltas, method: of this run.
    made: the 'delta' collection as inits have made it.

  Raises:
    InputError: another method, or one that is stored in another form than it trains in.
  """
  if not found.method:
    return made
  expected = f'the method {", ".join(found.method)} of {found.base.name}, with its options'
  fix = 'merge that run first, or train the same method on'
  if dict(found.method) != dict(method):
    raise InputError('config.method', ', '.join(method) or 'none', expected, fix)
  if peft.has(deltas, 'rebase') or peft.has(deltas, 'pack'):
    what = f'{", ".join(method)}, which is stored in another form than it trains in'
    raise InputError('config.method', what, 'a method that trains what it stores', 'merge it first')
  if difference := tree.diff(made, found.delta):
    raise InputError(_WHERE, f'{found.base.name} with other numbers:\n{difference}', expected, fix)
  return jax.tree.map(jax.numpy.asarray, dict(found.delta))


def base(content: bundle.Bundle) -> hub.Base:
  """The model that a bundle is beside, from where it was or from where its name leads.

  Raises:
    InputError: it is not there, or not the one that the bundle was trained on.
  """
  place = content.base['path'] if Path(content.base['path']).is_dir() else content.base['name']
  labels = content.encoder['num_labels']
  found = start(place, num_labels=labels, pooling=content.pooling, key=jax.random.key(0)).base
  # What stands alone needs no base to predict; its differences to one do.
  bundle.check_base(dataclasses.replace(content, needs_base=True), found.sha256)
  return found


def pretrained(content: bundle.Bundle) -> dict:
  """The parameters of `base`."""
  return base(content).params
