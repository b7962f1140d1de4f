"""What a parameter-efficient method is: a few pure functions and a regex of places to act.

`attach` turns named deltas into the one tap of `efft.models.layers.Hooks`. Their parameters live
in linen's 'delta' collection, below the path of the module that they act on and named after the
site and the delta: 'delta/layer_0/attention/query/matmul_lora/a'. Where that entry is missing a
delta does nothing, so dropped layers and partial checkpoints need no flag.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efft.errors import InputError
from efft.models import dots
from efft.models.layers import dropout


class Site(NamedTuple):
  """A value of the model at a named place, and what surrounds it there.

  Attributes:
    path: 'layer_0/attention/query/matmul'.
    y: the value itself.
    x: input of the block or linear that made y.
    w: the pretrained kernel, at 'matmul' sites.
    norm: the LayerNorm that follows, as a function, at '*_out' sites.
    ids: the token ids, at 'embed' sites.
    dropout: (x, rate) -> x; identity when evaluating.
  """

  path: str
  y: Any
  x: Any = None
  w: Any = None
  norm: Callable | None = None
  ids: Any = None
  dropout: Callable = lambda x, rate: x


class Delta(NamedTuple):
  """One method at the sites that it matches.

  Attributes:
    init: (key, site) -> parameters, a flat dictionary; sees the pretrained weight.
    apply: (parameters, site) -> the new value of the site.
    at: regex that must match the whole of a site's path; one that matches no site is an error.
    merge: (parameters, module) -> module, where the maths allows. `module` holds the pretrained
      parameters below the module that owns the site: {'kernel', 'bias'} at a 'matmul' site, the
      four linears at 'attention/kv', up and down at 'mlp/act'.
    expand: tree -> tree over the whole 'delta' collection, once before `apply` and once at
      export, for methods that train something other than what they apply.
  """

  init: Callable
  apply: Callable
  at: str
  merge: Callable | None = None
  expand: Callable | None = None


Deltas = Mapping[str, Delta | tuple[Delta, ...]]


def product(x, w):
  """x [..., K] times w [K, N] in x's type, accumulated to float32: what deltas multiply with."""
  return dots.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def attach(deltas: Deltas) -> Callable:
  """The tap that lets named deltas act, in order, at the sites that they match."""
  parts = _parts(deltas)

  def tap(module, site, y, **context):
    path = '/'.join((*module.path, site))
    for name, delta in parts:
      if not re.fullmatch(delta.at, path):
        continue
      leaf = f'{site}_{name}'
      here = Site(path, y, **context, dropout=lambda x, rate: dropout(module, x, rate))
      if module.is_mutable_collection('delta') and not module.has_variable('delta', leaf):
        module.put_variable('delta', leaf, _init(name, delta, module.make_rng('delta'), here))
      if module.has_variable('delta', leaf):
        y = delta.apply(module.get_variable('delta', leaf), here)
    return y

  return tap


def init(model, deltas: Deltas, params: Mapping, key) -> dict:
  """Initial parameters of every delta of `model`, whose tap is `attach(deltas)`.

  Args:
    model: an Encoder.
    deltas: the same as given to `attach`.
    params: the pretrained parameters, which inits may look at.
    key: jax PRNG key; the same key gives the same parameters.

  Raises:
    InputError: a delta that acts nowhere.
  """
  ids = jnp.zeros((1, 8), jnp.int32)

  @jax.jit
  def run(params, key):
    return model.apply({'params': params}, ids, ids == 0, mutable=['delta'], rngs={'delta': key})[1]

  tree = run(params, key).get('delta', {})
  paths = sites(model, params)
  for name, delta in _parts(deltas):
    if not any(re.fullmatch(delta.at, path) for path in paths):
      raise InputError(
        f'config.method.{name}',
        f'at={delta.at!r}, which matches no site of this encoder',
        'a regex that matches a whole site path',
        f'choose among {", ".join(_shortened(paths))}',
      )
  return tree


