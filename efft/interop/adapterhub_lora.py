"""AdapterHub's LoRAConfig: LoRA, DoRA, VeRA, DVoRA and (IA)3, told apart by their options.

Where the library computes something else than efft's method of that name, what differs is a
constant of the checkpoint and is folded into numbers that efft has. Source: adapters 1.3.0,
methods/lora.py.
"""

import numpy as np

from efft.interop import adapterhub_ia3
from efft.interop import adapterhub_parts as parts
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys

DEFAULTS = {
  'alpha': 8, 'architecture': 'lora', 'attn_matrices': ['q', 'v'], 'composition_mode': 'add',
  'dropout': 0.0, 'dtype': None, 'init_weights': 'lora', 'init_weights_seed': None,
  'intermediate_lora': False, 'leave_out': [], 'output_lora': False, 'r': 8,
  'selfattn_lora': True, 'use_dora': False, 'use_gating': False, 'vera_b': None, 'vera_d': None,
}  # fmt: skip
_MATRICES = {'q': 'attention/query', 'k': 'attention/key', 'v': 'attention/value'}
_GATED_ALPHA = 2  # UniPELTConfig's, which does nothing there
_BIAS_NOTE = (
  'AdapterHub scales the bias of a linear with DoRA too: its scaled biases are kept with the '
  'adapter, and do not follow the magnitudes in further training'
)
_VERA_NOTE = (
  "AdapterHub's VeRA trains whole matrices where the paper has diagonals: kept as the LoRA that "
  'it is'
)


def read(source: Source, config: Keys) -> Part:
  """Of a LoRAConfig."""
  cfg = source.cfg
  modules = _modules(config)
  layers = parts.kept_layers(config, cfg)
  config.only('dtype', None, 'float32')
  config.ignore(('init_weights', 'init_weights_seed'))
  mode = config.take('composition_mode', 'add')
  r, alpha = parts.whole(config, 'r', 8), parts.number(config, 'alpha', 8)
  dropout = parts.number(config, 'dropout', 0.0)
  gated = parts.flag(config, 'use_gating')
  dora = parts.flag(config, 'use_dora')
  # What they start at; that one of them is a float is what makes a VeRA.
  vera = [config.take(key, None) for key in ('vera_d', 'vera_b')]
  if mode == 'scale':
    if r != 1 or alpha != 1 or gated or dora or dropout:
      raise parts.refuse(config.where, f'(IA)3 with r={r}, alpha={alpha} or more')
    return adapterhub_ia3.read(source, config, modules, layers)
  if mode != 'add' or not all(x is None or type(x) is float for x in vera):
    raise parts.refuse(config.where, f'composition_mode={mode!r:.100}', 'add or scale')
  if gated and (dora or vera != [None, None]):
    raise parts.refuse(config.where, 'use_gating of such a LoRA', 'gates of plain LoRA')
  sites = [f'layer_{i}/{module}' for i in layers for module in modules]
  at = f'{parts.pattern(cfg, layers)}/{_site_pattern(modules)}/matmul'
  options = {'rank': r, 'dropout': float(dropout), 'at': at}
  # The library forgets the scale where there is a gate.
  scale = 1.0 if gated else alpha / r
  if vera != [None, None]:
    factors = _vera(source, sites, r)
    if not dora and all(_diagonal(x) for pair in factors.diagonals for x in pair):
      return _as_vera(source, factors, sites, scale, options, vera)
    pairs, notes = factors.pairs, (_VERA_NOTE,)
  else:
    pairs, notes = {site: _pair(source, site, r) for site in sites}, ()
  options['alpha'] = float(r if gated else alpha)
  name, leaves = 'dora' if dora else 'lora', {}
  for site, (a, b) in pairs.items():
    own = {'a': a, 'b': b}
    if dora:
      own['m'], bias = _read_dora(source, site, a, b, scale)
      leaves[f'params/{site}/bias'] = bias
    if gated:
      own |= source.gate(f'{parts.lora_stem(source.cfg, site, source.name)}.gate')
    leaves |= parts.delta(f'{site}/matmul', name, own)
  method = {name: {'fn': f'lora.{name}', **options}}
  return Part(method, leaves, notes=notes + ((_BIAS_NOTE,) if dora else ()), gated=gated)


def _modules(config: Keys) -> list[str]:
  given = config.take('attn_matrices', ['q', 'v'])
  if not isinstance(given, list) or not all(type(x) is str and x in _MATRICES for x in given):
    raise parts.refuse(config.where, f'attn_matrices={given!r:.100}', 'of q, k and v')
  attention = parts.flag(config, 'selfattn_lora', True)
  found = [module for key, module in _MATRICES.items() if attention and key in given]
  found += [module for key, module in adapterhub_ia3.FFN.items() if parts.flag(config, key)]
  if not found:
    raise parts.refuse(config.where, 'a LoRA of nothing', 'places to act')
  return found


