"""Adapters of HF PEFT (peft 0.21): adapter_config.json beside adapter_model.safetensors.

Here is what its methods have in common: the files, the names of tensors, the head. How a method's
own tensors and keys read is in peft_kernels and peft_rotations (tables), peft_lora and peft_places;
what stands in place of the base's parameters in peft_parameters.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from efft import functions, tree
from efft.errors import InputError
from efft.interop import (
  containers,
  foreign,
  peft_kernels,
  peft_lora,
  peft_parameters,
  peft_places,
  peft_rotations,
  peft_rows,
)  # fmt: skip
from efft.interop import peft_targets as targets
from efft.interop.peft_rows import Part, Source, Written
from efft.models import hub
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base as peft

CONFIG = 'adapter_config.json'
WEIGHTS = ('adapter_model.safetensors', 'adapter_model.bin')
_IDLE = (
  'auto_mapping', 'base_model_name_or_path', 'inference_mode', 'peft_version', 'revision',
  'fan_in_fan_out',
)  # fmt: skip


class Method(NamedTuple):
  """A peft_type.

  Attributes:
    read: (source) -> Part.
    write: (adapter, what is left of its leaves, base) -> Written.
    functions: ours that it holds.
    bias: its word for the biases of its targets; '' where it has no key for biases.
    prompt: whether it stands outside the model, whose names then have another prefix.
    prepare: (config, tensors, where) -> tensors, before anything is looked at.
  """

  read: Callable
  write: Callable
  functions: tuple[str, ...]
  bias: str = ''
  prompt: bool = False
  prepare: Callable | None = None


def _method(row: peft_rows.Row) -> Method:
  read, write = partial(peft_rows.read, row=row), partial(peft_rows.write, row=row)
  return Method(read, write, (row.fn,), row.bias, prepare=row.prepare)


_PROMPTS = ('prompt.prompt', 'prompt.ptuning')
METHODS = {
  **{kind: _method(row) for kind, row in {**peft_kernels.ROWS, **peft_rotations.ROWS}.items()},
  'LORA': Method(peft_lora.read, peft_lora.write, peft_lora.FUNCTIONS, 'lora_only'),
  'ADALORA': Method(
    peft_lora.read_adalora, peft_lora.write_adalora, ('lora.adalora',), 'lora_only'
  ),
  'IA3': Method(peft_places.read_ia3, peft_places.write_ia3, ('scale.ia3',)),
  'ROAD': Method(peft_rotations.read_road, peft_rotations.write_road, ('orthogonal.road',)),
  'LN_TUNING': Method(peft_places.read_norms, None, ()),
  'BEFT': Method(peft_places.read_biases, None, ()),
  'PROMPT_TUNING': Method(peft_places.read_prompt, peft_places.write_prompt, _PROMPTS, prompt=True),
  'P_TUNING': Method(peft_places.read_prompt, None, (), prompt=True),
  'PREFIX_TUNING': Method(
    peft_places.read_prefix, peft_places.write_prefix, ('prefix.prefix',), prompt=True
  ),
}


def num_labels(folder: Path) -> int:
  """Outputs of the classification head in it; InputError where it has none."""
  file = containers.find(folder, *WEIGHTS)
  tensors = _named(containers.tensors(file), str(file))
  for name in ('classifier.out_proj.weight', 'classifier.weight'):
    if name in tensors:
      return len(tensors[name])
  raise _headless(str(file))


def read(folder: Path, base: hub.Base) -> foreign.Adapter:
  """An adapter with its head.

  Args:
    folder: of the two files.
    base: the encoder that it is for, with as many labels as `num_labels` says.

  Raises:
    InputError: a tensor or a key that has no equal in efft, is missing, or does not fit.
  """
  file = containers.find(folder, *WEIGHTS)
  where = str(Path(folder) / CONFIG)
  config = containers.config(folder, CONFIG)
  kind = str(config.pop('peft_type', None))
  if kind not in METHODS:
    raise InputError(
      where, f'peft_type={kind!r:.100}', f'one of {", ".join(sorted(METHODS))}', foreign.REFUSED
    )
  method, names = METHODS[kind], targets.names(base.cfg)
  raw = _named(containers.tensors(file), str(file))
  config, part_of = dict(config), partial(_strictly, where)
  raw = part_of(method.prepare, config, raw, where) if method.prepare else raw
  unset = [key for key, value in config.items() if _says_nothing(key, value)]
  config, tensors = foreign.Keys(config, where), foreign.Keys(raw, str(file))
  config.ignore(_IDLE)
  config.only('task_type', 'SEQ_CLS', None)
  saved = config.take('modules_to_save', None) or ()
  saved = (saved,) if isinstance(saved, str) else tuple(saved)
  tokens = config.take('trainable_token_indices', None)
  head = [name for name, path in names.parameters.items() if path.startswith('params/head/')]
  if any(name not in tensors for name in head):
    raise _headless(str(file))
  source = Source(base, names, config, tensors, saved)
  part = part_of(method.read, source)
  bias = config.take('bias', None) or 'none'
  leaves = foreign.head(tensors, base.cfg)
  origin = {path: name for name, path in names.parameters.items()} | dict(part.origin)
  leaves |= part.leaves
  rules = [part.rules[0]]
  for group, found in (
    ('words', peft_parameters.token_rows(source, tokens)),
    ('bias', peft_parameters.biases(source, bias, part.targets)),
    ('saved', peft_parameters.saved(source)),
  ):
    leaves |= found
    if found:
      paths = [path.removeprefix('params/') for path in found]
      rules.append((f'params/({targets.regex(paths, base.cfg.layers)})', group))
  config.ignore(unset)
  tensors.finish()
  config.finish()
  _check(part, leaves, origin, base, str(file))
  notes = list(part.notes)
  if tokens is not None:
    notes.append('where training goes on, all rows of the word table train, not single tokens')
  return foreign.Adapter(part.method, leaves, (*rules, *part.rules[1:]), notes=tuple(notes))


def write(adapter: foreign.Adapter, base: hub.Base) -> dict[str, bytes]:
  """adapter_config.json and adapter_model.safetensors.

  Raises:
    InputError: what PEFT does not compute exactly.
  """
  method, cfg = adapter.method, base.cfg
  if cfg.pooling != 'cls':
    raise peft_rows.refusal(f'a head over the {cfg.pooling} of all tokens', method)
  leaves = foreign.Keys(adapter.leaves, 'adapter')
  kind, body = _body(adapter, leaves, base)
  how, names = METHODS[kind], targets.names(cfg)
  inner, config, extra = dict(body.tensors), dict(body.config), []
  for name, path in names.parameters.items():
    if path.startswith('params/head/'):
      inner[name] = foreign.turned(path, leaves.take(path))
  if not how.prompt:
    more, said, extra = peft_parameters.write(
      adapter, leaves, base, names, kind, how.bias, body.targets
    )
    inner, config = inner | more, config | said
  for path in leaves:
    raise peft_rows.refusal(f'{path}, which has no place in {kind}', method)
  prefix = 'base_model.' if how.prompt else 'base_model.model.'
  shared = {name if how.prompt else f'base_model.{name}': x for name, x in body.shared.items()}
  config |= {
    'auto_mapping': None, 'base_model_name_or_path': base.name, 'inference_mode': True,
    'modules_to_save': [*targets.HEAD, *extra], 'peft_type': kind, 'revision': None,
    'task_type': 'SEQ_CLS',
  }  # fmt: skip
  if body.targets:
    config['target_modules'] = targets.endings(body.targets, names.modules)
  tensors = {f'{prefix}{name}': x for name, x in inner.items()} | shared
  tensors = {name: _stored(x) for name, x in tensors.items()}
  return {CONFIG: foreign.to_json(config), WEIGHTS[0]: foreign.packed(tensors, {'format': 'pt'})}


def _body(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> tuple[str, Written]:
  if not adapter.method:
    return peft_places.write_params(adapter, leaves, base)
  functions = {spec['fn'] for spec in adapter.method.values()}
  for kind, method in METHODS.items():
    if functions <= set(method.functions):
      return kind, method.write(adapter, leaves, base)
  known = {fn for method in METHODS.values() for fn in method.functions}
  odd = sorted(functions - known) or sorted(functions)
  raise peft_rows.refusal(' beside '.join(odd), adapter.method)


def _stored(x) -> np.ndarray:
  x = np.asarray(x)
  return np.ascontiguousarray(x, np.int32 if x.dtype.kind in 'iu' else np.float32)


def _strictly(where: str, act: Callable, *args):
  """`act(*args)`, where what fails over values that PEFT never writes is the file's fault."""
  try:
    return act(*args)
  except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
    found = f'values that do not go together ({type(error).__name__}: {str(error)[:200]})'
    raise InputError(where, found, 'those of one adapter', 'take another copy of it') from error


