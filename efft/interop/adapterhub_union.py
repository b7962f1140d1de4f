"""AdapterHub's unions of methods, UniPELT among them, and AdapterFusion.

Source: adapters 1.3.0, configuration/adapter_config.py, methods/modeling.py (BertFusion).
"""

import re

import numpy as np

from efft import functions
from efft.errors import InputError
from efft.interop import adapterhub_bottleneck as bottleneck
from efft.interop import adapterhub_ia3 as ia3
from efft.interop import adapterhub_lora as lora
from efft.interop import adapterhub_parts as parts
from efft.interop import adapterhub_prefix as prefix
from efft.interop import adapterhub_reft as reft
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys

READERS = {
  None: bottleneck.read,
  'bottleneck': bottleneck.read,
  'lora': lora.read,
  'prefix_tuning': prefix.read,
  'prompt_tuning': prefix.read_prompt,
  'reft': reft.read,
}
WRITERS = {
  'adapter.houlsby': bottleneck.write,
  'adapter.pfeiffer': bottleneck.write,
  'adapter.parallel': bottleneck.write,
  'adapter.adapter_plus': bottleneck.write,
  'adapter.invertible': bottleneck.write_invertible,
  'wrap.adapterdrop': bottleneck.write,
  'phm.compacter': bottleneck.write,
  'phm.compacter_plus': bottleneck.write,
  'lora.lora': lora.write,
  'lora.dylora': lora.write,
  'lora.dora': lora.write,
  'shared_lowrank.vera': lora.write_vera,
  'scale.ia3': ia3.write,
  'prefix.prefix': prefix.write,
  'prompt.prompt': prefix.write_prompt,
  'intervene.loreft': reft.write,
  'intervene.noreft': reft.write,
  'intervene.direft': reft.write,
}
FUSION = {
  'dropout_prob': None, 'key': True, 'query': True, 'query_before_ln': False,
  'regularization': True, 'residual_before': False, 'temperature': False, 'value': True,
  'value_before_softmax': True, 'value_initialized': True,
}  # fmt: skip
_ALONE = 'each alone'
_GATES = (
  "AdapterHub's gates average over padding too, so that its scores depend on the other texts of a "
  'batch; efft gives those of a text on its own'
)


def read(source: Source, config: Keys) -> Part:
  """Of any config of a method, or a union of some."""
  kind = config.take('architecture', None)
  if kind == 'union':
    given = config.take('configs')
    if not isinstance(given, list) or not all(isinstance(c, dict) for c in given) or not given:
      raise InputError(config.where, 'a union of something else', 'a list of configs', 'mend it')
    found = [_single(source, Keys(own, f'{config.where}: configs')) for own in given]
    config.finish()
    return _union(source, found)
  found = _single(source, config, kind)
  if found.gated:
    raise parts.refuse(config.where, 'use_gating of a method on its own', 'gates of UniPELT')
  return found


def _single(source: Source, config: Keys, *kind) -> Part:
  (kind,) = kind or (config.take('architecture', None),)
  if not isinstance(kind, str | None) or kind not in READERS:
    known = f'one of {", ".join(filter(None, READERS))}, union'
    raise parts.refuse(config.where, f'architecture={kind!r:.100}', known)
  found = READERS[kind](source, config)
  config.finish()
  return found


def _union(source: Source, found: list[Part]) -> Part:
  where = source.tensors.where
  if any(part.gated for part in found):
    return _unipelt(source, found)
  method, leaves, rules, notes = {}, {}, (), ()
  for number, part in enumerate(found, 1):
    renamed = {name: f'{name}_{number}' if name in method else name for name in part.method}
    method |= {renamed[name]: spec for name, spec in part.method.items()}
    for path, x in part.leaves.items():
      path = _renamed(path, renamed)
      if path in leaves:
        raise parts.refuse(where, f'two methods with {path}', 'methods at different places')
      leaves[path] = x
    rules += tuple(rule for rule in part.rules if rule not in rules)
    notes += part.notes
  if 'prompt' in method and {'invertible', 'reft'} & set(method):
    raise parts.refuse(where, 'a prompt with an invertible adapter or a ReFT', _ALONE)
  return Part(method, leaves, rules, notes)


def _renamed(path: str, names: dict[str, str]) -> str:
  """A path whose method has another name."""
  place, leaf = path.rsplit('/', 1)
  for name in sorted(names, key=len, reverse=True):
    if path.startswith('delta/') and place.endswith(f'_{name}'):
      return f'{place.removesuffix(name)}{names[name]}/{leaf}'
  return path


