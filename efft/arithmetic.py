"""Arithmetic on trained parameters: task vectors, low-rank factors and heads of several runs.

Pure functions on arrays: sums in float64, results in float32. The names are those of HF PEFT's
`add_weighted_adapter`; `efft.combining` says which leaves they act on.
"""

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

PLAIN = ('linear', 'ties', 'dare_linear', 'dare_ties', 'magnitude_prune')
HOWS = (*PLAIN, 'cat', 'svd', *(f'{how}_svd' for how in PLAIN[1:]))
HEADS = ('keep', 'average', 'union')
MAJORITIES = ('total', 'frequency')
OUT = 'params/head/out/'  # the last linear of a head, whose columns are the classes


class Mix(NamedTuple):
  """One tensor out of several: `mix(tensors, weights, path)`, float64.

  'linear' is task arithmetic (Ilharco et al. 2022, https://arxiv.org/abs/2212.04089), the sum of
  w_i x_i, over adapters AdapterSoup (Chronopoulou et al. 2023, https://arxiv.org/abs/2302.07027).
  'magnitude_prune' keeps the int(density n) largest of the n numbers of each x_i first.

  'ties' (Yadav et al. 2023, https://arxiv.org/abs/2306.01708) does so too, elects a sign for each
  number, and takes sum(w_i x_i) / count over the x_i that have it. The paper's lambda is a weight
  that all share. 'dare_linear' and 'dare_ties' (Yu et al. 2023,
  https://arxiv.org/abs/2311.03099) keep each number with probability `density`, divided by it.

  As in PEFT, densities count within a tensor (the TIES paper's within the whole model), signs are
  elected before the weights, and a sum of exactly zero elects plus. Of equal magnitudes the first
  are kept, where torch's choice is arbitrary.

  Attributes:
    how: of `PLAIN`.
    density: share of the numbers that stay; 1: all.
    majority: 'total': the sign of the sum, as in the paper; 'frequency': of the count of signs.
    seed: of DARE's masks, each drawn for (seed, place in the list, path).
  """

  how: str = 'linear'
  density: float = 1.0
  majority: str = 'total'
  seed: int = 0

  def __call__(self, tensors: Sequence, weights: Sequence[float], path: str) -> np.ndarray:
    x = np.stack([np.asarray(tensor, np.float64) for tensor in tensors])
    if self.density < 1 and self.how.startswith('dare'):
      draws = [_draws(self.seed, number, path, x.shape[1:]) for number in range(len(x))]
      x = np.where(np.stack(draws) < self.density, x / self.density, 0.0)
    elif self.density < 1 and self.how != 'linear':
      x = np.stack([largest(tensor, self.density) for tensor in x])
    weighted = x * np.reshape(np.float64(weights), (-1, *[1] * (x.ndim - 1)))
    if not self.how.endswith('ties'):
      return weighted.sum(0)
    votes = x.sum(0) if self.majority == 'total' else np.sign(x).sum(0)
    agree = np.sign(x) == np.where(votes >= 0, 1.0, -1.0)
    return (weighted * agree).sum(0) / np.maximum(agree.sum(0), 1)


def largest(x: np.ndarray, density: float) -> np.ndarray:
  """`x` with all but its int(density x.size) largest magnitudes at zero."""
  mask = highest(np.abs(x).ravel(), int(density * x.size))
  return np.where(mask.reshape(x.shape), x, 0.0)


def highest(scores: np.ndarray, count: int) -> np.ndarray:
  """bool [N]: the `count` largest of scores [N], the first of equal ones."""
  if count == 0:
    return np.zeros(scores.shape, bool)
  least = np.partition(scores, scores.size - count)[scores.size - count]
  kept = scores > least
  kept[np.flatnonzero(scores == least)[: count - int(kept.sum())]] = True
  return kept


def around(
  runs: Sequence[Mapping], starts: Mapping, weights: Sequence[float], mix: Mix
) -> dict[str, np.ndarray]:
  """start + mix(leaf - start), leaf by leaf.

  Args:
    runs: {path: array} of each; a leaf that only some have is at its start in the others.
    starts: {path: array}; zero where there is none.
    weights: one a run.
    mix: what becomes of the differences.
  """
  found = {}
  for path in sorted(set().union(*runs)):
    start = np.asarray(starts.get(path, 0.0), np.float64)
    vectors = [run[path] - start if path in run else np.zeros_like(start) for run in runs]
    found[path] = np.float32(start + mix(vectors, weights, path))
  return found


class Factors(NamedTuple):
  """scale a b, added to a kernel, and scale bias, added to its bias."""

  a: np.ndarray
  b: np.ndarray
  bias: np.ndarray | None = None
  scale: float = 1.0
  LEAVES = ('a', 'b', 'bias')

  @property
  def rank(self) -> int:
    return self.a.shape[1]

  @property
  def update(self) -> np.ndarray:
    return self.scale * (np.float64(self.a) @ np.float64(self.b))


