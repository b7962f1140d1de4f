"""What a parameter-efficient method is: a few pure functions and a regex of places to act.

`attach` turns named deltas into the one tap of `efft.models.layers.Hooks`. Their parameters live
in linen's 'delta' collection, below the path of the module that they act on and named after the
site and the delta: 'delta/layer_0/attention/query/matmul_lora/a'. Where that entry is missing a
delta does nothing, so dropped layers and partial checkpoints need no flag. What all sites of a
delta share lives once, at 'delta/shared_lora/...'.
"""

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efft import quantize
from efft.errors import InputError
from efft.models import dots, quantized
from efft.models.layers import dropout
from efft.peft.build import call
from efft.tree import map_paths


class Site(NamedTuple):
  """A value of the model at a named place, and what surrounds it there; see `Hooks` for which.

  Attributes:
    path: 'layer_0/attention/query/matmul'.
    y: the value itself.
    x: input of the block or linear that made y.
    w: the pretrained kernel [K, N] at 'matmul' sites, the word table [V, D] at 'embed/words'; as
      floats, where it is held in fewer bits.
    norm: the LayerNorm that follows, as a function, at '*_out' sites.
    ids: the token ids, at 'embed' sites.
    mask: bool [B, T], the real tokens, inside layers.
    features: the layers' inputs and last output, at 'output'.
    q: the queries [B, T, H, K], at 'attention/kv'.
    dropout: (x, rate) -> x; identity when evaluating.
    contract: (x, w) -> float32 x w, the way the model multiplies with pretrained kernels: with
      the integers, where w is this site's and held as integers.
  """

  path: str
  y: Any
  x: Any = None
  w: Any = None
  norm: Callable | None = None
  ids: Any = None
  mask: Any = None
  features: Any = None
  q: Any = None
  dropout: Callable = lambda x, rate: x
  contract: Callable = None


class Delta(NamedTuple):
  """One method at the sites that it matches.

  Attributes:
    init: (key, site) -> parameters, a flat dictionary; sees the pretrained weight.
    apply: (parameters, site) -> the new value of the site. Several deltas at one site act one
      after the other: each starts from site.y as the one before has left it.
    at: regex that must match the whole of a site's path; one that matches no site is an error.
    merge: (parameters, module) -> module, where the maths allows. `module` holds the pretrained
      parameters below the module that owns the site: {'kernel', 'bias'} at a 'matmul' site, the
      four linears at 'attention/kv', up and down at 'mlp/act'.
    shared: (key, sites) -> parameters that all sites have in common, a flat dictionary. `sites`
      is {path: Site} with shapes in place of arrays.
    expand: (parameters, path, key) -> parameters, for methods that train something other than
      what they apply. Gets a site's own parameters and the shared ones; what it returns is what
      apply and merge see, and what is exported. `key` is None when evaluating; while training it
      is the step's, the same at every site (`at_path` makes it the site's own).
    penalty: (parameters, path) -> scalar added to the loss; parameters as given to expand.
    rebase: (parameters, module) -> module: the pretrained weights that the delta is beside, where
      it takes a part of them over (PiSSA). Applied once, before training and after loading, so it
      may depend on frozen parameters of the delta only.
    pack: (parameters) -> parameters that act the same when evaluating and take less room: bool
      arrays, stored as bits and read as 0. and 1., in place of scores; zeros, which are not stored.
    scale: (rank) -> what its products are multiplied by, for methods whose `rank` may be filled up
      with zeros, in which no gradient flows: they differ from the smaller rank by this number, to
      which `alpha` is proportional.
    first: whether it comes before other deltas at its sites, whatever the names: for what stands
      in place of the pretrained weights.
    examples: how many training examples `init` wants to find in site.x and site.y; 0: none, what
      is there is made up.
  """

  init: Callable
  apply: Callable
  at: str
  merge: Callable | None = None
  shared: Callable | None = None
  expand: Callable | None = None
  penalty: Callable | None = None
  rebase: Callable | None = None
  pack: Callable | None = None
  examples: int = 0
  scale: Callable | None = None
  first: bool = False


Deltas = Mapping[str, Delta | tuple[Delta, ...]]


def product(x, w):
  """x [..., K] times w [K, N] in x's type, accumulated to float32: what deltas multiply with."""
  return dots.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ())))


