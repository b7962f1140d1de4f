"""Adapters of AdapterHub's `adapters` (and adapter-transformers before it), read and written.

    adapter_config.json    {"config": {...}, "name", "model_type", "hidden_size", "version", ...}
    adapter.safetensors    or pytorch_adapter.bin: tensors under the encoder's prefix ('bert.')
    head_config.json       and model_head.safetensors or pytorch_model_head.bin

A fusion is a folder with adapter_fusion_config.json and model_adapter_fusion.safetensors (or
pytorch_model_adapter_fusion.bin), and a folder inside for each of its adapters. Source: adapters
1.3.0, loading.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from efft.errors import InputError
from efft.interop import adapterhub_head, adapterhub_prefix, containers, foreign, torch_file
from efft.interop import adapterhub_parts as parts
from efft.interop import adapterhub_union as union
from efft.interop.adapterhub_parts import Part, Source
from efft.interop.foreign import Adapter, Keys
from efft.models import convert
from efft.models.hub import Base

CONFIG, FUSION_CONFIG = 'adapter_config.json', 'adapter_fusion_config.json'
FILES = ('adapter.safetensors', 'pytorch_adapter.bin')
FUSION_FILES = ('model_adapter_fusion.safetensors', 'pytorch_model_adapter_fusion.bin')
VERSION = 'adapters.1.3.0'
LAYOUTS = {'safetensors': 0, 'bin': 1}
RULES = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('params/.*', 'frozen'))
_POOLER_RULES = (('params/(head|pooler)/.*', 'head'), *RULES[1:])
_META = ('config_id', 'model', 'model_name', 'model_class')
# Spellings of adapter-transformers.
_OLD_NAMES = re.compile(r'(attention|layer)_text_(task|lang)_adapters')
_OLD_ACTIVATIONS = {'gelu': 'gelu_new', 'gelu_orig': 'gelu'}


def num_labels(folder: str | Path) -> int:
  """The outputs of the head in a folder."""
  folder = Path(folder)
  return adapterhub_head.num_labels(_adapters(folder)[0] if _is_fusion(folder) else folder)


def read(folder: str | Path, base: Base) -> Adapter:
  """An adapter, or a fusion of some, with its head."""
  folder = Path(folder)
  if _is_fusion(folder):
    return _read_fusion(folder, base)
  part = _read_adapter(folder, base)
  return _adapter(part, adapterhub_head.read(folder, base))


def _adapter(part: Part, head: adapterhub_head.Head) -> Adapter:
  pooler = any(path.startswith('params/pooler/') for path in head.leaves)
  first, *others = _POOLER_RULES if pooler else RULES
  rules = (first, *part.rules, *others)
  leaves = {path: np.asarray(x, np.float32) for path, x in {**head.leaves, **part.leaves}.items()}
  notes = tuple(dict.fromkeys(part.notes))
  return Adapter(part.method, leaves, rules, head.labels, head.kind, notes)


def _is_fusion(folder: Path) -> bool:
  return (folder / FUSION_CONFIG).exists() and not (folder / CONFIG).exists()


def _read_adapter(folder: Path, base: Base) -> Part:
  config, name, version, task = _about(folder, CONFIG, base)
  source = _source(containers.find(folder, *FILES), base, name)
  config = _as_trained(_modern(config, source, version, task), version, str(folder / CONFIG))
  part = union.read(source, Keys(config, f'{folder / CONFIG}: config'))
  source.tensors.finish()
  return part


def _about(folder: Path, file: str, base: Base) -> tuple[dict, str, str, Any]:
  """(config, name, version, the type of adapter-transformers) of a container."""
  where = str(folder / file)
  keys = Keys(containers.config(folder, file), where)
  config, name = keys.take('config'), foreign.plain(keys.take('name'), where)
  if not isinstance(config, dict):
    fix = 'load and save it again with adapters'
    raise InputError(where, f'config {config!r:.100}', 'a config in full', fix)
  for key, own in (('hidden_size', base.cfg.hidden), ('model_type', base.cfg.architecture)):
    found = keys.take(key, own)
    if found != own:
      fix = 'take the base model that the adapter was trained on'
      raise InputError(where, f'{key}={found!r:.100}', f'{own!r}, as in the base model', fix)
  version, task = keys.take('version', ''), keys.take('type', None)
  keys.ignore(_META)
  keys.ignore(('adapter_names',) if file == FUSION_CONFIG else ())
  keys.finish()
  return config, name, str(version), task


def _source(file: Path, base: Base, name: str) -> Source:
  """Tensors by today's names, without the encoder's prefix."""
  prefix, tensors = convert.NAMES[base.cfg.architecture][0], {}
  for given, x in containers.tensors(file).items():
    own = _OLD_NAMES.sub('adapters', given).replace('invertible_lang_', 'invertible_')
    own = own.removeprefix(prefix)
    if own in tensors:
      raise InputError(str(file), f'{given!r:.200} under two names', 'each once', 'remove one')
    tensors[own] = x
  return Source(Keys(tensors, str(file)), base, name)


def _modern(config: dict, source: Source, version: str, task) -> dict:
  """A config in today's words."""
  config = dict(config)
  act = config.get('non_linearity')
  if not version and isinstance(act, str):
    config['non_linearity'] = _OLD_ACTIVATIONS.get(act, act)
  if task == 'text_task' and not any(n.startswith('invertible_adapters.') for n in source.tensors):
    # Adapters of tasks said so and had none.
    for key in ('inv_adapter', 'inv_adapter_reduction_factor', 'invertible_adapter'):
      config.pop(key, None)
  return config


