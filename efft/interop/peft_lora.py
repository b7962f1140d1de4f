"""LoRA as HF PEFT stores it, with its switches and starts, DoRA and AdaLoRA."""

import collections
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from efft import tree
from efft.errors import InputError
from efft.interop import foreign, peft_rows, peft_targets
from efft.interop.peft_rows import COLUMN, RULES, SAME, TURNED, Entry, Part, Source, Written
from efft.models import hub

# Starts that leave the base as it is; those in _MOVED take a part of it over.
_STARTS = (True, False, None, 'gaussian', 'eva', 'orthogonal', 'mica')
_MOVED = {'pissa': 'spectral_init.pissa', 'olora': 'spectral_init.olora'}
_NEUTRAL = {
  'alora_invocation_tokens': (None,), 'arrow_config': (None,), 'kasa_config': (None,),
  'layer_replication': (None,), 'megatron_config': (None,), 'monteclora_config': (None,),
  'target_parameters': (None, []), 'use_bdlora': (None, False), 'use_qalora': (False, None),
  'velora_config': (None,), 'enable_lora': (None,),
}  # fmt: skip
_IDLE = (
  'corda_config', 'ensure_weight_tying', 'eva_config', 'fan_in_fan_out', 'loftq_config',
  'lora_ga_config', 'megatron_core', 'merge_weights', 'qalora_group_size', 'runtime_config',
)  # fmt: skip
_LEAVES = {
  'lora_A.weight': ('a', TURNED), 'lora_B.weight': ('b', TURNED), 'lora_B.bias': ('bias', SAME),
  'lora_magnitude_vector': ('m', SAME),
}  # fmt: skip
_WORDS = {'lora_embedding_A': ('a', TURNED), 'lora_embedding_B': ('b', TURNED)}
_TRIPLETS = {'lora_A': ('a', TURNED), 'lora_B': ('b', TURNED), 'lora_E': ('e', COLUMN)}


def _common(config: foreign.Keys) -> None:
  for key, allowed in _NEUTRAL.items():
    config.only(key, *allowed)
  config.ignore(_IDLE)


def read(source: Source) -> Part:
  """The deltas of a LORA checkpoint."""
  config, names = source.config, source.names
  rank, alpha = config.take('r', 8), config.take('lora_alpha', 8)
  ranks, alphas = config.take('rank_pattern', None), config.take('alpha_pattern', None)
  dropout = float(config.take('lora_dropout', 0.0))
  switches = {key: bool(config.take(key, False)) for key in ('use_rslora', 'use_dora', 'lora_bias')}
  start = config.take('init_lora_weights', True)
  if start not in (*_STARTS, *_MOVED):
    found = f'init_lora_weights={start!r}, which starts beside a base that cannot be made again'
    fix = "save it with PEFT's path_initial_model_for_weight_conversion"
    raise InputError(config.where, found, f'one of {", ".join(map(str, _STARTS))}', fix)
  _common(config)
  words = [name for name, path in names.modules.items() if path == 'embed/word']
  targets = peft_targets.selected(config, (*words, *names.linears), source.saved)
  deltas, origin = [], {}
  for module in targets:
    found, origin[module] = peft_rows.taken(
      source.tensors, module, _WORDS if module in words else _LEAVES
    )
    own = {
      'rank': peft_targets.by_pattern(ranks, module, rank, config.where),
      'alpha': float(peft_targets.by_pattern(alphas, module, alpha, config.where)),
    }
    if module in words:
      if switches['use_dora'] or switches['lora_bias'] or start in _MOVED:
        raise InputError(
          config.where, f'{module} as a target with use_dora, lora_bias or {start}',
          'plain LoRA of embeddings', foreign.REFUSED,
        )  # fmt: skip
      fn, site, own['use_rslora'] = 'lora.embedding', 'embed/words', switches['use_rslora']
    else:
      fn, own = _linear(switches, start, {**own, 'dropout': dropout})
      site = f'{names.modules[module]}/matmul'
      if start in _MOVED:
        found |= _start(source.base, names.modules[module], fn, own)
    deltas.append(Entry(module, site, fn, own, found))
  patterns = _patterns(deltas, rank, float(alpha), source.base.cfg.layers)
  method, leaves, places = peft_rows.grouped(deltas, source)
  for spec in method.values():
    if spec['fn'] == 'lora.lora':
      spec |= patterns
  origin = peft_rows.by_path(origin, places)
  notes = []
  if start in _MOVED:
    notes.append(f'the base beside {start} is computed again from the weights of the base model')
  if switches['use_dora'] and dropout:
    notes.append('where training goes on, dropout acts on the input of A alone; PEFT drops more')
  still = '(a0|b0)' if start in _MOVED else 'b' if start == 'mica' else ''
  frozen = ((f'delta/.*/{still}', 'frozen'),) if still else ()
  rules = (RULES[0], *frozen, *RULES[1:])
  return Part(method, leaves, rules, tuple(notes), tuple(targets), origin)