def _unipelt(source: Source, found: list[Part]) -> Part:
  """All three gated, as `hybrid.unipelt` has them."""
  methods = {name: spec for part in found for name, spec in part.method.items()}
  low, beside, ahead = (methods.get(name, {}) for name in ('lora', 'pfeiffer', 'prefix'))
  at = ahead.get('layers')
  fits = (
    all(part.gated for part in found)
    and set(methods) == {'lora', 'pfeiffer', 'prefix'}
    and beside['at'] == f'{at}/mlp_out'
    and beside['activation'] == 'relu'
    and low['at'] == f'{at}/attention/(query|value)/matmul'
    and not low['dropout']
  )
  if not fits:
    expected = 'a prefix, seq_bn with relu and LoRA of q and v, all gated, in the same layers'
    raise parts.refuse(source.tensors.where, 'gates of another union', expected)
  options = {
    'length': ahead['length'], 'hidden': ahead['hidden'], 'reduction': beside['reduction'],
    'rank': low['rank'], 'alpha': low['alpha'], 'layers': at,
  }  # fmt: skip
  names = dict.fromkeys(methods, 'unipelt')
  leaves = {_renamed(path, names): x for part in found for path, x in part.leaves.items()}
  notes = tuple(note for part in found for note in part.notes)
  method = {'unipelt': {'fn': 'hybrid.unipelt', **options}}
  return Part(method, leaves, notes=(*notes, _GATES))


def write(entries: dict[str, Entry], method: dict[str, dict]) -> Target:
  """Of all methods of an adapter together."""
  configs, tensors, inverse = [], {}, None
  for name, spec in method.items():
    for fn, entry in _components(entries[name], spec['fn']):
      if fn not in WRITERS:
        raise parts.refuse(
          entry.where, f'{fn}, which AdapterHub has no exact equal of',
          f'one of {", ".join(WRITERS)}, or another format',
        )  # fmt: skip
      target = WRITERS[fn](entry, fn)
      if set(tensors) & set(target.tensors):
        raise parts.refuse(entry.where, 'two methods at one place', 'one at each')
      tensors |= target.tensors
      if fn == 'adapter.invertible':
        inverse = target.configs[0]
      else:
        configs += target.configs
  if inverse is not None:
    like = [c for c in configs if c.get('non_linearity') == inverse['non_linearity']]
    like = [c for c in like if 'architecture' not in c]
    if not like:
      expected = 'a bottleneck adapter of the same activation beside it'
      raise parts.refuse('method', 'an invertible adapter', expected)
    like[0].update(inverse)
  _compatible(configs)
  if len(configs) == 1:
    return Target(configs, tensors)
  return Target([{'architecture': 'union', 'configs': configs}], tensors)


def _compatible(configs: list[dict]) -> None:
  """What `ConfigUnion.validate` and the order of the library's hooks allow."""
  kinds = [config.get('architecture', 'bottleneck') for config in configs]
  for kind in set(kinds):
    same = [c for c, k in zip(configs, kinds, strict=True) if k == kind]
    free = all('leave_out' in c and c['leave_out'] for c in same)
    if len(same) > 1 and not free and kind != 'bottleneck':
      raise parts.refuse('method', f'{len(same)} methods of the kind {kind}', 'one of a kind')
    places = [(c.get('mh_adapter'), c.get('output_adapter')) for c in same]
    apart = len(same) == 2 and all(x != y for x, y in zip(*places, strict=True))
    if len(same) > 1 and kind == 'bottleneck' and not free and not apart:
      raise parts.refuse('method', 'adapters at the same places', 'adapters at different ones')
  if not configs:
    raise parts.refuse('method', 'no method', 'one that AdapterHub has')
  inverted = any(c.get('inv_adapter') for c in configs)
  if 'prompt_tuning' in kinds and (inverted or 'reft' in kinds):
    raise parts.refuse('method', 'a prompt with an invertible adapter or a ReFT', _ALONE)


_SITES = {
  'hybrid.mam': {'prefix.prefix': 'kv|shared', 'adapter.parallel': 'mlp_out'},
  'hybrid.unipelt': {
    'prefix.prefix': 'kv|shared', 'adapter.pfeiffer': 'mlp_out', 'lora.lora': 'matmul',
  },
}  # fmt: skip