def _site_pattern(modules: list[str]) -> str:
  groups = {}
  for module in modules:
    block, _, linear = module.partition('/')
    groups.setdefault(block, []).append(linear)
  found = [f'{k}/{v[0]}' if len(v) == 1 else f'{k}/({"|".join(v)})' for k, v in groups.items()]
  return found[0] if len(found) == 1 else f'({"|".join(found)})'


def _pair(source: Source, site: str, r: int) -> tuple[np.ndarray, np.ndarray]:
  d_in, d_out = parts.kernel_shape(source.base, site)
  at = parts.lora_stem(source.cfg, site, source.name)
  a, b = source.take(f'{at}.lora_A', r, d_in), source.take(f'{at}.lora_B', d_out, r)
  return parts.kernel(a), parts.kernel(b)


# DoRA: the library computes m / |W + A B| (x W + bias + s x A B), efft m' / |W + s A B| (x W +
# s x A B) + bias': m' and bias' follow.


def _norms(base, site: str, a, b, scale: float) -> tuple[np.ndarray, np.ndarray]:
  """(|W + A B|, |W + s A B|), of each output unit, float64."""
  w = parts.parameters_of(base)[f'params/{site}/kernel'].astype(np.float64)
  low = a.astype(np.float64) @ b.astype(np.float64)
  return np.linalg.norm(w + low, axis=0), np.linalg.norm(w + scale * low, axis=0)


def _scaled_bias(base, site: str, m, norm) -> np.ndarray:
  return (parts.parameters_of(base)[f'params/{site}/bias'] * (m / norm)).astype(np.float32)


def _read_dora(source: Source, site: str, a, b, scale: float) -> tuple[np.ndarray, np.ndarray]:
  at = parts.lora_stem(source.cfg, site, source.name)
  m = source.take(f'{at}.m.weight', b.shape[1], 1).ravel()
  plain, scaled = _norms(source.base, site, a, b, scale)
  ours = m if scale == 1 else (m * (scaled / plain)).astype(np.float32)
  return ours, _scaled_bias(source.base, site, m, plain)


class _Factors:
  """The matrices of a VeRA: those that a site trains, and the LoRAs that they amount to."""

  def __init__(self):
    self.a = self.b = None
    self.diagonals: list[tuple[np.ndarray, np.ndarray]] = []
    self.pairs: dict[str, tuple[np.ndarray, np.ndarray]] = {}


def _vera(source: Source, sites: list[str], r: int) -> _Factors:
  found, shared = _Factors(), f'shared_parameters.{source.name}'
  shapes = {parts.kernel_shape(source.base, site) for site in sites}
  if len(shapes) != 1:
    raise parts.refuse(source.tensors.where, 'a VeRA of kernels of several shapes', 'one shape')
  ((d_in, d_out),) = shapes
  found.a = source.take(f'{shared}.lora_A', r, d_in)
  found.b = source.take(f'{shared}.lora_B', d_out, r)
  for site in sites:
    at = parts.lora_stem(source.cfg, site, source.name)
    d, b = source.take(f'{at}.vera_D', r, r), source.take(f'{at}.vera_B', d_out, d_out)
    found.diagonals.append((d, b))
    inner, a, outer, common = (x.astype(np.float64) for x in (d, found.a, b, found.b))
    found.pairs[site] = parts.kernel(inner @ a), parts.kernel(outer @ common)
  return found


def _diagonal(x: np.ndarray) -> bool:
  return np.array_equal(x, np.diag(np.diag(x)))


def _as_vera(source, factors, sites, scale, options, starts) -> Part:
  leaves = {
    'delta/shared_vera/a': parts.kernel(factors.a),
    'delta/shared_vera/b': parts.kernel(factors.b),
  }
  for site, (d, b) in zip(sites, factors.diagonals, strict=True):
    own = {'lambda_d': np.diag(d).copy(), 'lambda_b': np.float32(scale) * np.diag(b)}
    leaves |= parts.delta(f'{site}/matmul', 'vera', own)
  options = {**options, 'd_initial': float(0.1 if starts[0] is None else starts[0])}
  method = {'vera': {'fn': 'shared_lowrank.vera', **options}}
  return Part(method, leaves, (('delta/shared_vera/.*', 'frozen'),))