def _linear(switches: Mapping, start: Any, own: dict) -> tuple[str, dict[str, Any]]:
  """(function, options) of a kernel's delta."""
  if start in _MOVED:
    if switches['use_dora'] or switches['lora_bias']:
      raise InputError('adapter_config.json', f'{start} with use_dora or lora_bias', 'plain LoRA',
                       foreign.REFUSED)  # fmt: skip
    if switches['use_rslora']:
      own['alpha'] *= own['rank'] ** 0.5
    return _MOVED[start], own
  own['use_rslora'] = switches['use_rslora']
  if switches['use_dora']:
    return 'lora.dora', own
  return 'lora.lora', {**own, 'lora_bias': switches['lora_bias']}


def _start(base: hub.Base, path: str, fn: str, own: Mapping) -> dict[str, np.ndarray]:
  """a0 and b0, from which PEFT started and whose product it took from the kernel."""
  kernel = np.asarray(tree.flatten(base.params)[f'{path}/kernel'], np.float64)
  rank, scale = own['rank'], own['alpha'] / own['rank']
  if fn.endswith('pissa'):
    u, s, vt = np.linalg.svd(kernel, full_matrices=False)
    root = np.sqrt(s[:rank] / scale)
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
  else:
    q, r = np.linalg.qr(kernel.T)
    a, b = r[:rank].T, q[:, :rank].T
  return {'a0': a.astype(np.float32), 'b0': b.astype(np.float32)}


def _patterns(deltas: list[Entry], rank: int, alpha: float, layers: int) -> dict[str, dict]:
  """rank_pattern and alpha_pattern of plain LoRA, whose deltas then are of one kind."""
  found = {}
  plain = [delta for delta in deltas if delta.fn == 'lora.lora']
  for key, usual in (('rank', rank), ('alpha', alpha)):
    sites: dict[float, list[str]] = {}
    for delta in plain:
      if delta.options[key] != usual:
        sites.setdefault(delta.options[key], []).append(delta.site)
      delta.options[key] = usual
    if sites:
      found[f'{key}_pattern'] = {peft_targets.regex(s, layers): v for v, s in sites.items()}
  return found


class Low(NamedTuple):
  """What PEFT needs to know of one module."""

  rank: int
  alpha: float
  switches: dict[str, Any]
  leaves: dict[str, np.ndarray]


def _by_site(pattern: Any, site: str, otherwise: float) -> float:
  pairs = pattern.items() if isinstance(pattern, Mapping) else pattern or ()
  return next((value for regex, value in pairs if re.fullmatch(regex, site)), otherwise)


def _plain(entry: Entry) -> Low:
  o = entry.options
  alpha = _by_site(o.get('alpha_pattern'), entry.site, o['alpha'])
  switches = {
    'use_rslora': o.get('use_rslora', False), 'lora_bias': o.get('lora_bias', False),
    'use_dora': entry.fn == 'lora.dora',
  }  # fmt: skip
  return Low(entry.leaves['a'].shape[1], alpha, switches, entry.leaves)


def _truncated(entry: Entry) -> Low:
  r = entry.options['eval_rank'] or entry.options['rank']
  leaves = {'a': entry.leaves['a'][:, :r], 'b': entry.leaves['b'][:r]}
  return _plain(entry._replace(leaves=leaves))


def _doubled(entry: Entry) -> Low:
  """Beside the base as it was: what has been trained, less where it started."""
  p, rank = entry.leaves, entry.leaves['a'].shape[1]
  leaves = {
    'a': np.concatenate([p['a'], p['a0']], 1),
    'b': np.concatenate([p['b'], -p['b0']], 0),
  }
  low = _plain(entry._replace(leaves=leaves))
  return low._replace(rank=2 * rank, alpha=2 * low.alpha)


_WRITTEN = {
  'lora.lora': _plain, 'lora.dora': _plain, 'lora.embedding': _plain, 'spectral_init.eva': _plain,
  'lora.dylora': _truncated, 'spectral_init.pissa': _doubled, 'spectral_init.olora': _doubled,
}  # fmt: skip
FUNCTIONS = tuple(_WRITTEN)


_RANKS = (('r', 'rank_pattern', 'rank'), ('lora_alpha', 'alpha_pattern', 'alpha'))


