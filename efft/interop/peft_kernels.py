"""The table of HF PEFT's methods that add to kernels and are no LoRA."""

import numpy as np

from efft.errors import InputError
from efft.interop import foreign, peft_draws
from efft.interop.peft_rows import SAME, TURNED, Codec, Option, Row
from efft.peft import spectral

_INIT = ('init_weights', 'fan_in_fan_out')
_RANK, _ALPHA = Option('r', 'rank', 8), Option('alpha', 'alpha', 8)
_PATTERNED = (
  _RANK._replace(pattern='rank_pattern'),
  _ALPHA._replace(pattern='alpha_pattern'),
)
_RESTING = {'rank_dropout': 0.0, 'module_dropout': 0.0}
_SWAPPED = Codec(lambda x: np.swapaxes(x, 0, 1), lambda x: np.swapaxes(x, 0, 1))
_MIDDLE = Codec(lambda x: x[:, 0], lambda x: x[:, None])


def _vera_ranks(config, tensors, where):
  for name, x in tensors.items():
    if name.endswith('.vera_lambda_d') and x.shape != (config.get('r', 256),):
      raise InputError(where, f'{name} {x.shape}', f'r={config.get("r", 256)}', 'correct r')
  return tensors


def _vera_projections(config, options, shapes):
  seed = config.take('projection_prng_key', None)
  if config.take('save_projection', True):
    return {}
  rank, d_in, d_out = options['rank'], *(max(shape[axis] for shape in shapes) for axis in (0, 1))
  both = peft_draws.kaiming(seed or 0, [(rank, d_in), (d_out, rank)], config.where)
  return dict(zip(('vera_A', 'vera_B'), both, strict=True))


def _miss_config(config, tensors, where):
  if config.get('init_weights') != 'mini':
    config['mini_r'] = 0
  return tensors


def _miss_sizes(sizes, method) -> dict:
  narrow = sizes[0][0]['mini_r']
  return {'mini_r': narrow or 1, 'init_weights': 'mini' if narrow else True}


def _vblora_whole(config, tensors, where):
  """Logits from what save_only_topk_weights keeps: the best, and the weights of all but the last.

  Any number far below them stands for the others, which are not among the best.
  """
  if not config.pop('save_only_topk_weights', False):
    return tensors
  whole, count = {}, len(tensors.get('vblora_vector_bank', ()))
  for name, x in tensors.items():
    if name.endswith('_topk_indices'):
      stem = name.removesuffix('_topk_indices')
      if f'{stem}_topk_weights' not in tensors:
        fix = 'complete the checkpoint'
        raise InputError(where, f'no {stem}_topk_weights', 'one for the indices', fix)
      weights = tensors[f'{stem}_topk_weights']
      weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
      if x.shape != weights.shape or x.min(initial=0) < 0 or x.max(initial=0) >= count:
        fix = 'the adapter is damaged: take another copy'
        raise InputError(where, f'{name} {x.shape}', f'indices below {count}', fix)
      logits = np.full((*x.shape[:-1], count), -1e30, np.float32)
      best = np.log(np.maximum(weights, np.finfo(np.float32).tiny))
      np.put_along_axis(logits, x.astype(np.int64), best.astype(np.float32), -1)
      whole[stem] = logits
    elif not name.endswith('_topk_weights'):
      whole[name] = x
  return whole


_BASES = ('randlora_A', 'randlora_B')


def _randlora_once(config, tensors, where):
  """Without the copies of the shared bases that the library writes for each kernel."""
  kept = {}
  for name, x in tensors.items():
    stem, _, last = name.rpartition('.')
    if stem and last in _BASES:
      if not np.array_equal(x, tensors.get(last, np.nan)):
        found, fix = f'{name} unlike the shared {last}', 'the adapter is damaged'
        raise InputError(where, found, 'copies of it', fix)
    else:
      kept[name] = x
  return kept


def _randlora_copies(modules, tensors, shared):
  return tensors | {f'{module}.{name}': shared[name] for module in modules for name in _BASES}


def _shira_places(config, tensors, where):
  split = {}
  for name, x in tensors.items():
    if name.endswith('.shira_indices') and x.ndim == 2 and len(x) == 2:
      split |= {f'{name}_columns': x[0].astype(np.int32), f'{name}_rows': x[1].astype(np.int32)}
    else:
      split[name] = x
  return split


def _shira_odd(p, shape) -> str:
  rows, columns = p['rows'].astype(np.int64), p['columns'].astype(np.int64)
  inside = all(
    0 <= x.min(initial=0) and x.max(initial=0) < d
    for x, d in ((rows, shape[0]), (columns, shape[1]))
  )
  once = len(np.unique(rows * shape[1] + columns)) == len(rows)
  return '' if inside and once else 'shira_indices outside of the kernel or twice'


def _shira_indices(modules, tensors, shared):
  joined = dict(tensors)
  for module in modules:
    pair = [joined.pop(f'{module}.shira_indices_{part}') for part in ('columns', 'rows')]
    joined[f'{module}.shira_indices'] = np.stack(pair).astype(np.int32)
  return joined


def _fourier_seed(config, tensors, where):
  if config.get('random_loc_seed', 777) is None:
    found = 'random_loc_seed=null: places that are in no file'
    raise InputError(where, found, 'a seed', foreign.REFUSED)
  return tensors


def _fourier_places(options, shapes):
  return {
    f'positions_{shape[0]}x{shape[1]}': spectral.positions(
      options['n_frequency'], shape, options['random_loc_seed']
    )
    for shape in shapes
  }


