"""HF PEFT's rotations, OFT, BOFT, HRA and RoAd: the table, and what a table cannot say."""

import re
from collections.abc import Mapping

import numpy as np

from efft import tree
from efft.errors import InputError
from efft.interop import foreign, peft_rows, peft_targets
from efft.interop.peft_rows import (
  COLUMN,
  RULES,
  SAME,
  Codec,
  Option,
  Part,
  Row,
  Source,
  Written,
  refusal,
)
from efft.models import hub
from efft.peft import orthogonal

_INIT = ('init_weights', 'fan_in_fan_out')


def _blocks_of(width: int) -> int:
  """b, of b (b - 1) / 2 numbers above a diagonal."""
  return round((1 + (1 + 8 * width) ** 0.5) / 2)


def _one_size(sizes, method, block: str, count: str) -> dict:
  """PEFT's block size, or its number of blocks where that is what all kernels share."""
  blocks, counts = {o['block_size'] for o, _ in sizes}, {d // o['block_size'] for o, d in sizes}
  if len(blocks) == 1:
    return {block: blocks.pop(), count: 0}
  if len(counts) == 1:
    return {block: 0, count: counts.pop()}
  raise refusal(f'blocks of {", ".join(map(str, sorted(blocks)))} at different kernels', method)


def _oft_version(config, tensors, where):
  """The series of PEFT 0.18 and later is another one than before; the exact inverse is the same."""
  version = str(config.get('peft_version') or '0')
  numbers = [int(x) for x in re.findall(r'\d+', version)[:2]]
  if config.get('use_cayley_neumann') and numbers < [0, 18]:
    found = f'use_cayley_neumann=true and peft_version={config.get("peft_version")!r:.40}'
    fix = 'the series has changed since: load it with the PEFT that trained it, and merge it there'
    raise InputError(where, found, 'peft_version 0.18 or later', fix)
  return tensors


def _oft_sizes(sizes, method) -> dict:
  series = {'peft_version': '0.18.0'} if sizes[0][0]['use_cayley_neumann'] else {}
  return _one_size(sizes, method, 'oft_block_size', 'r') | series


def _boft_sizes(sizes, method) -> dict:
  factors = {options['factors'] for options, _ in sizes}
  if len(factors) > 1:
    raise refusal('different numbers of factors', method)
  return {
    **_one_size(sizes, method, 'boft_block_size', 'boft_block_num'),
    'boft_n_butterfly_factor': factors.pop(),
  }


def _above(r):
  """What of boft_R acts, its skew-symmetric half, above the diagonal."""
  rows, columns = np.triu_indices(r.shape[-1], 1)
  return (0.5 * (r - np.swapaxes(r, -1, -2)))[..., rows, columns]


_SKEW = Codec(_above, lambda q: np.asarray(orthogonal.skew(q, _blocks_of(q.shape[-1]))))


ROWS = {
  # Files from before there was a choice lack use_cayley_neumann, whose default has changed since.
  'OFT': Row(
    'orthogonal.oft',
    (
      Option('block_share', 'block_share', False),
      Option('use_cayley_neumann', 'use_cayley_neumann', ...),
      Option('num_cayley_neumann_terms', 'num_cayley_neumann_terms', 5),
    ),
    {'oft_R.weight': ('q', SAME)},
    neutral={'coft': (False,)},
    idle=(*_INIT, 'r', 'oft_block_size', 'eps'),
    resting={'module_dropout': 0.0},
    bias='oft_only',
    shaped=lambda p: {'block_size': _blocks_of(p['q'].shape[-1])},
    sized=_oft_sizes,
    prepare=_oft_version,
  ),
  'BOFT': Row(
    'orthogonal.boft',
    (),
    {'boft_R': ('q', _SKEW), 'boft_s': ('s', COLUMN)},
    idle=(*_INIT, 'boft_block_size', 'boft_block_num', 'boft_n_butterfly_factor'),
    resting={'boft_dropout': 0.0},
    bias='boft_only',
    shaped=lambda p: {'block_size': _blocks_of(p['q'].shape[-1]), 'factors': len(p['q'])},
    sized=_boft_sizes,
  ),
  'HRA': Row(
    'orthogonal.hra',
    (Option('r', 'rank', 8),),
    {'hra_u': ('u', SAME)},
    neutral={'apply_GS': (False,)},
    idle=_INIT,
    unwritten=('regularization',),
    bias='hra_only',
  ),
  'ROAD': Row(
    'orthogonal.road',
    (Option('variant', 'variant', 'road_1'), Option('group_size', 'group_size', 64)),
    {'road_theta': ('theta', SAME), 'road_alpha': ('alpha', SAME)},
    idle=_INIT,
  ),
}


def read_road(source: Source) -> Part:
  """RoAd, which PEFT has turn the bias too: the turned one stands in place of the base's."""
  part = peft_rows.read(source, ROWS['ROAD'])
  leaves = dict(part.leaves)
  for _, bias, path in _road_biases(part.method, part.leaves, source.base):
    leaves[path] = bias
  paths = [p.removeprefix('params/') for p in leaves if p.startswith('params/')]
  regex = peft_targets.regex(paths, source.base.cfg.layers)
  rules = (RULES[0], RULES[1], (f'params/({regex})', 'bias'), RULES[2])
  note = 'the biases of its linear layers, which PEFT turns with their outputs, are kept turned'
  return part._replace(leaves=leaves, rules=rules, notes=(*part.notes, note))


def write_road(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """RoAd, where the biases are what PEFT would make of the base's."""
  deltas = {path: adapter.leaves[path] for path in leaves if path.startswith('delta/')}
  flat = tree.flatten({'params': base.params})
  for module, bias, path in _road_biases(adapter.method, deltas, base):
    if not np.allclose(leaves.take(path, flat[path]), bias, rtol=0, atol=1e-6):
      found = f'RoAd beside a bias of {module} that is not turned with its outputs'
      raise refusal(found, adapter.method)
  return peft_rows.write(adapter, leaves, base, ROWS['ROAD'])


def _road_biases(method: Mapping, leaves: Mapping, base: hub.Base):
  """(module, turned bias of the base, its path) for each site of RoAd."""
  flat = tree.flatten({'params': base.params})
  for name, spec in method.items():
    options = peft_rows.full(spec)
    for path, theta in leaves.items():
      if not path.endswith(f'/matmul_{name}/theta'):
        continue
      stem = path.removesuffix('/theta')
      module = stem.removeprefix('delta/').removesuffix(f'/matmul_{name}')
      bias = f'params/{module}/bias'
      size, variant = options['group_size'], options['variant']
      try:
        turned = orthogonal.road_rotate(
          theta, np.asarray(leaves[f'{stem}/alpha']), flat[bias], variant, size
        )
      except (KeyError, TypeError, ValueError) as error:
        found = f'RoAd {variant!r} of groups of {size} at {module}: {error}'
        fix = 'the checkpoint is damaged'
        raise InputError('RoAd', found[:300], 'angles and scales that fit', fix) from None
      yield module, np.asarray(turned), bias
