"""Simulated quantisers: values of the model rounded to few bits, with ranges from examples.

They tell what an encoder loses where all of its tensors are integers, and let it, or deltas beside
them, train for that: gradients pass straight through. The ranges themselves stay as calibrated
('frozen') or train with LSQ's gradient, as the rules say. The merged model has no place for them.
In float32: bfloat16 rounds more coarsely than many of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efft.peft.base import Delta
from efft.peft.fakequant import integers
from efft.peft.updates import kernel_shape

FAMILY = 'quantisation'  # in `efft methods`
RESIDUALS = r'layer_\d+/(attention|mlp)_out'
RANGES = ('minmax', 'mse')
SHARES = 2.0 ** (-np.arange(64) / 16)  # of the range, down to a fifteenth


class Grid(NamedTuple):
  """How a tensor [..., D] is rounded: v^ = s (clip(round(v / s) + z, low, high) - z).

  Attributes:
    bits: low and high are -2^(bits - 1) and 2^(bits - 1) - 1.
    groups: G of the D dimensions, each with a scale s and a zero point z of its own: per-embedding-
      group quantisation (PEG; Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948, section
      4). As equal in size as D allows.
    permute: whether dimensions are sorted by their ranges before they are cut into groups; else
      they are grouped as they follow each other.
    symmetric: z = 0 and low = -high.
    ranges: 'minmax', from the least to the largest number (and 0), or 'mse': the share of that with
      the least squared error, searched among `SHARES`, of both ends alike, for each group.
  """

  bits: int = 8
  groups: int = 1
  permute: bool = True
  symmetric: bool = False
  ranges: str = 'minmax'

  def checked(self) -> 'Grid':
    """Itself; raises ValueError for what cannot be."""
    if not 2 <= self.bits <= 16:
      raise ValueError(f'bits {self.bits} is not from 2 to 16')
    if self.groups < 1:
      raise ValueError(f'groups {self.groups} is below 1')
    if self.ranges not in RANGES:
      raise ValueError(f'ranges {self.ranges!r} is neither {RANGES[0]!r} nor {RANGES[1]!r}')
    return self

  @property
  def ends(self) -> tuple[int, int]:
    top = 2 ** (self.bits - 1) - 1
    return (-top if self.symmetric else -top - 1), top

  def calibrated(self, name: str, v, mask=None) -> dict:
    """Parameters for what is like v [..., D].

    Args:
      name: what they begin with: NAME_scale float32 [G], NAME_zero int32 [G] and, of more than one
        group, NAME_group int32 [D], the group that each dimension is in.
      v: examples.
      mask: bool [B, T], the tokens of v [B, T, ...] that count; None: all.
    """
    v = v.astype(jnp.float32)
    # Features may have two axes (heads and theirs), and the pooler's input no axis of tokens.
    lead = 1 if v.ndim < 3 else 2
    v = v.reshape(int(np.prod(v.shape[:lead])), -1)
    size = v.shape[1]
    if self.groups > size:
      raise ValueError(f'{self.groups} groups of {size} dimensions')
    some = jnp.ones((len(v), 1), bool) if mask is None else mask.reshape(-1, 1)
    low = jnp.minimum(jnp.where(some, v, jnp.inf).min(0), 0)
    high = jnp.maximum(jnp.where(some, v, -jnp.inf).max(0), 0)
    if self.symmetric:
      high = jnp.maximum(-low, high)
      low = -high
    group = jnp.asarray(np.arange(size) * self.groups // size, jnp.int32)
    if self.permute and self.groups > 1:
      group = jnp.zeros_like(group).at[jnp.argsort(high - low, stable=True)].set(group)
    own = group == jnp.arange(self.groups)[:, None]
    low, high = jnp.where(own, low, 0).min(1), jnp.where(own, high, 0).max(1)
    # A group that is 0 on all examples gets the range of all.
    empty = low == high
    low, high = jnp.where(empty, low.min(), low), jnp.where(empty, high.max(), high)

    def made(share):
      step, zero = self._affine(share * low, share * high)
      p = {f'{name}_scale': step, f'{name}_zero': zero}
      return {**p, f'{name}_group': group} if self.groups > 1 else p

    if self.ranges == 'minmax':
      return made(1.0)

    def errors(share):
      off = jnp.where(some, self.rounded(name, made(share), v) - v, 0)
      return jnp.sum(own * jnp.sum(off * off, 0), 1)

    shares = jnp.asarray(SHARES, jnp.float32)
    return made(shares[jnp.argmin(jax.lax.map(errors, shares), 0)])

  def rounded(self, name: str, p: dict, v):
    """v^ float32, in v's shape."""
    whole, step = self.integers(name, p, v)
    return whole * step

  def integers(self, name: str, p: dict, v):
    """(integers less their zero points, s) of v, float32: v^ is their product. s has one axis."""
    step, zero = p[f'{name}_scale'], p[f'{name}_zero']
    if f'{name}_group' in p:
      shape = v.shape[1 if v.ndim < 3 else 2 :]
      step, zero = (x[p[f'{name}_group']].reshape(shape) for x in (step, zero))
    return integers(v, step, zero, self.ends, True), jax.lax.stop_gradient(step)

  def _affine(self, low, high):
    bottom, top = self.ends
    if self.symmetric:
      step, zero = high * (1 / top), jnp.zeros_like(high)
    else:
      step = (high - low) * (1 / (top - bottom))
      zero = jnp.clip(jnp.round(bottom - low / jnp.where(step > 0, step, 1)), bottom, top)
    return jnp.where(step > 0, step, 1), zero.astype(jnp.int32)


