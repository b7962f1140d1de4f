"""Edits of hidden representations, by position (ReFT) or everywhere (RED)."""

import jax
import jax.numpy as jnp

from efft.models import dots
from efft.peft.base import Delta, product
from efft.peft.updates import uniform

FAMILY = 'representations'  # in `efft methods`


def red(layers: str = r'layer_\d+') -> Delta:
  """RED (Wu et al. 2024, https://arxiv.org/abs/2402.15179): l * h + b on the FFN's output h.

  Before the residual sum. l starts at one, b at zero. Trains 2 d numbers a layer. Merges into the
  columns and the bias of down.

  Args:
    layers: regex of the layers to act in.
  """

  def init(key, site):
    width = site.y.shape[-1]
    return {'scale': jnp.ones(width, jnp.float32), 'shift': jnp.zeros(width, jnp.float32)}

  def apply(p, site):
    return (site.y * p['scale'] + p['shift']).astype(site.y.dtype)

  def merge(p, module):
    down = module['mlp']['down']
    down = {
      'kernel': down['kernel'] * p['scale'],
      'bias': down['bias'] * p['scale'] + p['shift'],
    }
    return {**module, 'mlp': {**module['mlp'], 'down': down}}

  return Delta(init, apply, f'({layers})/mlp_out', merge)


def loreft(
  rank: int = 1,
  first: int = 3,
  last: int = 0,
  tied: bool = True,
  dropout: float = 0.0,
  at: str = r'layer_\d+/output',
) -> Delta:
  """LoReFT (Wu et al. 2024, https://arxiv.org/abs/2404.03592): h + R (h W + b - h R) on few tokens.

  R [d, rank] has orthonormal columns: it is the Gram-Schmidt basis, found anew each step, of a
  matrix that trains freely (pyreft and AdapterHub use torch's parametrisation by Householder
  reflections; what can be reached is the same). It starts as the basis of a normal matrix, W and b
  uniform in +-1/sqrt(d), as in torch: not the identity. Trains rank (2 d + 1) numbers a layer, and
  as many again where two ends have an edit each.

  Args:
    rank: r, at least 1.
    first, last: real tokens that are edited, from either end. Where a text is so short that they
      overlap, a token counts as one of the first, and each is edited once (pyreft takes fewer).
      Edits in the last layer of tokens that the head does not pool change nothing.
    tied: whether the last tokens are edited as the first are; False gives them parameters of
      their own, as in AdapterHub.
    dropout: rate on the edited tokens' whole representation, while training, as in pyreft.
    at: regex of sites that are [B, T, D] inside layers.
  """
  return _reft(rank, first, last, tied, dropout, at, orthonormal=True, subtract=True)


def noreft(
  rank: int = 1,
  first: int = 3,
  last: int = 0,
  tied: bool = True,
  dropout: float = 0.0,
  at: str = r'layer_\d+/output',
) -> Delta:
  """LoReFT with any R: h + R (h W + b - h R) (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

  The paper's ablation, AdapterHub's `NoReftConfig`. R starts uniform in +-1/sqrt(d); the rest, the
  count and the options are those of `loreft`.
  """
  return _reft(rank, first, last, tied, dropout, at, orthonormal=False, subtract=True)


def direft(
  rank: int = 1,
  first: int = 3,
  last: int = 0,
  tied: bool = True,
  dropout: float = 0.0,
  at: str = r'layer_\d+/output',
) -> Delta:
  """DiReFT: h + R (h W + b) on few tokens (Wu et al. 2024, https://arxiv.org/abs/2404.03592).

  LoReFT without the constraint and without the subtraction: LoRA on representations. R starts
  uniform in +-1/sqrt(d); the rest, the count and the options are those of `loreft`.
  """
  return _reft(rank, first, last, tied, dropout, at, orthonormal=False, subtract=False)


def orthonormal_columns(a):
  """Gram-Schmidt over the columns of a [d, r], r at most d; the identity on orthonormal ones.

  Written out because a library's QR is a call out of the program on every kind of device; r is
  small. Each column is projected twice, which is what rounding asks for.
  """
  basis = []
  for column in a.T:
    for _ in range(2):
      for other in basis:
        column = column - other * (other @ column)
    basis.append(column / jnp.linalg.norm(column))
  return jnp.stack(basis, 1)


def _reft(rank, first, last, tied, dropout, at, *, orthonormal, subtract) -> Delta:
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  if min(first, last) < 0 or first + last == 0:
    raise ValueError(f'first {first} and last {last}: no token to edit')
  # One edit for both ends, or one for each that there is.
  ends = ('',) if tied else tuple(f'{end}_' for end, n in (('first', first), ('last', last)) if n)

  def init(key, site):
    if site.mask is None or getattr(site.y, 'ndim', 0) != 3:
      raise ValueError(f"at={at!r}, which is not a layer's value for every token")
    d = site.y.shape[-1]
    if rank > d:
      raise ValueError(f'rank {rank} of representations of {d} units')
    p = {}
    for end, key_end in zip(ends, jax.random.split(key, len(ends)), strict=True):
      keys = jax.random.split(key_end, 3)
      shapes = {'r': (d, rank), 'w': (d, rank), 'b': (rank,)}
      for k, (leaf, shape) in zip(keys, shapes.items(), strict=True):
        p[end + leaf] = uniform(k, shape, d)
      if orthonormal:
        p[f'{end}r'] = orthonormal_columns(jax.random.normal(keys[0], (d, rank)))
    return p

  def expand(p, path, key):
    return {k: orthonormal_columns(x) if k.endswith('r') else x for k, x in p.items()}

  def apply(p, site):
    y, mask = site.y, site.mask
    nth = jnp.cumsum(mask, -1)
    front = mask & (nth <= first)
    back = mask & (nth > nth[:, -1:] - last) & ~front

    def edited(end):
      low = product(y, p[f'{end}w']) + p[f'{end}b']
      low = low - product(y, p[f'{end}r']) if subtract else low
      # In float32: next to nothing of rank r, and the CPU has no bfloat16 product for all of it.
      edit = dots.contract('btr,dr->btd', low, p[f'{end}r'].astype(jnp.float32))
      return site.dropout(y + edit.astype(y.dtype), dropout)

    if tied:
      return jnp.where((front | back)[..., None], edited(''), y)
    out = jnp.where(front[..., None], edited('first_'), y) if first else y
    return jnp.where(back[..., None], edited('last_'), out) if last else out

  return Delta(init, apply, at, expand=expand if orthonormal else None)
