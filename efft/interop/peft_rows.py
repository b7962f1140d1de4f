"""HF PEFT's methods that act on kernels, each a row of names: options, tensors, what stays frozen.

A row holds for both directions. What a row cannot say is a pair of functions beside its table.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from efft import functions, tree
from efft.errors import InputError
from efft.interop import foreign, peft_targets
from efft.models import hub
from efft.peft import base as peft

RULES = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('params/.*', 'frozen'))


class Source(NamedTuple):
  """A checkpoint that is being read: what is left of it to be accounted for.

  Attributes:
    tensors: by Hugging Face's names, without PEFT's prefix and the adapter's name.
    saved: modules_to_save.
  """

  base: hub.Base
  names: peft_targets.Names
  config: foreign.Keys
  tensors: foreign.Keys
  saved: tuple[str, ...]


class Part(NamedTuple):
  """What a method has made of its own tensors and keys; the container adds head and biases.

  Attributes:
    targets: the modules that it acts on.
    origin: {path: name of the tensor} of the leaves that come from one.
  """

  method: dict[str, dict]
  leaves: dict[str, np.ndarray]
  rules: tuple[tuple[str, str], ...] = RULES
  notes: tuple[str, ...] = ()
  targets: tuple[str, ...] = ()
  origin: Mapping[str, str] = {}


class Written(NamedTuple):
  """What a method writes: config keys, tensors by Hugging Face's name, shared ones, targets."""

  config: dict[str, Any]
  tensors: dict[str, np.ndarray]
  shared: dict[str, np.ndarray] = {}
  targets: tuple[str, ...] = ()


class Entry(NamedTuple):
  """One delta at one site."""

  module: str  # Hugging Face's name
  site: str
  fn: str
  options: dict[str, Any]
  leaves: dict[str, np.ndarray]
  name: str = ''  # of the delta


class Codec(NamedTuple):
  """How an array changes on its way in and out."""

  read: Callable
  write: Callable


SAME = Codec(lambda x: x, lambda x: x)
TURNED = Codec(np.transpose, np.transpose)
COLUMN = Codec(np.ravel, lambda x: x.reshape(-1, 1))
ROW = Codec(np.ravel, lambda x: x.reshape(1, -1))


class Option(NamedTuple):
  """An option under both names.

  Attributes:
    key, default: PEFT's; ... where the key must be there.
    name: ours.
    pattern: PEFT's key of values by module; '' where it has none.
    values: {PEFT's value: ours}, where they differ; of several that mean the same, the first.
  """

  key: str
  name: str
  default: Any
  pattern: str = ''
  values: Mapping[Any, Any] = {}


class Row(NamedTuple):
  """A method.

  Attributes:
    fn: ours.
    options: that both have.
    leaves: {the tensor's name below its module: (leaf, codec)}.
    shared: the same for tensors that all modules have in common.
    neutral: {PEFT's key: values at which it does nothing}.
    idle: PEFT's keys that say nothing about what a trained adapter computes.
    resting: PEFT's keys that act in training alone and have no equal here, with their neutral
      value: noted.
    unwritten: our options that act in training alone and have no equal there.
    frozen: regex of the leaves that do not train.
    bias: PEFT's word for the biases of the targets.
    shaped: ({leaf: array}) -> our options that follow from the shapes of the leaves.
    sized: ([(options, d_in)], method) -> PEFT's keys that no option writes.
    constant: (options, shapes of kernels) -> shared leaves that are in no file.
    odd: ({leaf: array}, shape of the kernel) -> what is wrong with the values, or ''.
    drawn: (config, options, shapes of kernels) -> shared tensors that are made from a seed, if any.
    prepare: (config, tensors, where) -> tensors, before anything is looked at.
    finish: (modules, tensors, shared) -> tensors, as the library writes them.
  """

  fn: str
  options: tuple[Option, ...]
  leaves: dict[str, tuple[str, Codec]]
  shared: dict[str, tuple[str, Codec]] = {}
  neutral: dict[str, tuple] = {}
  idle: tuple[str, ...] = ()
  resting: dict[str, Any] = {}
  unwritten: tuple[str, ...] = ()
  frozen: str = ''
  bias: str = ''
  shaped: Callable | None = None
  sized: Callable | None = None
  constant: Callable | None = None
  odd: Callable | None = None
  drawn: Callable | None = None
  prepare: Callable | None = None
  finish: Callable | None = None