ROWS = {
  'VERA': Row(
    'shared_lowrank.vera',
    (
      Option('r', 'rank', 256),
      Option('d_initial', 'd_initial', 0.1),
      Option('vera_dropout', 'dropout', 0.0),
    ),
    {'vera_lambda_b': ('lambda_b', SAME), 'vera_lambda_d': ('lambda_d', SAME)},
    shared={'vera_A': ('a', TURNED), 'vera_B': ('b', TURNED)},
    idle=_INIT,
    frozen='delta/shared_vera/.*',
    bias='vera_only',
    sized=lambda sizes, method: {'save_projection': True},
    drawn=_vera_projections,
    prepare=_vera_ranks,
  ),
  'LOHA': Row(
    'kron.loha',
    _PATTERNED,
    {
      'hada_w1_a': ('b1', TURNED),
      'hada_w1_b': ('a1', TURNED),
      'hada_w2_a': ('b2', TURNED),
      'hada_w2_b': ('a2', TURNED),
    },
    idle=(*_INIT, 'use_effective_conv2d'),
    resting=_RESTING,
  ),
  'LOKR': Row(
    'kron.lokr',
    (
      *_PATTERNED,
      Option('decompose_both', 'decompose_both', False),
      Option('decompose_factor', 'decompose_factor', -1),
    ),
    {
      'lokr_w1': ('w1', TURNED),
      'lokr_w1_a': ('w1_b', TURNED),
      'lokr_w1_b': ('w1_a', TURNED),
      'lokr_w2': ('w2', TURNED),
      'lokr_w2_a': ('w2_b', TURNED),
      'lokr_w2_b': ('w2_a', TURNED),
    },
    idle=(*_INIT, 'use_effective_conv2d'),
    resting={**_RESTING, 'rank_dropout_scale': False},
  ),
  'MISS': Row(
    'shards.miss',
    (
      Option('r', 'rank', 64),
      Option('mini_r', 'mini_r', 0),
      Option('miss_dropout', 'dropout', 0.0),
    ),
    {'miss_block': ('block', SAME)},
    neutral={'init_weights': (True, False, 'mini')},
    bias='MiSS_only',
    sized=_miss_sizes,
    prepare=_miss_config,
  ),
  'VBLORA': Row(
    'shards.vblora',
    (
      Option('r', 'rank', 4),
      Option('num_vectors', 'num_vectors', 256),
      Option('vector_length', 'vector_length', 256),
      Option('topk', 'topk', 2),
      Option('init_vector_bank_bound', 'init_vector_bank_bound', 0.02),
      Option('init_logits_std', 'init_logits_std', 0.1),
      Option('vblora_dropout', 'dropout', 0.0),
    ),
    {'vblora_logits_A': ('a', SAME), 'vblora_logits_B': ('b', _SWAPPED)},
    shared={'vblora_vector_bank': ('bank', SAME)},
    idle=_INIT,
    bias='vblora_only',
    prepare=_vblora_whole,
  ),
  'RANDLORA': Row(
    'shards.randlora',
    (
      Option('r', 'rank', 32),
      Option('randlora_alpha', 'alpha', 640),
      Option('randlora_dropout', 'dropout', 0.0),
    ),
    {'randlora_lambda': ('lambda', SAME), 'randlora_gamma': ('gamma', SAME)},
    shared={'randlora_A': ('a', _MIDDLE), 'randlora_B': ('b', SAME)},
    neutral={'save_projection': (True,)},
    idle=(*_INIT, 'projection_prng_key', 'sparse', 'very_sparse'),
    frozen='delta/shared_randlora/.*',
    bias='randlora_only',
    prepare=_randlora_once,
    finish=_randlora_copies,
  ),
  'DELORA': Row(
    'shards.delora',
    (
      _RANK._replace(pattern='rank_pattern'),
      Option('delora_lambda', 'delora_lambda', 15, 'lambda_pattern'),
      Option('module_dropout', 'dropout', 0.0),
    ),
    {
      'delora_A': ('a', TURNED),
      'delora_B': ('b', TURNED),
      'delora_lambda': ('lambda', SAME),
      'delora_w_norm': ('w_norm', SAME),
    },
    idle=_INIT,
    frozen='delta/.*/w_norm',
    bias='delora_only',
  ),
  'SHIRA': Row(
    'shards.shira',
    (Option('r', 'rank', 32),),
    {
      'shira_weight': ('values', SAME),
      'shira_indices_rows': ('rows', SAME),
      'shira_indices_columns': ('columns', SAME),
    },
    idle=(*_INIT, 'mask_type', 'random_seed'),
    odd=_shira_odd,
    prepare=_shira_places,
    finish=_shira_indices,
  ),
  'FOURIERFT': Row(
    'spectral.fourierft',
    (
      Option('n_frequency', 'n_frequency', 1000, 'n_frequency_pattern'),
      Option('scaling', 'scaling', 150.0),
      Option('random_loc_seed', 'random_loc_seed', 777),
      Option('init_weights', 'init', False, values={False: 'normal', True: 'zeros'}),
    ),
    {'fourierft_spectrum': ('spectrum', SAME)},
    idle=('fan_in_fan_out',),
    bias='fourier_only',
    constant=_fourier_places,
    prepare=_fourier_seed,
  ),
  'C3A': Row(
    'spectral.c3a',
    (
      Option('block_size', 'block_size', 256, 'block_size_pattern'),
      Option(
        'init_weights',
        'init',
        'xavier_uniform',
        values={
          'xavier_uniform': 'xavier_uniform',
          'gaussian': 'gaussian',
          'kaiming_uniform': 'kaiming_uniform',
          True: 'zeros',
          False: 'xavier_uniform',
        },
      ),
    ),
    {'c3a_kernel': ('kernel', SAME)},
    idle=('fan_in_fan_out',),
    bias='c3a_only',
    shaped=lambda p: {'block_size': p['kernel'].shape[-1]},
  ),
}