def write(entry: Entry, fn: str) -> Target:
  """Of lora.lora, lora.dylora at its full rank, lora.dora."""
  cfg, options, tensors = entry.cfg, entry.options, {}
  lone = ('lora_bias', 'rank_pattern', 'alpha_pattern')
  used = [key for key in lone if options.get(key)]
  if used or options.get('eval_rank', 0) not in (0, options['rank']):
    raise parts.refuse(entry.where, f'{used[0] if used else "eval_rank"}', 'one rank and scale')
  config, sites = _placed(entry)
  found = {site: _leaves(entry, site) for site in sites}
  ranks = {p['a'].shape[1] for p in found.values()}
  if len(ranks) != 1:
    raise parts.refuse(entry.where, f'the ranks {sorted(ranks)}', 'one rank')
  r = ranks.pop()
  alpha = options['alpha'] * (r**0.5 if options.get('use_rslora') else 1)
  dora, gated = fn == 'lora.dora', any('gate' in p for p in found.values())
  for site, p in found.items():
    at = parts.lora_stem(cfg, site, entry.name)
    a, b = p.pop('a'), p.pop('b')
    if gated and alpha != r:
      # The library forgets the scale where there is a gate.
      b = np.float32(alpha / r) * b
    tensors |= {f'{at}.lora_A': parts.kernel(a), f'{at}.lora_B': parts.kernel(b)}
    if dora:
      m = _write_dora(entry, site, a, b, p.pop('m'), alpha / r)
      tensors[f'{at}.m.weight'] = m[:, None]
    if gated:
      tensors[f'{at}.gate.weight'] = parts.kernel(p.pop('gate'))
      tensors[f'{at}.gate.bias'] = p.pop('gate_bias')
    Keys(p, entry.where).finish()
  if gated:
    alpha = _GATED_ALPHA
  config |= {'r': r, 'alpha': _integral(alpha), 'dropout': options['dropout']}
  return Target([DEFAULTS | config | {'use_dora': dora, 'use_gating': gated}], tensors)


def _leaves(entry: Entry, site: str) -> dict[str, np.ndarray]:
  keys = entry.sites[f'{site}/matmul']
  return {leaf: keys.take(leaf) for leaf in keys}


def _integral(x: float) -> int | float:
  return int(x) if x == int(x) else float(x)


def _placed(entry: Entry) -> tuple[dict, list[str]]:
  """(the library's options of place, our sites)."""
  places = {**{v: k for k, v in _MATRICES.items()}, **{v: k for k, v in adapterhub_ia3.FFN.items()}}
  entry.known(*(f'{module}/matmul' for module in places))
  used = [module for module in places if entry.layers(f'{module}/matmul')]
  layers = entry.common(*(f'{module}/matmul' for module in used))
  matrices = [places[module] for module in used if module in _MATRICES.values()]
  config = {
    'selfattn_lora': bool(matrices),
    'attn_matrices': matrices or ['q', 'v'],
    **{key: module in used for key, module in adapterhub_ia3.FFN.items()},
    'leave_out': entry.left_out(layers),
  }
  return config, [f'layer_{i}/{module}' for i in layers for module in used]


def _write_dora(entry: Entry, site: str, a, b, ours, scale: float) -> np.ndarray:
  plain, scaled = _norms(entry.base, site, a, b, scale)
  m = ours if scale == 1 else (ours * (plain / scaled)).astype(np.float32)
  path = f'params/{site}/bias'
  bias = entry.params.take(path, parts.parameters_of(entry.base)[path])
  if not np.allclose(bias, _scaled_bias(entry.base, site, m, plain), rtol=2e-6, atol=1e-9):
    raise parts.refuse(
      entry.where, f'a bias at {site} that the magnitudes do not scale', "AdapterHub's DoRA"
    )
  return m


def write_vera(entry: Entry, fn: str) -> Target:
  """Of shared_lowrank.vera."""
  config, sites = _placed(entry)
  shared, tensors = entry.sites['shared'], {}
  a, b = shared.take('a'), shared.take('b')
  for site in sites:
    p, at = _leaves(entry, site), parts.lora_stem(entry.cfg, site, entry.name)
    d_in, d_out = parts.parameters_of(entry.base)[f'params/{site}/kernel'].shape
    if a.shape[0] != d_in or b.shape[1] != d_out:
      raise parts.refuse(entry.where, 'a VeRA of kernels of several shapes', 'one shape')
    tensors[f'{at}.vera_D'] = np.diag(p.pop('lambda_d'))
    tensors[f'{at}.vera_B'] = np.diag(p.pop('lambda_b'))
    Keys(p, entry.where).finish()
  shared.finish()
  tensors[f'shared_parameters.{entry.name}.lora_A'] = parts.kernel(a)
  tensors[f'shared_parameters.{entry.name}.lora_B'] = parts.kernel(b)
  r, options = a.shape[1], entry.options
  config |= {
    'r': r, 'alpha': r, 'dropout': options['dropout'], 'vera_d': float(options['d_initial']),
    'vera_b': 0.0, 'init_weights': 'vera',
  }  # fmt: skip
  return Target([DEFAULTS | config], tensors)
