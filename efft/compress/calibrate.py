"""What linear layers read on examples, and the ranges that their integers cover.

K inputs and N outputs of a kernel [K, N]; n tokens; G groups of inputs. A range (low, high) holds
0; a symmetric one is (-high, high).
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efft import qtensor
from efft.compress.base import Subject
from efft.models import dots

TOKENS = 1024  # kept of each layer's inputs
BINS = 2**14
# 1 % apart, down to a 235th: outliers may be a hundred times as large as most numbers.
SHARES = 2.0 ** (-np.arange(505) / 64)
# Of a weight range; at 8 bits little is cut off, at 4 bits up to a half.
WEIGHT_SHARES = 1 - 0.02 * np.arange(31)
_LEAST = 1e-5  # of a smoothing factor, as in SmoothQuant's own code
_SMALLEST = 1e-30  # of a range: what a step is worth has an inverse in float32


class Inputs(NamedTuple):
  """What the inputs of a linear layer were on real tokens.

  Attributes:
    low, high: float32 [K], the extremes of each.
    rows: float32 [n, K], a sample of the tokens.
    hessian: float32 [K, K], 2 X^T X over all tokens; None where it was not asked for.
  """

  low: np.ndarray
  high: np.ndarray
  rows: np.ndarray
  hessian: np.ndarray | None = None

  def divided(self, smooth: np.ndarray) -> 'Inputs':
    """These inputs, each divided by its factor."""
    h = self.hessian
    h = None if h is None else h / smooth / smooth[:, None]
    return Inputs(self.low / smooth, self.high / smooth, self.rows / smooth, h)

  def picked(self, index: np.ndarray) -> 'Inputs':
    """Some of these inputs, in that order."""
    h = None if self.hessian is None else self.hessian[np.ix_(index, index)]
    return Inputs(self.low[index], self.high[index], self.rows[:, index], h)


def observe(
  subject: Subject, paths: Iterable[str], tokens: int = TOKENS, hessians: bool = False
) -> dict[str, Inputs]:
  """One pass over the subject's batches: what the linear layers at `paths` read.

  Padding and rows of weight 0 are left out; deltas act. Extremes and hessians are over all tokens,
  gathered on the device in float32; the sample is drawn anew from each batch, as many tokens of
  each. Query, key and value read the same, and share their entry.

  Args:
    subject: with the float encoder; all layers are seen as they are before any is quantised.
    paths: 'layer_0/mlp/up'.
    tokens: about how many are kept.
    hessians: whether to sum 2 X^T X, K^2 numbers a layer.

  Raises:
    ValueError: no batches, inputs that are not finite or that no token has.
  """
  if not len(subject.batches):
    raise ValueError('no examples to calibrate with')
  sources = {path: _source(path) for path in paths}
  state = {}
  for path in dict.fromkeys(sources.values()):
    width = _kernel(subject.variables['params'], path).shape[0]
    ends = np.full(width, np.inf, np.float32)
    state[path] = {'low': ends, 'high': -ends}
    if hessians:
      state[path]['hessian'] = np.zeros((width, width), np.float32)
  share = -(-tokens // len(subject.batches))

  def add(state, variables, batch, seed):
    found, rows, masks, drawn = dict(state), {}, [], {}

    def tap(module, site, y, x=None, mask=None, **context):
      path = '/'.join(module.path)
      if site == 'words':
        masks.append(y[1])  # for 'embed/project', which has none of its own
      if site == 'matmul' and path in state:
        real = batch['weights'] > 0
        if x.ndim == 3:
          real = real[:, None] & (masks[0] if mask is None else mask)
        x, real = x.reshape(-1, x.shape[-1]).astype(jnp.float32), real.reshape(-1)
        found[path] = _add(state[path], x, real)
        if real.shape not in drawn:  # the same tokens for all layers
          bits = dots.hash_bits(seed, real.shape).astype(jnp.float32)
          drawn[real.shape] = lax.top_k(jnp.where(real, bits, -1), min(share, len(real)))[1]
        first = drawn[real.shape]
        rows[path] = x[first], real[first]
      return y

    subject.logits(variables, batch, tap)
    return found, rows

  add, variables = jax.jit(add, donate_argnums=0), jax.device_put(subject.variables)
  kept = {path: [] for path in state}
  for i, batch in enumerate(subject.batches):
    state, rows = add(state, variables, batch, np.array([subject.seed % 2**32, i], np.uint32))
    for path, (x, real) in jax.device_get(rows).items():
      kept[path].append(x[real])
  found, sums = {}, jax.device_get(state)
  sample = {source: np.concatenate(parts) for source, parts in kept.items()}
  for path, source in sources.items():
    if not all(np.isfinite(one).all() for one in sums[source].values()):
      raise ValueError(f'the inputs of {path} on the examples are not finite, or there are none')
    found[path] = Inputs(rows=sample[source], **sums[source])
  return found


def _add(sums: dict, x, real) -> dict:
  some = real[:, None]
  new = {
    'low': jnp.minimum(sums['low'], jnp.where(some, x, jnp.inf).min(0)),
    'high': jnp.maximum(sums['high'], jnp.where(some, x, -jnp.inf).max(0)),
  }
  if 'hessian' in sums:
    rows = jnp.where(some, x, 0)
    new['hessian'] = sums['hessian'] + 2 * dots.contract('nk,nl->kl', rows, rows)
  return new


def _source(path: str) -> str:
  return re.sub('/attention/(key|value)$', '/attention/query', path)


def _kernel(params, path: str):
  for name in path.split('/'):
    params = params[name]
  return params['kernel']


def minmax(seen: Inputs, symmetric: bool) -> tuple[float, float]:
  """The range from the least to the largest number of all tokens."""
  return _ends(seen.low.min(), seen.high.max(), symmetric)


def percentile(seen: Inputs, symmetric: bool, percent: float = 99.99) -> tuple[float, float]:
  """The range that leaves out the numbers beyond a percentile of all numbers of the sample.

  Symmetric: that of |x|. Else (100 - percent) % are left out at each end.
  """
  if symmetric:
    high = np.percentile(np.abs(seen.rows), percent)
    return _ends(-high, high, True)
  return _ends(*np.percentile(seen.rows, [100 - percent, percent]), False)


def mse(seen: Inputs, symmetric: bool) -> tuple[float, float]:
  """The range with the least squared error of what is rounded and cut off.

  A search over `SHARES` of the range from the least to the largest number, by a histogram of the
  sample in `BINS` bins. An asymmetric range is searched one end after the other, the high one
  first.
  """
  low, high = minmax(seen, symmetric)
  if not 0 < high - low < np.inf:
    return low, high
  counts, edges = np.histogram(seen.rows, BINS, (low, high))
  used = counts > 0
  x, counts = ((edges[1:] + edges[:-1]) / 2)[used], counts[used]

  def best(ends):
    errors = []
    for low, high in ends:
      step, zero = steps(low, high, symmetric)
      integers = np.clip(np.rint(x / step) + zero, -127 if symmetric else -128, 127)
      errors.append(np.sum(counts * (x - (integers - zero) * step) ** 2))
    return ends[int(np.argmin(errors))]

  if symmetric:
    return best([(-share * high, share * high) for share in SHARES])
  if high > 0:
    low, high = best([(low, share * high) for share in SHARES])
  return best([(share * low, high) for share in SHARES]) if low < 0 else (low, high)


RANGES = {'minmax': minmax, 'percentile': percentile, 'mse': mse}


def _ends(low, high, symmetric: bool) -> tuple[float, float]:
  low, high = min(float(low), 0.0), max(float(high), 0.0)
  return (-max(-low, high), max(-low, high)) if symmetric else (low, high)


def steps(low: float, high: float, symmetric: bool) -> tuple[float, int]:
  """(what a step is worth, the integer of 0): from -127 to 127 if symmetric, else from -128."""
  if symmetric:
    return high / 127, 0
  step = (high - low) / 255
  return step, int(np.clip(np.rint(-128 - low / step), -128, 127))


def static(
  seen: Inputs, ranges: str = 'minmax', groups: int = 1, symmetric: bool = True,
  percent: float = 99.99,
) -> dict[str, np.ndarray]:  # fmt: skip
  """The fields of a QTensor whose inputs are 'static': x_scale, x_zero and order where needed.

  With groups, inputs are sorted by range and cut into groups of equal size, each with a range of
  its own (per-embedding-group quantisation with a permutation; Bondarenko et al. 2021,
  https://arxiv.org/abs/2109.12948, section 4). The paper groups the input, output and sum of each
  feed-forward block; here it is the inputs of a linear layer, any one, and outputs and sums stay
  float. A group whose inputs are all 0 gets the range of all.

  Args:
    seen: the inputs, divided by `smooth` already.
    ranges: a name of `RANGES`.
    groups: G.
    symmetric: whether 0 is the middle of the range; costs a bit where inputs have one sign.
    percent: for 'percentile'.

  Raises:
    ValueError: groups that do not divide the inputs; a range that is 0, or too small for float32.
  """
  width = len(seen.low)
  if width % groups:
    raise ValueError(f'{width} inputs, which {groups} groups do not divide')
  seen, order, fields = seen._replace(hessian=None), np.arange(width), {}
  if groups > 1:
    spread = np.maximum(-seen.low, seen.high) if symmetric else seen.high - seen.low
    order = np.argsort(spread, kind='stable')
    fields['order'] = order.astype(np.int32)
  options = {'percent': percent} if ranges == 'percentile' else {}

  def ends(part):
    return RANGES[ranges](part, symmetric, **options)

  found = [ends(seen.picked(part)) for part in order.reshape(groups, -1)]
  whole = ends(seen) if groups > 1 else found[0]
  found = [whole if low == high else (low, high) for low, high in found]
  sizes = np.array([high - low for low, high in found], np.float32)
  if not ((sizes > _SMALLEST) & np.isfinite(sizes)).all():
    low, high = (end + 0.0 for end in whole)
    raise ValueError(f'inputs that range from {low:.3g} to {high:.3g} on the examples')
  made = [steps(low, high, symmetric) for low, high in found]
  fields['x_scale'] = np.array([step for step, _ in made], np.float32)
  if not symmetric:
    fields['x_zero'] = np.array([zero for _, zero in made], np.int32)
  return fields


def smoothing(seen: Inputs, w: np.ndarray, alpha: float = 0.5) -> np.ndarray:
  """float32 [K] by which inputs are divided and rows of the kernel multiplied.

      s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)

  SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438, equation 4): outliers of inputs
  move into the weights. Zero inputs or rows are left alone (s = 1).

  Deviation: the paper folds 1 / s into the norm before query, key, value and the first feed-forward
  layer, so that these three share s, the maximum being over all their weights. After BERT's norms
  the residual goes on, and nothing can be folded in; inputs are divided where they are rounded, so
  every layer has an s of its own.

  Args:
    seen: the inputs.
    w: [K, N].
    alpha: the migration strength, from 0 to 1.
  """
  x, w = np.maximum(-seen.low, seen.high), np.abs(w).max(1)
  some = (x > 0) & (w > 0)
  x, w = (np.where(some, one, 1).astype(np.float64) for one in (x, w))
  return np.where(some, np.maximum(x**alpha / w ** (1 - alpha), _LEAST), 1).astype(np.float32)


def scales(
  w: np.ndarray, codes: str, block: int = 0, axis: int = 0, how: str = 'max'
) -> np.ndarray:
  """`qtensor.scales`, or with `how` 'mse' those among `WEIGHT_SHARES` of them, one for each block,
  with the least squared error.

  Bondarenko et al. 2021 choose weight ranges this way, a single one for a matrix.
  """
  largest = qtensor.scales(w, codes, block, axis)
  if how == 'max':
    return largest
  w = np.asarray(w, np.float32)
  (rows, columns), (r, c) = w.shape, largest.shape
  best, least = largest, np.full(largest.shape, np.inf)
  for share in WEIGHT_SHARES:
    scale = (largest * share).astype(np.float32)
    off = (qtensor.values(qtensor.encode(w, codes, scale), codes, scale) - w) ** 2
    off = off.reshape(r, rows // r, c, columns // c).sum((1, 3))
    best, least = np.where(off < least, scale, best), np.minimum(off, least)
  return best