def _components(entry: Entry, fn: str) -> list[tuple[str, Entry]]:
  """The methods that a hybrid consists of."""
  found = []
  if fn not in _SITES:
    return [(fn, entry)]
  for own, sites in _SITES[fn].items():
    known = functions.signature(own)
    options = {k: v for k, v in entry.options.items() if k in known}
    options = functions.checked(entry.where, {'fn': own, **options})
    here = {s: p for s, p in entry.sites.items() if re.search(rf'(^|/)({sites})$', s)}
    found.append((own, entry._replace(options=options, sites=here)))
  return found


# AdapterFusion: the adapters' own folders, and one more of what attends to them.


def read_fusion(source: Source, name: str, config: Keys, adapters: list[Part]) -> Part:
  """Of fused adapters, each of which has been read from its folder."""
  for key in ('query', 'key'):
    config.only(key, True)
  for key in ('query_before_ln', 'residual_before', 'temperature'):
    config.only(key, False)
  value = parts.flag(config, 'value', True)
  parts.flag(config, 'value_before_softmax', True)  # linear, so that the order does not matter
  regularized = parts.flag(config, 'regularization')
  config.ignore(('value_initialized',))
  notes = parts.training_only(config, 'dropout_prob')
  config.finish()
  specs = [part.method for part in adapters]
  if any(spec != specs[0] for spec in specs) or set(specs[0]) != {'pfeiffer'}:
    raise parts.refuse(config.where, 'a fusion of other adapters', 'seq_bn of one size')
  own = {k: v for k, v in specs[0]['pfeiffer'].items() if k != 'fn'}
  if not own['at'].endswith('/mlp_out'):
    raise parts.refuse(config.where, f'a fusion of adapters at {own["at"]}', 'output_adapter')
  d, leaves = source.cfg.hidden, {}
  for path in adapters[0].leaves:
    renamed = _renamed(path, {'pfeiffer': 'fusion'})
    leaves[renamed] = np.stack([part.leaves[path] for part in adapters])
  for site in sorted({path.rsplit('/', 1)[0] for path in leaves}):
    i = int(re.search(r'layer_(\d+)/', site)[1])
    at = f'{_output(source.cfg, i)}.adapter_fusion_layer.{name}'
    for which in ('query', 'key'):
      leaves[f'{site}/{which}'] = parts.kernel(source.take(f'{at}.{which}.weight', d, d))
      leaves[f'{site}/{which}_bias'] = source.take(f'{at}.{which}.bias', d)
    eye = np.eye(d, dtype=np.float32)
    leaves[f'{site}/value'] = (
      parts.kernel(source.take(f'{at}.value.weight', d, d)) if value else eye
    )
  options = {'n': len(adapters), **own, 'regularization': 0.01 if regularized else 0.0}
  rules = (('delta/.*_fusion/(down|up).*', 'frozen'),)
  if not value:
    rules += (('delta/.*_fusion/value', 'frozen'),)
  return Part({'fusion': {'fn': 'hybrid.fusion', **options}}, leaves, rules, notes)


def _output(cfg, i: int) -> str:
  block = 'output_adapters' if cfg.architecture == 'distilbert' else 'output'
  return f'{parts.layer(cfg, i)}.{block}'


def write_fusion(entry: Entry) -> tuple[list[tuple[str, Target]], str, Target]:
  """([(name, adapter)], the fusion's name, fusion) of hybrid.fusion."""
  options, cfg, n = entry.options, entry.cfg, entry.options['n']
  names = [f'{entry.name}_{k}' for k in range(n)]
  fused, tensors, each = ','.join(names), {}, [{} for _ in names]
  entry.known('mlp_out')
  for i in entry.common('mlp_out'):
    p = entry.sites[f'layer_{i}/mlp_out']
    at = f'{_output(cfg, i)}.adapter_fusion_layer.{fused}'
    for which in ('query', 'key'):
      tensors[f'{at}.{which}.weight'] = parts.kernel(p.take(which))
      tensors[f'{at}.{which}.bias'] = p.take(f'{which}_bias')
    tensors[f'{at}.value.weight'] = parts.kernel(p.take('value'))
    for leaf in p:
      stack = p.take(leaf)
      for k in range(n):
        each[k].setdefault(f'layer_{i}/mlp_out', {})[leaf] = stack[k]
  own = {'reduction': options['reduction'], 'activation': options['activation']}
  own['at'] = options['at']
  adapters = []
  for name, sites in zip(names, each, strict=True):
    keys = {site: Keys(x, entry.where) for site, x in sites.items()}
    alone = entry._replace(options=own, sites=keys, name=name)
    adapters.append((name, bottleneck.write(alone, 'adapter.pfeiffer')))
  config = FUSION | {'regularization': options['regularization'] > 0}
  return adapters, fused, Target([config], tensors)
