"""Physical removal: matrices become smaller, and nothing of a mask is left in the program.

One table says what the axes of each parameter count. Deltas have no table: a leaf of theirs follows
an axis where its shape does when `Delta.init` sees the smaller encoder, and numbers decide whether
that was right: the smaller encoder has to say what the larger one says with gates in place of what
was removed.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efft import quantize, tree
from efft.compress.base import Keep, closed, gated
from efft.errors import InputError
from efft.models.encoder import Encoder, EncoderConfig
from efft.models.layers import Hooks, compose
from efft.peft import base as peft

_LINEAR = {
  'attention/query': ('hidden', 'heads'),
  'attention/key': ('hidden', 'heads'),
  'attention/value': ('hidden', 'heads'),
  'attention/out': ('heads', 'hidden'),
  'mlp/up': ('hidden', 'units'),
  'mlp/down': ('units', 'hidden'),
  'pooler': ('hidden', 'hidden'),
  'head/dense': ('hidden', 'hidden'),
  'head/out': ('hidden', None),
  'embed/project': ('embed', 'hidden'),
}
AXES = {
  'embed/word/embedding': ('words', 'embed'),
  'embed/position/embedding': (None, 'embed'),
  'embed/token_type/embedding': (None, 'embed'),
  'embed/norm/scale': ('embed',),
  'embed/norm/bias': ('embed',),
  **{f'{block}_norm/{x}': ('hidden',) for block in ('attention', 'mlp') for x in ('scale', 'bias')},
  **{f'{name}/kernel': axes for name, axes in _LINEAR.items()},
  **{f'{name}/bias': axes[1:] for name, axes in _LINEAR.items()},
}
_TOLERANCE = 1e-4  # of the logits' size, between two orders of float32 sums


class _Pass(NamedTuple):
  """One kind of structure removed from one encoder: before, after, and the rows that stay."""

  kind: str
  before: EncoderConfig
  after: EncoderConfig
  rows: Callable  # (layer or None, size of an axis before) -> indices, None where no axis fits


def cut(
  cfg: EncoderConfig, variables: Mapping, keep: Keep, deltas: peft.Deltas | None = None
) -> tuple[EncoderConfig, dict]:
  """The encoder with only what `keep` names.

  Args:
    cfg, variables: {'params'} or {'params', 'delta'}.
    keep: indices into `cfg`'s layers, heads, units, dimensions and words; layers are numbered
      anew.
    deltas: those of 'delta'.

  Returns:
    The config and variables of the smaller encoder. Without `keep.hidden` its logits are those of
    the larger one with gates of 0 at the heads and units that are gone, and without the layers; a
    norm over fewer dimensions is another function than one over zeros.

  Raises:
    InputError: indices that are not there, nothing left, deltas that cannot follow.
  """
  _check(cfg, keep)
  if keep != Keep():
    check_float(variables)
  deltas = deltas or {}
  start, values = cfg, {name: dict(part) for name, part in variables.items()}
  if 'delta' in values and keep.hidden is not None:
    raise _stuck(list(deltas), 'fewer hidden dimensions')
  if keep.layers is not None:
    cfg, values = _renumbered(cfg, values, keep.layers)
    chosen = [None if x is None else tuple(x[i] for i in keep.layers) for x in keep[1:3]]
    keep = keep._replace(heads=chosen[0], units=chosen[1])
  for one in _passes(cfg, keep):
    model = Encoder(one.before, Hooks(tap=peft.attach(deltas)))
    shapes = _delta_shapes(model, deltas, values['params']) if 'delta' in values else {}
    values['params'] = _cut_params(one, values['params'])
    if 'delta' in values:
      model = model.clone(cfg=one.after)
      values['delta'] = _cut_delta(one, model, deltas, values, shapes)
    cfg = one.after
  if values.get('delta'):
    _prove(start, variables, cfg, values, keep, deltas)
  return cfg, values


def check_float(variables: Mapping) -> None:
  """Refuses quantised matrices: nothing is cut out of codes, nor scored by them."""
  if quantize.held(variables):
    raise InputError(
      'stages', 'an encoder of quantised matrices', 'a float one: prune first, then quantise',
      'put the stage that prunes before the one that quantises',
    )  # fmt: skip


def skipping(stays) -> Callable:
  """The tap that takes layers out: what goes in comes out. Not with `remat`.

  Args:
    stays: [L] booleans, which may be traced.
  """
  last = [None]

  def tap(module, site, y, **context):
    path = '/'.join((*module.path, site))
    if path == 'embed':
      last[0] = y[0]
    elif found := re.fullmatch(r'layer_(\d+)/output', path):
      last[0] = jnp.where(stays[int(found[1])], y, last[0])
      return last[0]
    return y

  return tap


def _check(cfg: EncoderConfig, keep: Keep) -> None:
  def indices(where, kept, size, least=0):
    if len(set(kept)) != len(kept) or list(kept) != sorted(kept):
      raise InputError(where, f'{list(kept)}', 'each index once, ascending', 'correct it')
    if kept and not 0 <= kept[0] <= kept[-1] < size:
      raise InputError(where, f'{list(kept)}', f'indices from 0 to {size - 1}', 'correct it')
    if len(kept) < least:
      raise InputError(where, 'nothing that stays', f'{least} or more of {size}', 'remove less')

  for where, kept, sizes in (('heads', keep.heads, cfg.heads), ('units', keep.units, cfg.mlp)):
    if kept is None:
      continue
    if len(kept) != cfg.layers:
      raise InputError(where, f'{len(kept)} lists', f'{cfg.layers}, one a layer', 'correct it')
    for layer, (stay, size) in enumerate(zip(kept, sizes, strict=True)):
      indices(f'{where} of layer {layer}', stay, size)
  for where, kept, size in (
    ('layers', keep.layers, cfg.layers), ('hidden', keep.hidden, cfg.hidden),
    ('words', keep.words, cfg.vocab_size),
  ):  # fmt: skip
    if kept is not None:
      indices(where, kept, size, 1)
  if keep.hidden is not None and len(keep.hidden) == cfg.embed_dim != cfg.hidden:
    # `Embeddings` takes equal widths to mean that nothing projects one to the other.
    expected = f'more or fewer than {cfg.embed_dim}, the width of the embeddings'
    raise InputError('hidden', f'{cfg.embed_dim} dimensions', expected, 'keep one more')
  if keep.words is not None and cfg.pad_id not in keep.words:
    raise InputError('words', f'no {cfg.pad_id}', 'the id of padding among them', 'keep it')
  if (
    keep.words is not None and cfg.positions_from_pad and keep.words.index(cfg.pad_id) != cfg.pad_id
  ):
    expected = f'all ids up to {cfg.pad_id}, from which positions count'
    raise InputError('words', 'another id for padding', expected, 'keep them')


def _renumbered(cfg: EncoderConfig, values: dict, layers: tuple[int, ...]):
  names = {f'layer_{old}': f'layer_{new}' for new, old in enumerate(layers)}

  def visit(part):
    return {
      names.get(name, name): x
      for name, x in part.items()
      if name in names or not re.fullmatch(r'layer_\d+', name)
    }

  heads, mlp = (tuple(sizes[i] for i in layers) for sizes in (cfg.heads, cfg.mlp))
  cfg = dataclasses.replace(cfg, heads=heads, mlp=mlp)
  return cfg, {name: visit(part) for name, part in values.items()}


def _passes(cfg: EncoderConfig, keep: Keep):
  """One kind after the other, so that what changes in a shape has one reason."""
  if keep.heads is not None:
    after = dataclasses.replace(cfg, heads=tuple(map(len, keep.heads)))

    def heads(layer, size, before=cfg):
      if layer is None:
        return None
      stay, width = np.array(keep.heads[layer], int), before.head_dim
      if size == before.heads[layer] * width:
        return (stay[:, None] * width + np.arange(width)).ravel()
      return stay if size == before.heads[layer] else None

    yield _Pass('heads', cfg, after, heads)
    cfg = after
  if keep.units is not None:
    after = dataclasses.replace(cfg, mlp=tuple(map(len, keep.units)))

    def units(layer, size, before=cfg):
      fits = layer is not None and size == before.mlp[layer]
      return np.array(keep.units[layer], int) if fits else None

    yield _Pass('units', cfg, after, units)
    cfg = after
  if keep.hidden is not None:
    embed = len(keep.hidden) if cfg.embed_dim == cfg.hidden else cfg.embed_dim
    after = dataclasses.replace(cfg, hidden=len(keep.hidden), embed_dim=embed)
    yield _Pass('hidden', cfg, after, lambda layer, size: np.array(keep.hidden))
    cfg = after
  if keep.words is not None:
    pad = keep.words.index(cfg.pad_id)
    after = dataclasses.replace(cfg, vocab_size=len(keep.words), pad_id=pad)

    def words(layer, size, before=cfg):
      return np.array(keep.words) if layer is None and size == before.vocab_size else None

    yield _Pass('words', cfg, after, words)


def _layer(path: str) -> tuple[int | None, str]:
  found = re.match(r'layer_(\d+)/', path)
  return (int(found[1]), path[found.end() :]) if found else (None, path)


def _cut_params(one: _Pass, params: Mapping) -> dict:
  same = one.before.embed_dim == one.before.hidden
  out = {}
  for path, x in tree.flatten(params).items():
    layer, rest = _layer(path)
    for axis, kind in enumerate(AXES[rest]):
      kind = 'hidden' if kind == 'embed' and same else kind
      if kind == one.kind:
        x = jnp.take(x, one.rows(layer, x.shape[axis]), axis)
    out[path] = x
  # What has no heads or no units left is its last linear's bias.
  empty = tuple(
    f'layer_{i}/{block}/'
    for block, sizes in (('attention', one.after.heads), ('mlp', one.after.mlp))
    for i, size in enumerate(sizes)
    if not size
  )
  biases = ('/out/bias', '/down/bias')
  return tree.unflatten(
    {p: x for p, x in out.items() if not p.startswith(empty) or p.endswith(biases)}
    if empty else out
  )  # fmt: skip


def _delta_shapes(model: Encoder, deltas: peft.Deltas, params: Mapping) -> dict:
  made = jax.eval_shape(lambda p, key: peft.init(model, deltas, p, key), params, jax.random.key(0))
  return {path: x.shape for path, x in tree.flatten(made).items()}


def _cut_delta(one: _Pass, model: Encoder, deltas, values: dict, before: dict) -> dict:
  try:
    after = _delta_shapes(model, deltas, values['params'])
  except InputError as error:
    raise _stuck(list(deltas), f'fewer {one.kind} ({error})') from None
  out = {}
  for path, x in tree.flatten(values['delta']).items():
    if path not in before or before[path] != tuple(x.shape):
      raise _stuck([_owner(path, deltas)], f'fewer {one.kind}: {path} {list(x.shape)}')
    if path not in after:
      continue  # of a block without heads or units, whose sites are gone
    old, new = before[path], after[path]
    if len(old) != len(new):
      raise _stuck([_owner(path, deltas)], f'fewer {one.kind}: {path} changes its axes')
    for axis, (size, left) in enumerate(zip(old, new, strict=True)):
      if size == left:
        continue
      rows = one.rows(_layer(path)[0], size)
      if rows is None or len(rows) != left:
        raise _stuck(
          [_owner(path, deltas)], f'fewer {one.kind}: {path} {list(old)}, now {list(new)}'
        )
      x = jnp.take(x, rows, axis)
    out[path] = x
  if lacking := after.keys() - out.keys():
    raise _stuck(list(deltas), f'fewer {one.kind}: it lacks {sorted(lacking)[0]}')
  return tree.unflatten(out)


def _owner(path: str, deltas: peft.Deltas) -> str:
  return next((name for name in deltas if f'_{name}/' in path), path)


def _stuck(names: list[str], what: str) -> InputError:
  return InputError(
    'prune', f'the method {", ".join(names)}, which cannot follow an encoder with {what}',
    'weights alone, or methods whose numbers belong to single heads and units (LoRA, (IA)3)',
    'merge the run first (a stage merge), or tune the method after pruning',
  )  # fmt: skip


def _prove(start, variables, cfg, values, keep: Keep, deltas) -> None:
  """Both forms on made-up text."""
  layers = tuple(range(start.layers)) if keep.layers is None else keep.layers
  keep = keep._replace(layers=layers)
  rng = np.random.default_rng(0)
  words = np.array(keep.words if keep.words is not None else range(start.vocab_size))
  length = min(12, start.max_length // 2)
  ids = rng.integers(0, len(words), (4, length))
  mask = np.arange(length) < rng.integers(3, length + 1, (4, 1))
  pads = int(np.flatnonzero(words == start.pad_id)[0])
  ids = np.where(mask, ids, pads).astype(np.int32)
  types = np.zeros_like(ids)

  def logits(cfg, values, ids, *taps):
    tap = compose(peft.attach(deltas), *taps)
    grown = {**values, 'delta': peft.expand(deltas, values['delta'])}
    return Encoder(cfg, Hooks(tap=tap)).apply(grown, ids, mask, types)

  taps = gated(closed(start, _spread(start, keep))), skipping(np.isin(range(start.layers), layers))
  large = logits(start, variables, words[ids].astype(np.int32), *taps)
  small = logits(cfg, values, ids)
  if not np.allclose(large, small, rtol=0, atol=_TOLERANCE * max(1.0, float(np.abs(large).max()))):
    difference = float(np.abs(large - small).max())
    what = f'fewer structures (logits differ by {difference:.2g} from those with gates of 0)'
    raise _stuck(list(deltas), what)


def _spread(cfg: EncoderConfig, keep: Keep) -> Keep:
  """Heads and units of the layers that stay -> of all layers."""

  def whole(kept, sizes):
    if kept is None:
      return None
    out = [tuple(range(size)) for size in sizes]
    for layer, stay in zip(keep.layers, kept, strict=True):
      out[layer] = stay
    return tuple(out)

  return Keep(heads=whole(keep.heads, cfg.heads), units=whole(keep.units, cfg.mlp))
