"""What a run hands on: to a bundle, to the classifier that reads it, and to the next run."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efft import bundle, compact, quantize, tree
from efft.errors import InputError
from efft.peft import base as peft

log = logging.getLogger(__name__)


def handed_on(deltas: peft.Deltas, weights: Mapping, frozen: Mapping, params: Mapping) -> dict:
  """{path: array or Sparse} of what a bundle must hold: all that trained, all deltas, the head.

  Args:
    deltas: the named deltas.
    weights, frozen: the variables after training, cut in two.
    params: the checkpoint's.
  """
  kept, _ = tree.split(frozen, lambda path: path.startswith(('delta/', 'params/head/')))
  values = jax.device_get(tree.join(weights, kept))
  delta = values.get('delta', {})
  if delta:
    values['delta'] = jax.device_get(peft.pack(deltas, delta))
  flat = tree.flatten(values)
  pretrained = beside(deltas, params, delta)
  found = compact.compact(
    flat, {path: x for path, x in pretrained.items() if not path.startswith('params/head/')}
  )
  if needs_base(flat, {'params': params}):
    return found
  # A whole model that needs no other is worth up to twice the room.
  small, large = (sum(map(compact.nbytes, leaves.values())) for leaves in (found, flat))
  return found if 2 * small <= large else flat


def needs_base(leaves: Mapping, variables: Mapping) -> bool:
  """Whether leaves handed on lack some of the pretrained numbers."""
  paths = tree.flatten({'params': variables['params']})
  return any(isinstance(leaves.get(path), compact.Sparse | None) for path in paths)


def restored(deltas: peft.Deltas, leaves: Mapping, params: Mapping, forms=()) -> dict:
  """The variables of a bundle's leaves beside the checkpoint's `params`: undoes `handed_on`.

  `forms` is the bundle's `quantize`.
  """
  flat = beside(deltas, params, _delta(leaves))
  flat |= compact.whole(leaves, flat)
  values = tree.unflatten(flat)
  return quantize.quantized(values, forms) if params else values


def beside(deltas: peft.Deltas, params: Mapping, delta: Mapping) -> dict:
  """{path: array} of the checkpoint's `params`, less what the deltas have taken over."""
  return tree.flatten({'params': peft.rebase(deltas, params, delta)})


def whole(content: bundle.Bundle, params: Callable[[], Mapping]) -> dict[str, np.ndarray]:
  """All leaves of a bundle as arrays; `params` gives the checkpoint's, where some are sparse."""
  flat, leaves = {}, content.leaves
  if any(p.startswith('params/') and isinstance(x, compact.Sparse) for p, x in leaves.items()):
    flat = beside(peft.build(content.method), params(), _delta(leaves))
  return compact.whole(leaves, jax.device_get(flat))


def _delta(leaves: Mapping) -> dict:
  own = {path: x for path, x in leaves.items() if path.startswith('delta/')}
  return tree.unflatten(compact.whole(own, {})).get('delta', {})


def inherit(
  values: Mapping,
  runs: Sequence[str],
  *,
  method: Mapping,
  params: Mapping,
  sha256: str,
  trains: Mapping[str, str],
  weights: Sequence[float] | None = None,
  head: tuple[str, ...] | None = None,
  pooling: str = '',
) -> dict:
  """Variables that start where other runs ended (SPoT, Vu et al. 2022,
  https://arxiv.org/abs/2110.07904, for prompts; Hu et al. 2021 start LoRA from MNLI).

  A leaf takes the place of the one of the same name at the same site, whatever the delta is called.
  Of several runs it is the weighted mean (AdapterSoup, Chronopoulou et al. 2023,
  https://arxiv.org/abs/2302.07027), or the stack where the method mixes them itself along a first
  axis of that size (fusion, attempt). Leaves that no run has keep their own start. What a method
  multiplies its product by has to be the same; other options that differ are said.

  Args:
    values: {'params', 'delta'} at the start of this run.
    runs: run folders or bundles.
    method: config.method of this run.
    params: the checkpoint's.
    sha256: the checkpoint's.
    trains: {path: group} of what this run trains.
    weights: one a run; None: all equal, with sum 1.
    head: this run's labels, to keep the first run's head; None: a new head.
    pooling: of this run, which a head that is kept must share.

  Raises:
    InputError: another base, something trained that has no place here, a shape or a scale that does
      not fit, a part of what a method takes out of the weights.
  """
  where = 'config.model.init_from'
  if weights is None:
    weights = [1 / len(runs)] * len(runs)
  if len(weights) != len(runs):
    found, expected = f'{len(weights)} numbers', f'{len(runs)}, one a run'
    raise InputError('config.model.init_weights', found, expected, 'correct it')
  flat = tree.flatten(values)
  own = {_place(path, method): path for path in flat if path.startswith('delta/')}
  given: dict[str, list[np.ndarray]] = {}
  for number, run in enumerate(runs):
    content = bundle.load(run)
    bundle.check_base(content, sha256)
    leaves = whole(content, lambda: params)
    taken = {}
    for path, x in leaves.items():
      if path.startswith('params/head/'):
        continue
      target = path if path in flat else own.get(_place(path, content.method))
      still = target is not None and target.startswith('params/') and target not in trains
      if target is None or target in taken or still:
        raise InputError(
          where, f'{path} of {run}, which {"does not train" if still else "has no place"} here',
          'a config that trains what that run trained',
          f'use its method ({", ".join(content.method) or "rules only"}) and rules',
        )  # fmt: skip
      taken[target] = x
    _check_options(run, content.method, method, leaves, taken)
    for target, x in taken.items():
      given.setdefault(target, []).append(x)
    if number == 0 and head is not None:
      if content.pooling != pooling:
        fix = f'pass --config.model.pooling={content.pooling}'
        raise InputError(where, f'a head over {content.pooling} pooling in {run}', pooling, fix)
      flat |= _head(content, leaves, head, run)
  _check_whole(given, flat, method)
  for path, arrays in given.items():
    flat[path] = _joined(path, arrays, flat[path], weights, len(runs))
  log.info('start: %d leaves of %s', len(given), ', '.join(map(str, runs)))
  return tree.unflatten(flat)