def _as_trained(config: dict, version: str, where: str) -> dict:
  """Undoes the scale that LoRA before adapters 1.1.0 said and did not apply (its issue 770)."""
  found = re.fullmatch(r'adapters\.(\d+)\.(\d+)(?:\.(\d+))?(.*)', version)
  if not found:
    return config
  number = tuple(int(n or 0) for n in found.groups()[:3])
  early = re.match(r'\.?(dev|a|b|rc)', found[4])
  if not (number < (1, 1, 0) or (number == (1, 1, 0) and early)):
    return config
  inner = config.get('configs') if config.get('architecture') == 'union' else ()
  for part in inner if isinstance(inner, list) else ():
    if isinstance(part, dict) and part.get('architecture') == 'lora':
      if part.get('r', 8) != part.get('alpha', 8) and not part.get('use_gating'):
        found = (
          f'a LoRA with r={part.get("r")!r:.20} and alpha={part.get("alpha")!r:.20} in a union'
        )
        raise parts.refuse(
          where, f'{found} of {version:.40}, which did not apply the scale that it says',
          'adapters 1.1.0 or later, or alpha=r',
        )  # fmt: skip
  if config.get('architecture') == 'lora' and 'r' in config:
    return {**config, 'alpha': config['r']}
  return config


def _adapters(folder: Path) -> list[Path]:
  """The folders of a fusion's adapters."""
  config = containers.config(folder, FUSION_CONFIG)
  names = config.get('adapter_names', config.get('name'))
  names = names.split(',') if isinstance(names, str) else names
  where = str(folder / FUSION_CONFIG)
  if not isinstance(names, list) or not names:
    raise InputError(where, f'adapter_names={names!r:.100}', 'names of adapters', 'complete it')
  found = [folder / foreign.plain(name, where) for name in names]
  for path in found:
    if not path.is_dir():
      fix = 'save the adapters beside their fusion (save_all_adapters)'
      raise InputError(str(folder), f'no folder {path.name}', 'one for each adapter', fix)
  return found


def _read_fusion(folder: Path, base: Base) -> Adapter:
  config, name, _, _ = _about(folder, FUSION_CONFIG, base)
  folders = _adapters(folder)
  source = _source(containers.find(folder, *FUSION_FILES), base, name)
  each = [_read_adapter(path, base) for path in folders]
  keys = Keys(config, f'{folder / FUSION_CONFIG}: config')
  part = union.read_fusion(source, name, keys, each)
  source.tensors.finish()
  heads = [adapterhub_head.read(path, base) for path in folders]
  for path, head in zip(folders, heads, strict=True):
    same = head.leaves.keys() == heads[0].leaves.keys() and head[1:] == heads[0][1:]
    if not same or any(not np.array_equal(x, heads[0].leaves[p]) for p, x in head.leaves.items()):
      found, fix = f'another head than in {folders[0].name}', 'keep the head of the fusion in each'
      raise InputError(str(path), found, 'one head for the fusion', fix)
  return _adapter(part, heads[0])


