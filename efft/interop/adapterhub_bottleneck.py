"""AdapterHub's BnConfig: sequential and parallel adapters, Compacter, Adapter+, invertible ones.

The library describes them by flags; the combinations of flags that efft has methods for are rows
of `KINDS`. Source: adapters 1.3.0, methods/bottleneck.py, methods/modeling.py.
"""

from typing import NamedTuple

import numpy as np

from efft.errors import InputError
from efft.interop import adapterhub_parts as parts
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys

DEFAULTS = {
  'adapter_residual_before_ln': False, 'cross_adapter': False, 'dropout': 0.0,
  'factorized_phm_W': True, 'factorized_phm_rule': False,
  'hypercomplex_nonlinearity': 'glorot-uniform', 'init_weights': 'bert',
  'init_weights_seed': None, 'inv_adapter': None, 'inv_adapter_reduction_factor': None,
  'is_parallel': False, 'learn_phm': True, 'leave_out': [], 'ln_after': False,
  'ln_before': False, 'mh_adapter': False, 'original_ln_after': True,
  'original_ln_before': False, 'output_adapter': True, 'phm_bias': True, 'phm_c_init': 'normal',
  'phm_dim': 4, 'phm_init_range': 0.0001, 'phm_layer': False, 'phm_rank': 1,
  'residual_before_ln': True, 'scaling': 1.0, 'shared_W_phm': False, 'shared_phm_rule': True,
  'stochastic_depth': 0.0, 'use_gating': False,
}  # fmt: skip
# What decides only where training starts, or acts in decoders.
_START = (
  'init_weights', 'init_weights_seed', 'phm_c_init', 'phm_init_range', 'hypercomplex_nonlinearity',
  'cross_adapter', 'attention_type', 'new_attention_norm',
)  # fmt: skip
# Compacters whose kernels are made in another way.
_PHM = ('factorized_phm_W', 'shared_W_phm', 'shared_phm_rule', 'factorized_phm_rule', 'phm_bias')
_SITES = {'attention_out': 'mh_adapter', 'mlp_out': 'output_adapter'}


class Kind(NamedTuple):
  """A method of efft in the library's flags.

  Attributes:
    flags: is_parallel, original_ln_before, original_ln_after, phm_layer.
    residual: values of residual_before_ln under which it is this method.
    scaling: the kind of scaling: 'one' (1.0), 'number' (also 'learned') or 'channel'.
  """

  fn: str
  flags: tuple[bool, bool, bool, bool]
  residual: tuple = (True,)
  scaling: str = 'one'

  @property
  def phm(self) -> bool:
    return self.flags[3]


_FLAGS = ('is_parallel', 'original_ln_before', 'original_ln_after', 'phm_layer')
KINDS = (
  Kind('adapter.houlsby', (False, False, True, False), (True, False)),
  Kind('adapter.pfeiffer', (False, True, True, False)),
  Kind('phm.compacter', (False, False, True, True), (True, False)),
  Kind('phm.compacter_plus', (False, True, True, True)),
  Kind('adapter.adapter_plus', (False, True, False, False), (False,), 'channel'),
  Kind('adapter.parallel', (True, False, True, False), (True, False, 'post_add'), 'number'),
  Kind('adapter.parallel', (True, True, True, False), (True, False, 'post_add'), 'number'),
)
_BY_FN = {kind.fn: kind for kind in reversed(KINDS)}
# Left out layers come back by a draw while training alone.
_BY_FN['wrap.adapterdrop'] = _BY_FN['adapter.pfeiffer']