def write(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """PEFT's config and tensors of deltas of FUNCTIONS."""
  method = adapter.method
  found = peft_rows.entries(method, leaves, peft_targets.names(base.cfg))
  lows = {entry.module: _WRITTEN[entry.fn](entry) for entry in found}
  common = {}
  linear = [entry.module for entry in found if entry.site != 'embed/words']
  for key in ('use_rslora', 'use_dora', 'lora_bias'):
    values = {lows[m].switches[key] for m in (lows if key == 'use_rslora' else linear or lows)}
    if len(values) > 1 or (key != 'use_rslora' and True in values and len(linear) < len(lows)):
      raise peft_rows.refusal(f'deltas with and without {key}', method)
    common[key] = values.pop()
  dropouts = {e.options['dropout'] for e in found if 'dropout' in e.options} or {0.0}
  if len(dropouts) > 1:
    raise peft_rows.refusal('different rates of dropout', method)
  config: dict[str, Any] = {
    'fan_in_fan_out': False, 'init_lora_weights': True, 'lora_dropout': dropouts.pop(),
    **{key: True for key, on in common.items() if on},
  }  # fmt: skip
  for key, pattern, field in _RANKS:
    values = {module: _number(getattr(low, field)) for module, low in lows.items()}
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    config[key] = usual
    if others := {m: value for m, value in values.items() if value != usual}:
      config[pattern] = others
  tensors = {}
  for entry in found:
    known = _WORDS if entry.site == 'embed/words' else _LEAVES
    for suffix, (leaf, codec) in known.items():
      if leaf in lows[entry.module].leaves:
        tensors[f'{entry.module}.{suffix}'] = codec.write(lows[entry.module].leaves[leaf])
  return Written(config, tensors, targets=tuple(lows))


def _number(x: float) -> float:
  return int(x) if float(x).is_integer() else float(x)


def read_adalora(source: Source) -> Part:
  """AdaLoRA, whose triplets that were cut are in no file: they are zeros here."""
  config, names = source.config, source.names
  rank, alpha = config.take('init_r', 12), config.take('lora_alpha', 8)
  if not isinstance(alpha, int | float) or alpha <= 0:
    raise InputError(config.where, f'lora_alpha={alpha!r}', 'a number above 0', foreign.REFUSED)
  dropout = float(config.take('lora_dropout', 0.0))
  weight = float(config.take('orth_reg_weight', 0.5))
  kept = config.take('rank_pattern', None) or {}
  kept = {re.sub(r'\.lora_E(\.\w+)?$', '', key): mask for key, mask in kept.items()}
  config.only('use_dora', False, None)
  config.only('lora_bias', False, None)
  config.ignore(('r', 'target_r', 'tinit', 'tfinal', 'deltaT', 'beta1', 'beta2', 'total_step'))
  config.ignore(('init_lora_weights', 'use_rslora', 'alpha_pattern', 'trainable_token_indices'))
  _common(config)
  targets = peft_targets.selected(config, names.linears, source.saved)
  # PEFT divides by init_r + 1e-5.
  options = {'rank': rank, 'alpha': alpha * rank / (rank + 1e-5), 'dropout': dropout}
  deltas, origin = [], {}
  for module in targets:
    found, origin[module] = peft_rows.taken(source.tensors, module, _TRIPLETS)
    if module in kept:
      found = _padded(found, np.asarray(kept[module], bool).ravel(), rank, module, config.where)
    site = f'{names.modules[module]}/matmul'
    deltas.append(
      Entry(module, site, 'lora.adalora', {**options, 'orth_reg_weight': weight}, found)
    )
  method, leaves, places = peft_rows.grouped(deltas, source)
  origin = peft_rows.by_path(origin, places)
  return Part(method, leaves, RULES, (), tuple(targets), origin)


def _padded(found, mask, rank: int, module: str, where: str) -> dict[str, np.ndarray]:
  size = found['e'].shape[0]
  if len(mask) != rank or size != mask.sum():
    text = f'rank_pattern of {len(mask)} ranks and {size} triplets of {module}'
    raise InputError(where, text, f'masks of init_r={rank} ranks', 'the checkpoint is damaged')
  whole = {}
  for leaf, axis in (('a', 1), ('e', 0), ('b', 0)):
    x = found[leaf]
    shape = list(x.shape)
    shape[axis] = rank
    whole[leaf] = np.zeros(shape, np.float32)
    np.moveaxis(whole[leaf], axis, 0)[mask] = np.moveaxis(x, axis, 0)
  return whole


def write_adalora(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """AdaLoRA with all of its ranks, less those that are zeros throughout."""
  method = adapter.method
  found = peft_rows.entries(method, leaves, peft_targets.names(base.cfg))
  sizes = {
    tuple(e.options[key] for key in ('rank', 'alpha', 'dropout', 'orth_reg_weight')) for e in found
  }
  if len(sizes) > 1:
    raise peft_rows.refusal('AdaLoRA of several ranks, alphas or weights', method)
  rank, alpha, dropout, weight = sizes.pop()
  tensors, masks = {}, {}
  for entry in found:
    p = entry.leaves
    mask = p['a'].any(0) | (p['e'] != 0) | p['b'].any(1)
    if not mask.all():
      masks[f'{entry.module}.lora_E'] = [bool(x) for x in mask]
    p = {'a': p['a'][:, mask], 'e': p['e'][mask], 'b': p['b'][mask]}
    for suffix, (leaf, codec) in _TRIPLETS.items():
      tensors[f'{entry.module}.{suffix}'] = codec.write(p[leaf])
  config = {
    'fan_in_fan_out': False, 'init_r': rank, 'lora_alpha': _near(alpha * (rank + 1e-5) / rank),
    'lora_dropout': dropout, 'orth_reg_weight': weight, 'rank_pattern': masks or None,
    'total_step': 1,
  }  # fmt: skip
  return Written(config, tensors, targets=tuple(entry.module for entry in found))


def _near(x: float) -> float:
  """A number whose last digits come from a division, without them."""
  return _number(float(f'{x:.12g}'))