def at_path(key, path: str):
  """The key of one site, from the key of a step."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def attach(deltas: Deltas) -> Callable:
  """The tap that lets named deltas act, in order, at the sites that they match."""
  parts = _parts(deltas)

  def tap(module, site, y, w=None, **context):
    path = '/'.join((*module.path, site))
    floats = quantized.dequantized(w)

    def contract(x, matrix):
      own = w if matrix is floats else matrix
      return module.hooks.dot_general(x, own, (((x.ndim - 1,), (0,)), ((), ())))

    for name, delta in parts:
      if not re.fullmatch(delta.at, path):
        continue
      leaf = f'{site}_{name}'
      here = Site(
        path, y, w=floats, contract=contract, **context,
        dropout=lambda x, rate: dropout(module, x, rate),
      )  # fmt: skip
      if module.is_mutable_collection('delta'):
        # Inits see the pretrained model: what they share and expand to does not exist yet.
        value = _made(name, delta.init, module.make_rng('delta'), here)
        module.put_variable('delta', leaf, value)
      elif module.has_variable('delta', leaf):
        y = delta.apply(module.get_variable('delta', leaf), here)
    return y

  return tap


def init(model, deltas: Deltas, params: Mapping, key, batch: Mapping | None = None) -> dict:
  """Initial parameters of every delta of `model`, whose tap is `attach(deltas)`.

  Args:
    model: an Encoder.
    deltas: the same as given to `attach`.
    params: the pretrained parameters, which inits may look at.
    key: jax PRNG key; the same key gives the same parameters.
    batch: examples to run through the model meanwhile, where a delta wants them.

  Raises:
    InputError: a delta that acts nowhere.
  """
  found = sites(model, params)
  parts = _parts(deltas)
  for name, delta in parts:
    if not any(re.fullmatch(delta.at, path) for path in found):
      raise InputError(
        f'config.method.{name}',
        f'at={delta.at!r}, which matches no site of this encoder',
        'a regex that matches a whole site path',
        f'choose among {", ".join(_shortened(found))}',
      )
  if batch is None:
    ids = jnp.zeros((1, 8), jnp.int32)
    batch = {'input_ids': ids, 'mask': ids == 0, 'token_types': ids}

  @jax.jit
  def run(params, key, batch):
    args = batch['input_ids'], batch['mask'], batch['token_types']
    out = model.apply({'params': params}, *args, mutable=['delta'], rngs={'delta': key})
    tree = dict(out[1].get('delta', {}))
    for number, (name, delta) in enumerate(parts):
      if delta.shared is not None:
        own = {path: site for path, site in found.items() if re.fullmatch(delta.at, path)}
        common = _made(name, delta.shared, jax.random.fold_in(key, number), own)
        tree[f'shared_{name}'] = {**tree.get(f'shared_{name}', {}), **common}
    return tree

  return run(params, key, {name: batch[name] for name in ('input_ids', 'mask', 'token_types')})


def has(deltas: Deltas, field: str) -> bool:
  """Whether any of the deltas has the optional function `field`."""
  return any(getattr(delta, field) is not None for _, delta in _parts(deltas))


def fixed(deltas: Deltas) -> list[str]:
  """Names of the deltas that cannot be folded into the weights."""
  return sorted({name for name, delta in _parts(deltas) if delta.merge is None})


def examples(deltas: Deltas) -> int:
  """How many training examples `init` wants to see; 0 for most."""
  return max((delta.examples for _, delta in _parts(deltas)), default=0)


def sites(model, params) -> dict[str, Site]:
  """All sites of the model in the order in which they are reached, with shapes for arrays."""
  found = {}

  def shape(x):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)

  def record(module, site, y, norm=None, w=None, **context):
    path = '/'.join((*module.path, site))
    given = {name: shape(x) for name, x in context.items()}
    found[path] = Site(path, shape(y), w=shape(jax.eval_shape(quantized.dequantized, w)), **given)
    return y

  plain = model.clone(hooks=type(model.hooks)(model.hooks.dot_general, record), remat=False)
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  jax.eval_shape(lambda p, i: plain.apply({'params': p}, i, i == 0), params, ids)
  return found


def expand(deltas: Deltas, tree: Mapping, key=None) -> Mapping:
  """What the deltas apply, from what they train; the identity for most.

  Args:
    deltas: as given to `attach`.
    tree: the 'delta' collection.
    key: of this step while training, None otherwise.
  """
  if not (has(deltas, 'shared') or has(deltas, 'expand')):
    return tree
  keys = {name: None if key is None else at_path(key, name) for name in deltas}

  def grow(name, delta, p, path):
    return p if delta.expand is None else delta.expand(p, path, keys[name])

  grown = _map_entries(deltas, tree, grow)
  return {name: x for name, x in grown.items() if not name.startswith('shared_')}


def penalty(deltas: Deltas, tree: Mapping):
  """What the deltas add to the loss: a float32 scalar, 0 for most."""
  costs = [jnp.zeros(())]

  def add(name, delta, p, path):
    if delta.penalty is not None:
      costs.append(delta.penalty(p, path))
    return p

  _map_entries(deltas, tree, add)
  return sum(costs)


def rebase(deltas: Deltas, params: Mapping, tree: Mapping) -> dict:
  """The pretrained parameters that the deltas are beside; `params` itself for most."""
  if not has(deltas, 'rebase'):
    return params
  return _fold(deltas, params, _map_entries(deltas, tree, lambda n, d, p, path: p), 'rebase')


def pack(deltas: Deltas, tree: Mapping) -> dict:
  """The 'delta' collection as a bundle stores it; see `Delta.pack`."""

  def visit(name, delta, p, path):
    return p if delta.pack is None else delta.pack(p)

  return _map_entries(deltas, tree, visit, shared=False)


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
  unmerged = fixed(deltas)
  if unmerged:
    raise InputError(
      'merge',
      f'{", ".join(unmerged)}, which cannot be folded into the weights',
      'methods that are linear in the weights (LoRA, (IA)3)',
      'keep the delta beside the base model',
    )

  return _fold(deltas, floats(params), expand(deltas, tree), 'merge')


def floats(params: Mapping) -> dict:
  """Parameters with all matrices in float32."""
  return map_paths(lambda path, x: quantized.dequantized(x), params)


def build(method: Mapping, package: str = 'efft.peft') -> dict[str, Delta | tuple[Delta, ...]]:
  """Deltas from a config: {'lora': {'fn': 'lora.lora', 'rank': 8}} -> {'lora': lora(rank=8)}.

  Raises:
    InputError: an unknown function or option, or a value that the function refuses.
  """
  deltas = {}
  for name, spec in method.items():
    where = f'config.method.{name}'
    deltas[name] = call(where, spec, 'Delta', package)
    for _, part in _parts({name: deltas[name]}):
      try:
        re.compile(part.at)
      except re.error as error:
        raise InputError(where, f'{part.at!r}: {error}', 'a regex', 'correct it') from None
  return deltas


def _made(name: str, make: Callable, key, place):
  """`make(key, place)`, a site or several, with its ValueError as the user's."""
  try:
    return make(key, place)
  except ValueError as error:
    at = f' (at {place.path})' if isinstance(place, Site) else ''
    raise InputError(
      f'config.method.{name}', f'{error}{at}', 'an option that fits this encoder',
      'change at= or the size',
    ) from None  # fmt: skip