def factorwise(
  parts: Sequence[Factors], weights: Sequence[float], mix: Mix, path: str, same_a: bool = False
) -> Factors:
  """PEFT's arithmetic on factors of one rank: each mixed for itself, with sqrt(w_i scale_i).

  The sign of w_i goes to a. The product of two sums also has what crosses between the runs: it is
  not the sum of the updates, which `concatenated` gives. With `same_a` (LoRA-FA) all parts have
  one a, which stays, and b is mixed with w_i scale_i: for 'linear' that is the sum of the updates.
  PEFT forgets the bias; here it is mixed with w_i scale_i.
  """
  whole = [w * part.scale for w, part in zip(weights, parts, strict=True)]
  bias = _bias(parts, whole, mix, path)
  if same_a:
    return Factors(parts[0].a, mix([part.b for part in parts], whole, f'{path}/b'), bias)
  roots = np.sqrt(np.abs(whole))
  a = mix([part.a for part in parts], roots * np.where(np.less(whole, 0), -1, 1), f'{path}/a')
  return Factors(a, mix([part.b for part in parts], roots, f'{path}/b'), bias)


def concatenated(parts: Sequence[Factors], weights: Sequence[float], path: str) -> Factors:
  """The sum of w_i scale_i a_i b_i, exactly: columns of a side by side, weights and scales in b.

  (PEFT multiplies them into a.)
  """
  whole = [w * part.scale for w, part in zip(weights, parts, strict=True)]
  a = np.concatenate([np.float64(part.a) for part in parts], 1)
  b = np.concatenate([w * np.float64(part.b) for w, part in zip(whole, parts, strict=True)])
  return Factors(a, b, _bias(parts, whole, Mix(), path))


def truncated(part: Factors, rank: int) -> Factors:
  """The best approximation of a b by `rank`: a orthonormal, b with the singular values.

  By the factors' QR decompositions; the kernel-sized product is never made.
  """
  (left, r), (right, s) = np.linalg.qr(part.a), np.linalg.qr(part.b.T)
  u, values, v = np.linalg.svd(r @ s.T, full_matrices=False)
  return Factors(left @ u[:, :rank], values[:rank, None] * (v @ right.T)[:rank], part.bias)


def approximated(
  parts: Sequence[Factors], weights: Sequence[float], mix: Mix, path: str, rank: int
) -> Factors:
  """The updates themselves mixed, and approximated by `rank`: PEFT's ties_svd and its like."""
  mixed = mix([part.update for part in parts], weights, path)
  u, values, v = np.linalg.svd(mixed, full_matrices=False)
  bias = _bias(parts, [w * part.scale for w, part in zip(weights, parts, strict=True)], mix, path)
  return Factors(u[:, :rank], values[:rank, None] * v[:rank], bias)


def alike(found: Mapping[str, Factors]) -> dict[str, Factors]:
  """The same updates, float32, with one rank for all: zeros where there was less."""
  rank = max(part.rank for part in found.values())
  biased = any(part.bias is not None for part in found.values())

  def grow(part):
    more = rank - part.rank
    bias = np.zeros(part.b.shape[1]) if biased and part.bias is None else part.bias
    return Factors(
      np.float32(np.pad(part.a, ((0, 0), (0, more)))),
      np.float32(np.pad(part.b, ((0, more), (0, 0)))),
      None if bias is None else np.float32(bias),
    )

  return {path: grow(part) for path, part in found.items()}


def head(
  how: str, heads: Sequence[Mapping], labels: Sequence[Sequence[str]], weights: Sequence[float]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """The leaves and the labels of the combined head.

  'keep': the first run's. 'average': the mean with `weights`, divided by their sum; columns go by
  label, in the first run's order. 'union': a column for each label of any run, the mean where
  several runs have it, and the mean of what precedes the columns.

  A union is an approximation: each column was trained behind its own run's encoder and hidden
  layer, and against its own run's other classes only, so scores of columns from different runs
  are not calibrated to each other.
  """
  if how == 'keep':
    return dict(heads[0]), tuple(labels[0])
  names = tuple(dict.fromkeys(itertools.chain(*labels)))
  places = [{name: at for at, name in enumerate(own)} for own in labels]
  found = {}
  for path in heads[0]:
    if not path.startswith(OUT) or not names:  # a number has no classes to go by
      found[path] = _mean([leaves[path] for leaves in heads], weights)
      continue
    columns = []
    for name in names:
      owners = [i for i, own in enumerate(places) if name in own]
      own = [heads[i][path][..., places[i][name]] for i in owners]
      columns.append(_mean(own, [weights[i] for i in owners]))
    found[path] = np.stack(columns, -1)
  return found, names


def _mean(tensors: Sequence, weights: Sequence[float]) -> np.ndarray:
  if not any(weights):
    weights = [1.0] * len(tensors)
  return np.float32(np.average(np.float64(tensors), axis=0, weights=weights))


def _bias(parts, weights, mix, path):
  """A missing bias is zero; None where all are missing."""
  if all(part.bias is None for part in parts):
    return None
  zero = np.zeros(parts[0].b.shape[1])
  return mix([zero if p.bias is None else p.bias for p in parts], weights, f'{path}/bias')


def _draws(seed: int, number: int, path: str, shape) -> np.ndarray:
  return np.random.default_rng([seed, number, zlib.crc32(path.encode())]).random(shape)
