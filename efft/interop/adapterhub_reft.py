"""AdapterHub's ReFT: LoReFT, NoReFT, DiReFT. Source: adapters 1.3.0, methods/reft.py.

The library does not write whether the projection is subtracted, and loads a DiReFT as a NoReFT,
even where its config says otherwise. efft reads what the library would compute, and writes a DiReFT
as the NoReFT that computes the same: h (W + R) + b - h R.

LoReFT's projection is torch's orthogonal parametrisation (torch/nn/utils/parametrizations.py):
base @ the Householder product of what lies below the diagonal, times the diagonal as integers.
Weight decay takes the diagonal off -1, its integers become 0, and the edit is none at all.
"""

import numpy as np

from efft.interop import adapterhub_parts as parts
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys
from efft.peft.intervene import orthonormal_columns

DEFAULTS = {
  'architecture': 'reft', 'dropout': 0.05, 'dtype': None, 'init_weights_seed': None,
  'layers': 'all', 'non_linearity': None, 'orthogonality': False, 'output_reft': True,
  'prefix_positions': 3, 'r': 1, 'suffix_positions': 0, 'tied_weights': False,
}  # fmt: skip
_LOST = (
  'AdapterHub does not write whether a ReFT subtracts the projection: it is read as the library '
  'reads it, with the subtraction. If it was trained as DiReFT, add "subtract_projection": false '
  'to its config'
)
_ZERO = (
  "the signs of this LoReFT's projection have moved off 1, so that AdapterHub rounds them to 0: "
  'kept as what it computes'
)


def read(source: Source, config: Keys) -> Part:
  """Of a ReftConfig."""
  cfg = source.cfg
  config.only('non_linearity', None)
  config.only('output_reft', True)
  config.only('dtype', None, 'float32')
  config.ignore(('init_weights_seed',))
  r = parts.whole(config, 'r')
  first = parts.whole(config, 'prefix_positions', low=0)
  last = parts.whole(config, 'suffix_positions', low=0)
  dropout = parts.number(config, 'dropout', 0.05)
  orthogonal = parts.flag(config, 'orthogonality')
  tied = parts.flag(config, 'tied_weights', False)
  said = 'subtract_projection' in config
  subtract = parts.flag(config, 'subtract_projection', True)
  if first and last and not tied:
    reason = 'prefix and suffix without tied_weights, which short texts have in common'
    raise parts.refuse(config.where, reason, 'tied_weights, or one end')
  if not first + last or (orthogonal and r >= cfg.hidden):
    raise parts.refuse(config.where, f'{first + last} positions and r={r}')
  given = config.take('layers', 'all')
  if given == 'all':
    given = range(cfg.layers)
  else:
    given = parts.numbers(Keys({'layers': given}, config.where), 'layers')
  layers = [i for i in range(cfg.layers) if i in given]
  if not layers:
    raise parts.refuse(config.where, 'a ReFT of no layers', 'layers')

  units, leaves, zero = 1 if tied else 2, {}, False
  used = 0 if tied or first else 1
  for i in layers:
    for unit in range(units):
      at = f'{parts.layer(cfg, i)}.reft_layer.refts.{source.name}.units.{unit}'
      own = _unit(source, at, r, orthogonal)
      if unit == used:
        zero |= orthogonal and np.abs(own['r'].T @ own['r'] - np.eye(r)).max() > 1e-4
        found = own
    leaves[i] = found
  fn = 'loreft' if orthogonal and subtract and not zero else 'noreft' if subtract else 'direft'
  options = {'rank': r, 'first': first, 'last': last, 'dropout': float(dropout)}
  options['at'] = f'{parts.pattern(cfg, layers)}/output'
  flat = {}
  for i, own in leaves.items():
    flat |= parts.delta(f'layer_{i}/output', 'reft', own)
  notes = (_ZERO,) if zero else () if said or orthogonal else (_LOST,)
  return Part({'reft': {'fn': f'intervene.{fn}', **options}}, flat, notes=notes)


def _unit(source: Source, at: str, r: int, orthogonal: bool) -> dict[str, np.ndarray]:
  d = source.cfg.hidden
  if orthogonal:
    own = f'{at}.projection.parametrizations.weight'
    projection = _orthogonal(
      source.take(f'{own}.original', r, d), source.take(f'{own}.0.base', d, d)
    )
  else:
    projection = parts.kernel(source.take(f'{at}.projection.weight', r, d))
  return {
    'r': projection,
    'w': parts.kernel(source.take(f'{at}.learned_source.weight', r, d)),
    'b': source.take(f'{at}.learned_source.bias', r),
  }


def _orthogonal(original: np.ndarray, base: np.ndarray) -> np.ndarray:
  """[d, r] of torch's parametrisation, from [r, d] and [d, d]."""
  x = original.T.astype(np.float64)
  r = x.shape[1]
  q = np.eye(*x.shape)
  for i in reversed(range(r)):
    v = np.concatenate([np.zeros(i), [1.0], x[i + 1 :, i]])
    q -= 2 / (v @ v) * np.outer(v, v @ q)
  signs = np.trunc(np.diagonal(x))
  return (base.astype(np.float64) @ (q * signs)).astype(np.float32)


def write(entry: Entry, fn: str) -> Target:
  """Of the three; one end has one unit, as tied weights have."""
  options, cfg, tensors = entry.options, entry.cfg, {}
  first, last = options['first'], options['last']
  end = '' if options['tied'] else 'first_' if first else 'last_'
  if first and last and not options['tied']:
    reason = 'an edit for each end, which short texts have in common'
    raise parts.refuse(entry.where, reason, 'tied=True, or one end')
  entry.known('output')
  layers = entry.common('output')
  orthogonal, direct = fn == 'intervene.loreft', fn == 'intervene.direft'
  if orthogonal and options['rank'] >= cfg.hidden:
    raise parts.refuse(entry.where, f'rank {options["rank"]}', 'one below the hidden size')
  for i in layers:
    p = entry.sites[f'layer_{i}/output']
    at = f'{parts.layer(cfg, i)}.reft_layer.refts.{entry.name}.units.0'
    w, r = p.take(f'{end}w'), p.take(f'{end}r')
    tensors[f'{at}.learned_source.weight'] = parts.kernel(w + r if direct else w)
    tensors[f'{at}.learned_source.bias'] = p.take(f'{end}b')
    p.finish()
    if orthogonal:
      own = f'{at}.projection.parametrizations.weight'
      original, base = _parametrised(np.asarray(orthonormal_columns(r)))
      tensors |= {f'{own}.original': original, f'{own}.0.base': base}
    else:
      tensors[f'{at}.projection.weight'] = parts.kernel(r)
  config = {
    'r': r.shape[1], 'prefix_positions': first, 'suffix_positions': last,
    'orthogonality': orthogonal, 'tied_weights': True, 'dropout': options['dropout'],
    'layers': 'all' if len(layers) == cfg.layers else layers,
    'subtract_projection': True,
  }  # fmt: skip
  return Target([DEFAULTS | config], tensors)


def _parametrised(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(original [r, d], base [d, d]) of orthonormal columns [d, r], as torch starts with them."""
  d, r = q.shape
  base = np.linalg.qr(q.astype(np.float64), mode='complete')[0].astype(np.float32)
  base[:, :r] = q
  return -np.eye(r, d, dtype=np.float32), base