def _map_entries(deltas: Deltas, tree: Mapping, fn: Callable, shared: bool = True) -> dict:
  """`fn(name, delta, entry, path)` over the entries of all sites, with what they share."""
  parts = _parts(deltas)

  def visit(node, path):
    out = {}
    for leaf, value in node.items():
      found = [
        (name, delta, '/'.join((*path, leaf.removesuffix(f'_{name}'))))
        for name, delta in parts
        if leaf.endswith(f'_{name}')
      ]
      found = [part for part in found if re.fullmatch(part[1].at, part[2])]
      if found:
        name, delta, site = found[0]
        common = tree.get(f'shared_{name}', {}) if shared else {}
        out[leaf] = fn(name, delta, {**common, **value}, site)
      elif isinstance(value, Mapping) and not leaf.startswith('shared_'):
        out[leaf] = visit(value, (*path, leaf))
      else:
        out[leaf] = value
    return out

  return visit(tree, ())


def _fold(deltas: Deltas, params: Mapping, tree: Mapping, field: str) -> dict:
  """Each delta's function `field` over the modules that own its sites."""
  parts = [(name, delta) for name, delta in _parts(deltas) if getattr(delta, field) is not None]

  rounded = {}  # module -> the delta that has made integers of a matrix in it

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
          within = {by for at, by in rounded.items() if at[: len(path)] == path and by != name}
          if within:
            raise InputError(
              'merge', f'{name} at {"/".join(path)}, whose matrices {", ".join(within)} rounds',
              'weights of floats to fold it into', 'put it inside of what is rounded (rank=), or '
              'keep the deltas beside the base model',
            )  # fmt: skip
          out = getattr(delta, field)(p, out)
          if field == 'merge' and quantize.held(out):
            rounded.setdefault(path, name)
    return out

  return visit(params, tree, ())


def _parts(deltas: Deltas) -> list[tuple[str, Delta]]:
  parts = [
    (name, part)
    for name, delta in deltas.items()
    for part in ((delta,) if isinstance(delta, Delta) else delta)
  ]
  return sorted(parts, key=lambda part: not part[1].first)


def _shortened(paths: Iterable[str]) -> list[str]:
  """Site paths with the layer number replaced, each kind once."""
  return list(dict.fromkeys(re.sub(r'layer_\d+', r'layer_\\d+', path) for path in paths))
