"""AdapterHub's (IA)3, which scales the FFN before its activation, and efft's, behind it.

Keys' and values' scales are alike. Those of the linear layers of the FFN are folded into kernel and
bias, which stand in place of the base's. Source: adapters 1.3.0, methods/lora.py (IA3).
"""

import numpy as np

from efft.errors import InputError
from efft.interop import adapterhub_parts as parts
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys

DEFAULTS = {
  'alpha': 1, 'architecture': 'lora', 'attn_matrices': ['k', 'v'], 'composition_mode': 'scale',
  'dropout': 0.0, 'dtype': None, 'init_weights': 'ia3', 'init_weights_seed': None,
  'intermediate_lora': True, 'leave_out': [], 'output_lora': False, 'r': 1,
  'selfattn_lora': True, 'use_dora': False, 'use_gating': False, 'vera_b': None, 'vera_d': None,
}  # fmt: skip
FFN = {'intermediate_lora': 'mlp/up', 'output_lora': 'mlp/down'}
_NOTE = (
  "AdapterHub's (IA)3 scales before the activation: that scale is in the kernels of the FFN that "
  'are kept with the adapter, and does not train further'
)


def read(source: Source, config: Keys, modules: list[str], layers: list[int]) -> Part:
  cfg, leaves, folded = source.cfg, {}, []
  if {'attention/key', 'attention/value'} - set(modules) or 'attention/query' in modules:
    raise parts.refuse(config.where, f'(IA)3 of {", ".join(modules)}', 'keys and values')
  weights = parts.parameters_of(source.base)
  for i in layers:
    scales = {}
    for module in modules:
      site = f'layer_{i}/{module}'
      d_out = parts.kernel_shape(source.base, site)[1]
      scales[module] = source.take(
        f'{parts.lora_stem(cfg, site, source.name)}.lora_B', d_out, 1
      ).ravel()
    kv = {'k': scales.pop('attention/key'), 'v': scales.pop('attention/value')}
    leaves |= parts.delta(f'layer_{i}/attention/kv', 'ia3', kv)
    for module, scale in scales.items():
      folded.append(module)
      for leaf in ('kernel', 'bias'):
        path = f'params/layer_{i}/{module}/{leaf}'
        leaves[path] = weights[path] * scale
  method = {'ia3': {'fn': 'scale.ia3', 'layers': parts.pattern(cfg, layers)}}
  return Part(method, leaves, notes=(_NOTE,) if folded else ())


def write(entry: Entry, fn: str) -> Target:
  """Of scale.ia3, whose FFN's scale is one that was folded into the kernels before."""
  if entry.layers('mlp/act'):
    for i in entry.layers('mlp/act'):
      if (entry.sites[f'layer_{i}/mlp/act'].take('ff') != 1).any():
        raise parts.refuse(entry.where, 'a scale of the FFN behind its activation', 'one before it')
  entry.known('attention/kv', 'mlp/act')
  layers, tensors = entry.common('attention/kv'), {}
  weights, folded = parts.parameters_of(entry.base), {}
  for i in layers:
    p = entry.sites[f'layer_{i}/attention/kv']
    for leaf, module in (('k', 'attention/key'), ('v', 'attention/value')):
      site = f'layer_{i}/{module}'
      tensors[f'{parts.lora_stem(entry.cfg, site, entry.name)}.lora_B'] = p.take(leaf)[:, None]
    p.finish()
    for key, module in FFN.items():
      paths = [f'params/layer_{i}/{module}/{leaf}' for leaf in ('kernel', 'bias')]
      if not any(path in entry.params for path in paths):
        continue
      site = f'layer_{i}/{module}'
      stacked = [np.vstack([weights[path] for path in paths])]
      stacked.append(np.vstack([entry.params.take(path, weights[path]) for path in paths]))
      folded.setdefault(key, {})[i] = (site, _ratio(entry.where, *stacked))
  for key, scales in folded.items():
    if sorted(scales) != layers:
      raise parts.refuse(entry.where, f'{key} in some layers', 'in all that it acts in')
    for site, scale in scales.values():
      tensors[f'{parts.lora_stem(entry.cfg, site, entry.name)}.lora_B'] = scale[:, None]
  config = {
    'alpha': 1, 'r': 1, 'attn_matrices': ['k', 'v'], 'composition_mode': 'scale',
    'init_weights': 'ia3', 'leave_out': entry.left_out(layers),
    **{key: key in folded for key in FFN},
  }  # fmt: skip
  return Target([DEFAULTS | config], tensors)


def _ratio(where: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """s with x s = y to the bit, one number a column."""
  columns = np.arange(x.shape[1])
  largest = np.abs(x).argmax(0)
  top = x[largest, columns]
  start = np.where(top == 0, 1, y[largest, columns] / np.where(top == 0, 1, top))
  start = start.astype(np.float32)
  candidates = [start, *(np.nextafter(start, s * np.float32(np.inf)) for s in (1, -1))]
  candidates += [np.nextafter(c, c + (c - start)) for c in candidates[1:]]
  for s in candidates:
    exact = (x * s == y).all(0)
    start = np.where((x * start == y).all(0), start, np.where(exact, s, start))
  if not (x * start == y).all():
    raise InputError(
      where, 'kernels that are not the base model times a scale', 'an (IA)3 of AdapterHub',
      'keep it in efft',
    )  # fmt: skip
  return start