def _place(path: str, method: Mapping) -> str:
  """'delta/layer_0/mlp_out_pfeiffer/down' -> 'delta/layer_0/mlp_out/down'."""
  return _owned(method).sub('', path) if method else path


def _owner(path: str, method: Mapping) -> str | None:
  """'delta/layer_0/mlp_out_pfeiffer/down' -> 'pfeiffer'."""
  found = _owned(method).search(path) if method and path.startswith('delta/') else None
  return found and found[1]


def _owned(method: Mapping) -> re.Pattern:
  names = '|'.join(sorted(map(re.escape, method), key=len, reverse=True))
  return re.compile(f'_({names})(?=/[^/]*$)')


# Options that change nothing of what given numbers compute, and what begins so (init, init_std).
_HARMLESS = ('fn', 'at', 'dropout', 'rank')


def _check_options(run, theirs: Mapping, ours: Mapping, leaves: Mapping, taken: Mapping) -> None:
  """Refuses leaves that are multiplied by another number here; says which other options differ."""
  places = {_place(path, theirs): _owner(path, theirs) for path in leaves}
  pairs = {(places.get(_place(path, ours)), _owner(path, ours)) for path in taken}
  for their, our in sorted(pair for pair in pairs if all(pair)):
    one, other = theirs[their], ours[our]
    shared = [name for name in one.keys() & other.keys() if name not in _HARMLESS]
    differ = sorted(n for n in shared if one[n] != other[n] and not n.startswith('init'))
    told = ', '.join(f'{name}={one[name]!r}' for name in differ)
    here = ', '.join(f'{name}={other[name]!r}' for name in differ)
    if not _same_scale(one, other):
      raise InputError(
        'config.model.init_from', f'{their} of {run} with {told}', f'{here} as here, or the start '
        'is not where that run ended', 'take the options of that run',
      )  # fmt: skip
    if differ:
      log.warning('start: %s of %s has %s; here %s', their, run, told, here)


def _same_scale(one: Mapping, other: Mapping) -> bool:
  """Whether two specs multiply the same factors by one number, as far as they have such a one."""
  scales = [getattr(peft.build({'it': spec})['it'], 'scale', None) for spec in (one, other)]
  if not all(scales) or one['rank'] != other['rank']:
    return True  # of another rank they do not fit anyway, which is said later
  patterns = [spec.get('alpha_pattern') for spec in (one, other)]
  return scales[0](one['rank']) == scales[1](one['rank']) and patterns[0] == patterns[1]


def _check_whole(given: Mapping, flat: Mapping, method: Mapping) -> None:
  """Refuses a part of the leaves of a delta that has taken its start out of the weights."""
  for name, spec in method.items():
    if not peft.has(peft.build({name: spec}), 'rebase'):
      continue
    own = [path for path in flat if _owner(path, method) == name]
    missing = [path for path in own if path not in given]
    if 0 < len(missing) < len(own):
      raise InputError(
        'config.model.init_from', f'runs without {missing[0]}',
        f'all of {name}, which has taken its start out of the weights',
        'use runs of the same method',
      )  # fmt: skip


def _joined(path, arrays, start, weights, runs: int):
  shape, shapes = tuple(start.shape), {x.shape for x in arrays}
  if shapes == {shape} and len(arrays) == runs:
    alike = all(np.array_equal(x, arrays[0]) for x in arrays)
    if alike and (sum(weights) == 1 or arrays[0].dtype != np.float32):
      return jnp.asarray(arrays[0])  # to the bit; what is frozen and random, too
    if arrays[0].dtype != np.float32:
      raise InputError(
        'config.model.init_from', f'{path} that differ between the runs', 'the same integers',
        'use runs of one seed',
      )  # fmt: skip
    return jnp.asarray(sum(np.float32(w) * x for w, x in zip(weights, arrays, strict=True)))
  if shapes == {shape[1:]} and len(arrays) == shape[0] == runs:
    return jnp.stack(arrays)
  raise InputError(
    'config.model.init_from', f'{path} {" and ".join(map(str, sorted(shapes)))} in {len(arrays)} '
    f'of {runs} runs', f'{shape} in each', 'use runs of the same method and size',
  )  # fmt: skip


def _head(content: bundle.Bundle, leaves: Mapping, labels: tuple[str, ...], run) -> dict[str, Any]:
  """The run's head, its classes in the order of this run's labels."""
  if sorted(content.labels) != sorted(labels):
    raise InputError(
      'config.model.head', f"'keep' with the labels {', '.join(content.labels) or 'of a number'} "
      f'of {run}', f'{", ".join(labels) or "a number"}, those of this task', "use head='new'",
    )  # fmt: skip
  head = {path: x for path, x in leaves.items() if path.startswith('params/head/')}
  return reordered(head, content.labels, labels)


def reordered(
  leaves: Mapping[str, Any], have: Sequence[str], want: Sequence[str]
) -> dict[str, Any]:
  """Leaves whose head's last layer has its classes in another order.

  Args:
    leaves: {path: array}, of which those below 'params/head/out/' change.
    have, want: the same names, in the order of the outputs now and then.
  """
  order = [have.index(name) for name in want]
  return {
    path: x[..., order] if order and path.startswith('params/head/out/') else x
    for path, x in leaves.items()
  }