def sites(model, params) -> list[str]:
  """Paths of all sites of the model, in the order in which they are reached."""
  found = []

  def record(module, site, y, **context):
    found.append('/'.join((*module.path, site)))
    return y

  plain = model.clone(hooks=type(model.hooks)(model.hooks.dot_general, record), remat=False)
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  jax.eval_shape(lambda p, i: plain.apply({'params': p}, i, i == 0), params, ids)
  return found


def expand(deltas: Deltas, tree: Mapping) -> Mapping:
  """What the deltas apply, from what they train; the identity for most."""
  for _, delta in _parts(deltas):
    if delta.expand is not None:
      tree = delta.expand(tree)
  return tree


def merge(deltas: Deltas, params: Mapping, tree: Mapping) -> dict:
  """Folds trained deltas into the pretrained parameters.

  Args:
    deltas: as given to `attach`.
    params: the 'params' collection.
    tree: the 'delta' collection.

  Returns:
    New parameters, with which the model without deltas computes what it computed with them.

  Raises:
    InputError: a delta that cannot be folded in.
  """
  parts = _parts(deltas)
  fixed = [name for name, delta in parts if delta.merge is None]
  if fixed:
    raise InputError(
      'merge',
      f'{", ".join(sorted(set(fixed)))}, which cannot be folded into the weights',
      'methods that are linear in the weights (LoRA, (IA)3)',
      'keep the delta beside the base model',
    )

  def visit(params, tree, path):
    # Modules inside come first, as they do in the forward pass.
    out = {
      key: visit(value, tree.get(key, {}), (*path, key)) if isinstance(value, Mapping) else value
      for key, value in params.items()
    }
    for name, delta in parts:
      for leaf, p in tree.items():
        site = leaf.removesuffix(f'_{name}')
        if site != leaf and re.fullmatch(delta.at, '/'.join((*path, site))):
          out = delta.merge(p, out)
    return out

  return visit(params, expand(deltas, tree), ())


def build(method: Mapping, package: str = 'efft.peft') -> dict[str, Delta | tuple[Delta, ...]]:
  """Deltas from a config: {'lora': {'fn': 'lora.lora', 'rank': 8}} -> {'lora': lora(rank=8)}.

  Functions are found by module and name below `package`: adding a file is the registration.

  Raises:
    InputError: an unknown function or option, or a value that the function refuses.
  """
  deltas = {}
  for name, spec in method.items():
    options = dict(spec)
    where = f'config.method.{name}'
    module, _, function = str(options.pop('fn', '')).rpartition('.')
    try:
      fn = getattr(importlib.import_module(f'{package}.{module}'), function)
    except (ImportError, AttributeError, ValueError):
      raise InputError(
        f'{where}.fn', repr(spec.get('fn')), "a method such as 'lora.lora'", 'see `efft methods`'
      ) from None
    known = inspect.signature(fn).parameters
    unknown = [key for key in options if key not in known]
    if unknown:
      raise InputError(
        where, f'option {unknown[0]!r}', f'one of {", ".join(known)}', 'remove or rename it'
      )
    try:
      deltas[name] = fn(**options)
      for _, part in _parts({name: deltas[name]}):
        re.compile(part.at)
    except (TypeError, ValueError, re.error) as error:
      raise InputError(where, str(error), f'valid options of {spec["fn"]}', 'correct it') from None
  return deltas


def _init(name: str, delta: Delta, key, site: Site):
  try:
    return delta.init(key, site)
  except ValueError as error:
    raise InputError(
      f'config.method.{name}', f'{error} (at {site.path})', 'an option that fits this encoder',
      'change at= or the size',
    ) from None  # fmt: skip


def _parts(deltas: Deltas) -> list[tuple[str, Delta]]:
  return [
    (name, part)
    for name, delta in deltas.items()
    for part in ((delta,) if isinstance(delta, Delta) else delta)
  ]


def _shortened(paths: list[str]) -> list[str]:
  """Site paths with the layer number replaced, each kind once."""
  return list(dict.fromkeys(re.sub(r'layer_\d+', r'layer_\\d+', path) for path in paths))