def read(source: Source, config: Keys) -> Part:
  """Of a BnConfig."""
  cfg, where = source.cfg, config.where
  kind = _kind(config)
  scale = _scaling(config, kind)
  config.only('ln_before', False)
  config.only('ln_after', False)
  config.take('adapter_residual_before_ln', False)  # of the norm that is not there
  act = parts.activation(config)
  layers = parts.kept_layers(config, cfg)
  places = [site for site, key in _SITES.items() if parts.flag(config, key)]
  if not places or (kind.scaling == 'channel' and places != ['mlp_out']):
    raise parts.refuse(where, f'adapters at {" and ".join(places) or "no place"}')
  sizes = _sizes(config, cfg, layers)
  gated = parts.flag(config, 'use_gating')
  if gated and kind.fn != 'adapter.pfeiffer':
    raise parts.refuse(where, 'use_gating of such an adapter', 'gates of `seq_bn`')
  depth = 0.0
  if kind.scaling == 'channel':
    depth = parts.number(config, 'stochastic_depth', 0.0)
  notes = parts.training_only(config, 'dropout', 'stochastic_depth')
  factor = float(next(iter(sizes.values()))[1])
  terms, rank, learnt = _phm(config, kind)
  inverse = _invertible(source, config, act)
  config.ignore(_START)

  method, leaves = dict(inverse.method), dict(inverse.leaves)
  groups = sorted({size for size, _ in sizes.values()}, reverse=True)
  if kind.phm and len(groups) > 1:
    raise parts.refuse(where, 'Compacters of several sizes', 'one reduction_factor')
  for n, size in enumerate(groups, 1):
    name = kind.fn.partition('.')[2] + (str(n) if n > 1 else '')
    own = [i for i in layers if sizes[i][0] == size]
    if len(groups) > 1:
      factor = float(sizes[own[0]][1])
    at = f'{parts.pattern(cfg, own)}/{_site_pattern(kind, places)}'
    options = {'activation': act, 'at': at}
    if kind.fn in ('adapter.houlsby', 'adapter.parallel'):
      options['size'] = size
    else:
      options['reduction'] = parts.reduction(where, cfg.hidden, size, factor)
    if kind.phm:
      options |= {'n': terms, 'rank': rank}
    if kind.scaling == 'number':
      options |= {'learn_scale': True} if scale == 'learned' else {'scale': float(scale)}
      options.setdefault('scale', 1.0)
    if kind.scaling == 'channel':
      options['depth_dropout'] = float(depth)
    method[name] = {'fn': kind.fn, **options}
    for i in own:
      for place in places:
        found = _tensors(source, stem(cfg, i, place, source.name), size, terms, rank, kind.phm)
        if scale in ('learned', 'channel'):
          shape = 1 if scale == 'learned' else cfg.hidden
          found['scale'] = source.take(f'{stem(cfg, i, place, source.name)}.scaling', shape)
        if gated:
          found |= source.gate(f'{stem(cfg, i, place, source.name)}.gate')
        site = 'output' if kind.scaling == 'channel' else place
        leaves |= parts.delta(f'layer_{i}/{site}', name, found)
    if kind.phm:
      rule = source.take(f'shared_parameters.{source.name}.phm_rule', terms, terms, terms)
      leaves[f'delta/shared_{name}/rule'] = rule
  rules = () if learnt or not kind.phm else (('delta/shared_.*/rule', 'frozen'),)
  return Part(method, leaves, rules, notes, gated)


def stem(cfg, i: int, place: str, name: str) -> str:
  """The library's name of an adapter."""
  if cfg.architecture == 'distilbert':
    block = {'attention_out': 'attention_adapters', 'mlp_out': 'output_adapters'}[place]
  else:
    block = {'attention_out': 'attention.output', 'mlp_out': 'output'}[place]
  return f'{parts.layer(cfg, i)}.{block}.adapters.{name}'


def _kind(config: Keys) -> Kind:
  flags = tuple(parts.flag(config, key, DEFAULTS[key]) for key in _FLAGS)
  residual = config.take('residual_before_ln', True)
  for kind in KINDS:
    if kind.flags == flags and residual in kind.residual and type(residual) in (bool, str):
      return kind
  found = ', '.join(f'{k}={v}' for k, v in zip(_FLAGS, flags, strict=True))
  raise parts.refuse(config.where, f'{found}, residual_before_ln={residual!r:.100}')


def _scaling(config: Keys, kind: Kind):
  scale = config.take('scaling', 1.0)
  if scale == 'channel' and kind.scaling == 'channel':
    return scale
  if kind.scaling == 'number' and (scale == 'learned' or type(scale) in (int, float)):
    return scale
  if kind.scaling == 'one' and type(scale) in (int, float) and scale == 1:
    return scale
  raise parts.refuse(config.where, f'scaling={scale!r:.100} of {kind.fn}')