def write(
  adapter: Adapter, base: Base, layout: str = 'safetensors', name: str = 'efft'
) -> dict[str, bytes]:
  """The files of an adapter folder.

  Args:
    adapter: as a bundle holds it.
    base: its encoder, with as many labels.
    layout: 'safetensors', or 'bin': what the library's own default is.
    name: the adapter's, which is a part of its tensors' names.

  Raises:
    InputError: a method, an option or a head that the library cannot compute exactly.
  """
  if layout not in LAYOUTS:
    raise InputError('layout', repr(layout), ' or '.join(LAYOUTS), 'choose one of them')
  foreign.plain(name, 'name')
  if '.' in name or ',' in name:
    raise InputError('name', repr(name), 'a name without dots and commas', 'choose another')
  leaves = Keys(adapter.leaves, 'adapter')
  about = {
    'hidden_size': base.cfg.hidden, 'model_name': str(base.name),
    'model_class': adapterhub_head.CLASSES.get(base.cfg.architecture),
    'model_type': base.cfg.architecture, 'version': VERSION,
  }  # fmt: skip
  entries = parts.entries(adapter.method, leaves, base, name)
  fused = [own for own, spec in adapter.method.items() if spec['fn'] == 'hybrid.fusion']
  if fused and len(entries) > 1:
    raise parts.refuse('method', 'a fusion with other methods', 'a fusion alone')
  if fused:
    adapters, fusion, target = union.write_fusion(entries[fused[0]])
  else:
    target = union.write(entries, adapter.method)
    adapters = [(name, target)]
  for entry in entries.values():
    for keys in entry.sites.values():
      keys.finish()
  config, tensors = adapterhub_head.write(leaves, base, adapter.labels, adapter.kind, about, name)
  _only_the_base(leaves, base)
  files = {}
  for own, part in adapters:
    at = f'{own}/' if fused else ''
    said = {**about, 'config': part.configs[0], 'name': own}
    files |= _files(at, CONFIG, FILES, said, part.tensors, base, layout)
    if config['name'] is None or not fused:
      head = config, tensors
    else:
      head = _named(config, tensors, name, own)
    files |= _files(at, adapterhub_head.CONFIG, adapterhub_head.FILES, *head, None, layout)
  if fused:
    said = {**about, 'config': target.configs[0], 'name': fusion}
    said['adapter_names'] = [own for own, _ in adapters]
    files |= _files('', FUSION_CONFIG, FUSION_FILES, said, target.tensors, base, layout)
  return files


def _named(config: dict, tensors: Mapping, old: str, new: str) -> tuple[dict, dict]:
  renamed = {k.replace(f'heads.{old}.', f'heads.{new}.'): x for k, x in tensors.items()}
  return {**config, 'name': new}, renamed


def _files(at, config_name, names, config, tensors, base, layout) -> dict[str, bytes]:
  if base is not None:
    prefix = convert.NAMES[base.cfg.architecture][0]
    tensors = {prefix + key: x for key, x in tensors.items()}
  if layout == 'safetensors':
    # The library does not write tensors that share memory, and finds the pool's in one copy.
    tensors = {key: x for key, x in tensors.items() if not adapterhub_prefix.is_copy(key)}
    content = foreign.packed(tensors)
  else:
    content = torch_file.write(tensors)
  return {at + config_name: foreign.to_json(config), at + names[LAYOUTS[layout]]: content}


def _only_the_base(leaves: Keys, base: Base) -> None:
  """Raises where parameters are left that are not the base model's."""
  own = parts.parameters_of(base)
  for path in leaves:
    if path in own and np.array_equal(leaves.take(path), own[path]):
      continue
    if path in own:
      raise parts.refuse(
        'adapter', f'{path}, which was trained', 'an adapter of AdapterHub holds no such parameter'
      )
  leaves.finish()