def activations(
  what: str = 'residual', bits: int = 8, groups: int = 1, permute: bool = True,
  symmetric: bool = False, ranges: str = 'minmax', examples: int = 16, at: str = RESIDUALS,
) -> Delta:  # fmt: skip
  """Rounds tensors of the model, each by a `Grid` calibrated on training texts.

  'value': what stands at a site ('layer_0/output', 'layer_0/mlp/act', a linear's product).
  'inputs': what a linear multiplies, at '.../matmul' sites: y = x^ W.
  'residual': at '.../attention_out' and '.../mlp_out', all that meets there: the block's input x,
  its output h, and their sum, which is what the norm sees: the sum of x and what is returned is
  the rounded x^ + h^, up to the rounding of floats. Of the feed-forward block these are the three
  tensors of Bondarenko et al. 2021.

  Args:
    what: value, inputs or residual.
    bits, groups, permute, symmetric, ranges: of the `Grid`.
    examples: how many texts it is calibrated on.
    at: which sites.
  """
  grid = Grid(bits, groups, permute, symmetric, ranges).checked()
  if examples < 1:
    raise ValueError(f'examples {examples} is below 1')
  if what == 'inputs':
    return _linear(grid, None, None, examples, at)
  if what == 'residual':
    return _residual(grid, examples, at)
  if what != 'value':
    raise ValueError(f"what {what!r} is neither 'value' nor 'inputs' nor 'residual'")

  def init(key, site):
    if isinstance(site.y, tuple):
      raise ValueError('a site of several values')
    return grid.calibrated('y', site.y, site.mask)

  def apply(p, site):
    return grid.rounded('y', p, site.y).astype(site.y.dtype)

  return Delta(init, apply, at, examples=examples)


def w8a8(
  bits: int = 8, weights: int = 8, groups: int = 1, block_bits: int = 8, permute: bool = True,
  ranges: str = 'minmax', weight_ranges: str = 'mse', examples: int = 16,
) -> tuple[Delta, ...]:  # fmt: skip
  """Everything as integers (Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948).

  Kernels and the table of words have one symmetric scale each; the inputs of all linears, what
  query, key, value and up give, and at both residuals x, h and their sum have a scale and a zero
  point. Three tensors of each feed-forward block decide how much is lost: its input x, its output
  h, and x + h. For them alone

      w8a8()                  one range of 8 bits each, which fails where few dimensions are large
      w8a8(groups=6)          PEG: dimensions sorted by range, six groups with ranges of their own
      w8a8(block_bits=16)     mixed precision

  Deviations: queries, keys, values and what up gives are rounded before their biases are added;
  attention's scores and probabilities, the embeddings' sum, what the pooler and the head give, and
  the tables of positions and types are floats. Where `weights` train, their scales stay where they
  began, unless the rules let these train too.

  Args:
    bits: of activations.
    weights: bits of kernels and the table of words.
    groups: of x, h and x + h of the feed-forward blocks.
    block_bits: of these three.
    permute: whether their dimensions are sorted by range first.
    ranges: of activations, minmax or mse.
    weight_ranges: of kernels and the table.
    examples: how many texts the ranges are calibrated on.
  """
  if examples < 1:
    raise ValueError(f'examples {examples} is below 1')
  plain = Grid(bits, ranges=ranges).checked()
  block = Grid(block_bits, groups, permute, ranges=ranges).checked()
  kernel = Grid(weights, symmetric=True, ranges=weight_ranges).checked()
  attention, mlp = r'layer_\d+/attention', r'layer_\d+/mlp'

  def linear(x, y, at):
    return _linear(x, kernel, y, examples, f'{at}/matmul')

  return (
    _table(kernel),
    linear(plain, plain, f'{attention}/(query|key|value)'),
    linear(plain, None, f'({attention}/out|{mlp}/down|pooler)'),
    _residual(plain, examples, f'{attention}_out'),
    linear(block, plain, f'{mlp}/up'),
    _residual(block, examples, f'{mlp}_out'),
  )


def _linear(x: Grid, w: Grid | None, y: Grid | None, examples: int, at: str) -> Delta:
  """Inputs, and where given the kernel and the product, of a linear."""

  def init(key, site):
    kernel_shape(site)
    return {
      **x.calibrated('x', site.x, site.mask),
      **(w.calibrated('w', site.w) if w else {}),
      **(y.calibrated('y', site.y, site.mask) if y else {}),
    }

  def apply(p, site):
    a, step = x.integers('x', p, site.x)
    b, scale = w.integers('w', p, site.w) if w else (site.w, 1.0)
    if x.groups > 1 or x.bits > 8:
      # Steps that differ, or integers too large for the sums of a product to be exact.
      a, step = a * step, 1.0
    out = site.contract(a.astype(site.x.dtype), b) * step * scale
    return y.rounded('y', p, out) if y else out

  return Delta(init, apply, at, examples=examples, first=True)


def _residual(grid: Grid, examples: int, at: str) -> Delta:
  """The two that a residual adds, and their sum."""

  def init(key, site):
    if site.norm is None:
      raise ValueError('a site that no residual follows')
    both = site.x.astype(jnp.float32), site.y.astype(jnp.float32)
    values = zip('xhy', (*both, sum(both)), strict=True)
    return {k: x for name, v in values for k, x in grid.calibrated(name, v, site.mask).items()}

  def apply(p, site):
    both = grid.rounded('x', p, site.x) + grid.rounded('h', p, site.y)
    return (grid.rounded('y', p, both) - site.x.astype(jnp.float32)).astype(site.y.dtype)

  return Delta(init, apply, at, examples=examples)


def _table(grid: Grid) -> Delta:
  """The word table, of whose rows only those that are read are rounded."""

  def init(key, site):
    return grid.calibrated('w', site.w)

  def apply(p, site):
    x, *rest = site.y
    return (grid.rounded('w', p, x), *rest)

  return Delta(init, apply, 'embed/words', first=True)