def _sizes(config: Keys, cfg, layers) -> dict[int, tuple[int, float]]:
  """{layer: (units, reduction factor)}."""
  given = config.take('reduction_factor')
  table = given if isinstance(given, dict) else {'default': given}
  sizes = {}
  for i in layers:
    factor = table.get(str(i), table.get('default'))
    if type(factor) not in (int, float) or not 0 < factor < 1e6:
      found = f'reduction_factor={given!r:.100}'
      raise InputError(config.where, found, 'a number above 0 for every layer', 'correct it')
    sizes[i] = (max(1, int(cfg.hidden // factor)), factor)
  return sizes


def _phm(config: Keys, kind: Kind) -> tuple[int, int, bool]:
  """(terms, rank, whether the rule trains) of a Compacter."""
  terms = parts.whole(config, 'phm_dim', 4)
  rank = parts.whole(config, 'phm_rank', 1)
  learnt = parts.flag(config, 'learn_phm', True)
  for key in _PHM:
    if kind.phm:
      config.only(key, DEFAULTS[key])
    config.take(key, None)
  return terms, rank, learnt


def _site_pattern(kind: Kind, places: list[str]) -> str:
  if kind.scaling == 'channel':
    return 'output'
  return places[0] if len(places) == 1 else '(attention|mlp)_out'


def _tensors(source: Source, at: str, size: int, terms: int, rank: int, phm: bool) -> dict:
  """The leaves of one bottleneck."""
  d, found = source.cfg.hidden, {}
  for name, place, d_in, d_out in (
    ('down', f'{at}.adapter_down.0', d, size),
    ('up', f'{at}.adapter_up', size, d),
  ):
    if phm:
      if d_in % terms or d_out % terms:
        found = f'{d_in} x {d_out} units and phm_dim={terms}'
        raise InputError(source.tensors.where, found, 'multiples of it', 'correct the config')
      found[f'{name}_s'] = source.take(f'{place}.W_left', terms, d_in // terms, rank)
      found[f'{name}_t'] = source.take(f'{place}.W_right', terms, rank, d_out // terms)
      found[f'{name}_bias'] = source.take(f'{place}.b', d_out)
    else:
      found[name] = parts.kernel(source.take(f'{place}.weight', d_out, d_in))
      found[f'{name}_bias'] = source.take(f'{place}.bias', d_out)
  return found


def _invertible(source: Source, config: Keys, act: str) -> Part:
  """MAD-X's adapter of the embeddings, where there is one."""
  old = config.take('invertible_adapter', None) or {}  # as adapter-transformers 1 spelt it
  if not isinstance(old, dict):
    raise parts.refuse(config.where, f'invertible_adapter={old!r:.100}', 'a config')
  kind = config.take('inv_adapter', old.get('block_type'))
  factor = config.take('inv_adapter_reduction_factor', old.get('reduction_factor'))
  if kind is None:
    return Part({}, {})
  if kind != 'nice' or type(factor) not in (int, float) or factor <= 0:
    raise parts.refuse(config.where, f'inv_adapter={kind!r:.100}', 'nice, with its reduction')
  d, cfg = source.cfg.hidden, source.cfg
  if cfg.embed_dim != d:
    raise parts.refuse(config.where, 'an invertible adapter before a projection of embeddings')
  halves = {'F': (d - d // 2, d // 2), 'G': (d // 2, d - d // 2)}
  leaves, sizes = {}, set()
  for net, (d_in, d_out) in halves.items():
    size = int(d_in // factor)
    sizes.add(parts.reduction(config.where, d_in, size, factor) if size else 0)
    at, own = f'invertible_adapters.{source.name}.{net}', net.lower()
    leaves |= {
      f'{own}_down': parts.kernel(source.take(f'{at}.0.weight', size, d_in)),
      f'{own}_down_bias': source.take(f'{at}.0.bias', size),
      f'{own}_up': parts.kernel(source.take(f'{at}.2.weight', d_out, size)),
      f'{own}_up_bias': source.take(f'{at}.2.bias', d_out),
    }
  if len(sizes) != 1 or 0 in sizes:
    raise parts.refuse(config.where, f'inv_adapter_reduction_factor={factor}', 'a whole number')
  options = {'reduction': sizes.pop(), 'activation': act}
  method = {'invertible': {'fn': 'adapter.invertible', **options}}
  return Part(method, parts.delta('embed', 'invertible', leaves))


def write(entry: Entry, fn: str) -> Target:
  """Of the bottleneck methods of efft."""
  kind, cfg, d = _BY_FN[fn], entry.cfg, entry.cfg.hidden
  options = entry.options
  shared = entry.sites.get('shared', Keys({}, entry.where))
  shared.ignore(('last',))  # of adapterdrop: counts layers while training
  entry.known(*(['output'] if kind.scaling == 'channel' else _SITES))
  places = ['output'] if kind.scaling == 'channel' else [s for s in _SITES if entry.layers(s)]
  layers = entry.common(*places)
  tensors, sizes = {}, set()
  for i in layers:
    for place in places:
      p = entry.sites[f'layer_{i}/{place}']
      at = stem(cfg, i, 'mlp_out' if place == 'output' else place, entry.name)
      for own, target in (('down', f'{at}.adapter_down.0'), ('up', f'{at}.adapter_up')):
        bias = p.take(f'{own}_bias')
        if own == 'down':
          sizes.add(len(bias))
        if kind.phm:
          tensors[f'{target}.W_left'] = p.take(f'{own}_s')
          tensors[f'{target}.W_right'] = p.take(f'{own}_t')
          tensors[f'{target}.b'] = bias
        else:
          tensors[f'{target}.weight'] = parts.kernel(p.take(own))
          tensors[f'{target}.bias'] = bias
      if 'scale' in p:
        tensors[f'{at}.scaling'] = p.take('scale')
      if 'gate' in p:
        tensors[f'{at}.gate.weight'] = parts.kernel(p.take('gate'))
        tensors[f'{at}.gate.bias'] = p.take('gate_bias')
      p.finish()
  if len(sizes) != 1:
    raise parts.refuse(entry.where, 'adapters of several sizes', 'one size')
  size = sizes.pop()
  config = dict(zip(_FLAGS, kind.flags, strict=True)) | {
    'residual_before_ln': kind.residual[0],
    'mh_adapter': 'attention_out' in places,
    'output_adapter': places != ['attention_out'],
    'non_linearity': options['activation'],
    'reduction_factor': factor_of(d, size, options.get('reduction')),
    'leave_out': entry.left_out(layers),
    'use_gating': any(name.endswith('.gate.weight') for name in tensors),
  }
  if kind.phm:
    rule = shared.take('rule')
    tensors[f'shared_parameters.{entry.name}.phm_rule'] = rule
    config |= {'phm_dim': options['n'], 'phm_rank': options['rank']}
  if kind.scaling == 'number':
    config['scaling'] = 'learned' if options['learn_scale'] else float(options['scale'])
    config['init_weights'] = 'mam_adapter'
  if kind.scaling == 'channel':
    config |= {'scaling': 'channel', 'stochastic_depth': float(options['depth_dropout'])}
    config['init_weights'] = 'houlsby'
  shared.finish()
  return Target([DEFAULTS | config], tensors)


def factor_of(width: int, size: int, wanted: int | None = None) -> int | float:
  """A reduction factor that the library turns into `size`."""
  if wanted and width // wanted == size:
    return wanted
  factor = width // size if width % size == 0 else width / size
  # Rounding may leave a quotient just below the whole number.
  return factor if int(width // factor) == size else float(np.nextafter(factor, 0))


def write_invertible(entry: Entry, fn: str) -> Target:
  """Of `adapter.invertible`: goes with a bottleneck adapter of the same activation."""
  entry.known('embed')
  p, tensors = entry.sites['embed'], {}
  for net in 'FG':
    at, own = f'invertible_adapters.{entry.name}.{net}', net.lower()
    for index, part in ((0, 'down'), (2, 'up')):
      tensors[f'{at}.{index}.weight'] = parts.kernel(p.take(f'{own}_{part}'))
      tensors[f'{at}.{index}.bias'] = p.take(f'{own}_{part}_bias')
  p.finish()
  options = entry.options
  return Target([{
    'inv_adapter': 'nice', 'inv_adapter_reduction_factor': options['reduction'],
    'non_linearity': options['activation'],
  }], tensors)  # fmt: skip