def read(source: Source, row: Row) -> Part:
  """The deltas of a method that is a row of names."""
  config = source.config
  targets = peft_targets.selected(config, source.names.linears, source.saved)
  values = [
    (o, config.take(o.key, *(() if o.default is ... else (o.default,)))) for o in row.options
  ]
  patterns = {o.pattern: config.take(o.pattern, None) for o in row.options if o.pattern}
  for key, allowed in row.neutral.items():
    config.only(key, *allowed)
  config.ignore(row.idle)
  deltas, origin = [], {}
  for module in targets:
    found, origin[module] = taken(source.tensors, module, row.leaves)
    if row.odd and (odd := row.odd(found, _shapes(source.base, source.names, [module])[0])):
      fix = 'the adapter is damaged: take another copy'
      raise InputError(source.tensors.where, f'{module}.{odd}', 'others', fix)
    options = row.shaped(found) if row.shaped else {}
    for o, value in values:
      value = peft_targets.by_pattern(patterns.get(o.pattern), module, value, config.where)
      options[o.name] = ours(o, value, config.where)
    site = f'{source.names.modules[module]}/matmul'
    deltas.append(Entry(module, site, row.fn, options, found))
  method, leaves, places = grouped(deltas, source)
  origin = by_path(origin, places)
  for name, spec in method.items():
    own = [m for m, place in places.items() if place.endswith(f'_{name}')]
    constant = row.constant(spec, _shapes(source.base, source.names, own)) if row.constant else {}
    drawn = row.drawn(config, spec, _shapes(source.base, source.names, own)) if row.drawn else {}
    for suffix, (leaf, codec) in row.shared.items():
      x = drawn[suffix] if suffix in drawn else source.tensors.take(suffix)
      constant[leaf], origin[f'delta/shared_{name}/{leaf}'] = codec.read(x), suffix
    leaves |= {f'delta/shared_{name}/{leaf}': x for leaf, x in constant.items()}
  frozen = ((row.frozen, 'frozen'),) if row.frozen else ()
  rules = (RULES[0], *frozen, *RULES[1:])
  return Part(method, leaves, rules, rested(config, row.resting), tuple(targets), origin)


def write(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base, row: Row) -> Written:
  """PEFT's config and tensors of deltas that are a row of names."""
  names = peft_targets.names(base.cfg)
  found = entries(adapter.method, leaves, names)
  modules = tuple(entry.module for entry in found)
  known = {o.name for o in row.options} | {'at', *row.unwritten}
  start = functions.signature(row.fn)
  for entry in found:
    if row.shaped:
      sizes = row.shaped(entry.leaves)
      entry.options.update(sizes)
      known |= set(sizes)
    for key, value in entry.options.items():
      if key not in known and value != start[key]:
        raise refusal(f'{entry.fn} with {key}={value!r:.100}', adapter.method)
  config: dict[str, Any] = {}
  for option in row.options:
    values = {e.module: theirs(option, e.options[option.name]) for e in found}
    config |= spread(option, values, adapter.method)
  if row.sized:
    widths = [shape[0] for shape in _shapes(base, names, modules)]
    options = [entry.options for entry in found]
    config |= row.sized(list(zip(options, widths, strict=True)), adapter.method)
  config |= {key: allowed[0] for key, allowed in row.neutral.items() if key not in config}
  tensors = {
    f'{entry.module}.{suffix}': codec.write(entry.leaves.pop(leaf))
    for entry in found
    for suffix, (leaf, codec) in row.leaves.items()
    if leaf in entry.leaves
  }
  for entry in found:
    for leaf in entry.leaves:
      raise refusal(f'{leaf} of {entry.fn}', adapter.method)
  shared = {}
  for name, spec in adapter.method.items():
    if row.constant:
      own = [entry.module for entry in found if entry.name == name]
      for leaf, x in row.constant(full(spec), _shapes(base, names, own)).items():
        if not np.array_equal(leaves.take(f'delta/shared_{name}/{leaf}', x), x):
          raise refusal(f'{leaf} of {name} other than those that PEFT draws', adapter.method)
    for suffix, (leaf, codec) in row.shared.items():
      if suffix in shared:
        raise refusal(f'two methods with a {leaf} of their own', adapter.method)
      shared[suffix] = codec.write(leaves.take(f'delta/shared_{name}/{leaf}'))
  if row.finish:
    tensors = row.finish(modules, tensors, shared)
  return Written(config, tensors, shared, modules)


def taken(tensors: foreign.Keys, module: str, known: Mapping) -> tuple[dict, dict]:
  """({leaf: array}, {leaf: name}) of the tensors of a module; one without any raises."""
  found, used = {}, {}
  for suffix, (leaf, codec) in known.items():
    if f'{module}.{suffix}' in tensors:
      used[leaf] = f'{module}.{suffix}'
      found[leaf] = codec.read(tensors.take(used[leaf]))
  if not found:
    tensors.take(f'{module}.{next(iter(known))}')
  return found, used