def _says_nothing(key: str, value: Any) -> bool:
  """Whether a key that a later PEFT may have added is left unset."""
  return value in (None, {}, []) or (key.startswith('use_') and value is False)


def _headless(where: str) -> InputError:
  return InputError(
    where, 'an adapter without its classification head', 'a head beside it',
    "save it again with task_type='SEQ_CLS' (or modules_to_save) in PEFT's config: without it the "
    'head is neither trained nor saved',
  )  # fmt: skip


def _named(tensors: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """Tensors by Hugging Face's names: without PEFT's prefix, wrappers and name of the adapter."""
  found: dict[str, np.ndarray] = {}
  for name, x in tensors.items():
    if '.original_module.' in name:
      continue  # the head that the base model had, which is not used
    short = re.sub(r'^base_model\.(model\.)?', '', name)
    short = re.sub(r'\.default(?=\.|$)', '', short)
    short = re.sub(r'\.(modules_to_save|base_layer)(?=\.)', '', short)
    short = re.sub(r'(?<=lora_magnitude_vector)\.weight$', '', short)
    if short in found and not np.array_equal(found[short], x):
      raise InputError(where, f'{name} twice, with different values', 'a tensor once', 'remove one')
    found[short] = x
  return found


def _check(part: Part, leaves: Mapping, origin: Mapping, base: hub.Base, where: str) -> None:
  """Raises InputError unless the leaves are those that the methods would have, shape by shape."""
  for name, spec in part.method.items():
    functions.checked(f'{where}: {name}', spec)
  deltas = peft.build(part.method)
  model = Encoder(base.cfg, Hooks(tap=peft.attach(deltas)))
  expected = tree.flatten({'params': base.params})
  expected = {path: (x.shape, 'f') for path, x in expected.items() if path in leaves}
  if deltas:
    make = partial(peft.init, model, deltas)
    fresh = jax.eval_shape(make, base.params, jax.random.key(0))
    expected |= {
      f'delta/{path}': (x.shape, x.dtype.kind) for path, x in tree.flatten(fresh).items()
    }
  for path in sorted({*expected, *leaves}):
    name = origin.get(path, path)
    if path not in leaves:
      found = f'one of shape {expected[path][0]}'
      raise InputError(where, f'no tensor for {path}', found, 'complete it')
    x = leaves[path]
    if expected.get(path) != (x.shape, x.dtype.kind):
      found = f'{name} {x.shape} {x.dtype} (transposed where it is a matrix)'
      right = f'{expected[path][0]}' if path in expected else f'none for {next(iter(part.method))}'
      raise InputError(where, found, right, 'use the base and the config that it is for')