def grouped(entries: Sequence[Entry], source: Source) -> tuple[dict, dict, dict]:
  """(method, leaves, {module: path}): a delta for each set of options, named after its function."""
  alike: dict[str, list[Entry]] = {}
  for entry in entries:
    alike.setdefault(repr((entry.fn, sorted(entry.options.items()))), []).append(entry)
  count = collections.Counter(group[0].fn for group in alike.values())
  method, leaves, places = {}, {}, {}
  numbers: collections.Counter = collections.Counter()
  for group in alike.values():
    fn = group[0].fn
    name = fn.rpartition('.')[2]
    if count[fn] > 1:
      numbers[fn] += 1
      name += f'_{numbers[fn]}'
    at = peft_targets.regex((entry.site for entry in group), source.base.cfg.layers)
    method[name] = {'fn': fn, **group[0].options, 'at': at}
    for entry in group:
      places[entry.module] = f'delta/{entry.site}_{name}'
      leaves |= {f'{places[entry.module]}/{leaf}': x for leaf, x in entry.leaves.items()}
  return method, leaves, places


def by_path(origin: Mapping[str, Mapping], places: Mapping[str, str]) -> dict[str, str]:
  """{path of a leaf: name of its tensor} from {module: {leaf: name}}."""
  return {
    f'{places[module]}/{leaf}': name
    for module, used in origin.items()
    for leaf, name in used.items()
  }


def entries(method: Mapping, leaves: foreign.Keys, names: peft_targets.Names) -> list[Entry]:
  """The deltas at 'matmul' sites and at the words, out of `leaves`, in the encoder's order."""
  found = []
  for module, path in names.modules.items():
    site = 'embed/words' if path == 'embed/word' else f'{path}/matmul'
    for name, spec in method.items():
      place = f'delta/{site}_{name}/'
      own = {key.removeprefix(place): leaves.take(key) for key in leaves if key.startswith(place)}
      if own:
        own = {leaf: np.asarray(x) for leaf, x in own.items()}
        found.append(Entry(module, site, spec['fn'], full(spec), own, name))
  if not found:
    raise refusal('deltas at no kernel of the encoder', method)
  twice = [m for m, n in collections.Counter(e.module for e in found).items() if n > 1]
  if twice:
    raise refusal(f'several deltas at {twice[0]}', method)
  head = [entry.module for entry in found if entry.site.startswith('head/')]
  if head:
    raise refusal(f'a delta at {head[0]}, which PEFT saves whole', method)
  return found


def full(spec: Mapping) -> dict[str, Any]:
  """A method's options with the defaults of its function."""
  own = {key: value for key, value in spec.items() if key != 'fn'}
  return functions.signature(spec['fn']) | own


def ours(option: Option, value: Any, where: str) -> Any:
  if option.values:
    if value not in option.values:
      known = ', '.join(map(repr, option.values))
      raise InputError(where, f'{option.key}={value!r:.100}', known, foreign.REFUSED)
    return option.values[value]
  return value


def theirs(option: Option, value: Any) -> Any:
  if option.values:
    return next((key for key, own in option.values.items() if own == value), value)
  return int(value) if isinstance(value, float) and value.is_integer() else value


def spread(option: Option, values: Mapping[str, Any], method: Mapping) -> dict[str, Any]:
  """{key: value}, and {pattern: {module: value}} where the modules differ."""
  common = collections.Counter(values.values()).most_common(1)[0][0]
  others = {module: value for module, value in values.items() if value != common}
  if others and not option.pattern:
    found = f'{option.name} {common!r} and {next(iter(others.values()))!r} at different kernels'
    raise refusal(found, method)
  return {option.key: common} | ({option.pattern: others} if option.pattern else {})


def rested(config: foreign.Keys, resting: Mapping[str, Any]) -> tuple[str, ...]:
  """Notes of the keys that act in training alone."""
  found = {key: config.take(key, start) for key, start in resting.items()}
  acting = [f'{key}={value}' for key, value in found.items() if value and value != resting[key]]
  said = 'acts in training alone and has no equal here: it is left out'
  return (f'{", ".join(acting)} {said}',) if acting else ()


def refusal(found: str, method: Mapping) -> InputError:
  """The error for what PEFT does not compute, naming a format that may hold it."""
  merges = method and not peft.fixed(peft.build(method))
  other = any(_adapterhubs(spec) for spec in method.values())
  able = ['--format=auto'] * bool(merges) + ['--format=adapterhub'] * other
  fix = f'try {" or ".join(able)}' if able else 'keep the bundle'
  return InputError('--format=peft', found, 'what HF PEFT computes exactly', fix)


def _adapterhubs(spec: Mapping) -> bool:
  module = str(spec['fn']).partition('.')[0]
  if module == 'prefix':
    return not spec.get('shift')
  return module in ('adapter', 'intervene') or (module, spec.get('at')) == ('prompt', 'embed')


def _shapes(base: hub.Base, names: peft_targets.Names, modules) -> list[tuple[int, int]]:
  flat = tree.flatten(base.params)
  return [flat[f'{names.modules[module]}/kernel'].shape for module in modules]
