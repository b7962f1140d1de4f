"""Splits of a data set: what they hold, how they are carved, thinned and compared."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
  """One split, in the file's order.

  labels: int32 [N] (single), float32 [N] (regression), float32 [N, C] (multi), None where
  unlabelled.
  rows [N]: the line (or parquet row) of each example in `file`.
  """

  texts: list[str]
  pairs: list[str] | None
  labels: np.ndarray | None
  rows: np.ndarray
  file: str

  def __len__(self) -> int:
    return len(self.texts)

  def take(self, indices: Sequence[int]) -> 'Split':
    """The examples at `indices`, in that order."""
    indices = np.asarray(indices, np.int64)
    return dataclasses.replace(
      self,
      texts=[self.texts[i] for i in indices],
      pairs=self.pairs and [self.pairs[i] for i in indices],
      labels=None if self.labels is None else self.labels[indices],
      rows=self.rows[indices],
    )

  def keys(self) -> list[tuple[str, str | None]]:
    """What makes an example the same as another: its text and pair."""
    return list(zip(self.texts, self.pairs or [None] * len(self), strict=True))


def digest(splits: Mapping[str, Split]) -> str:
  """sha256 of the texts and labels of all splits, in their order, whatever file they came from."""
  total = hashlib.sha256()
  for name, part in sorted(splits.items()):
    total.update(f'{name} {len(part)} {part.pairs is not None};'.encode())
    for text in (*part.texts, *(part.pairs or ())):
      data = text.encode()
      total.update(len(data).to_bytes(8, 'big') + data)
    if part.labels is not None:
      total.update(f'{part.labels.dtype.str} {part.labels.shape};'.encode())
      total.update(part.labels.tobytes())
  return total.hexdigest()


def seeded(*what: Hashable) -> np.random.RandomState:
  """A generator that is a function of its arguments, alike on every machine and numpy version.

  RandomState, because numpy freezes its stream (NEP 19); Generator's may change between versions,
  and a resumed run must see the same order.
  """
  digest = hashlib.sha256(repr(what).encode()).digest()
  return np.random.RandomState(np.frombuffer(digest, '<u4'))


def subset(n: int, fraction: float, seed: int) -> np.ndarray:
  """Sorted indices of round(fraction * n) rows, one or more; smaller fractions are subsets."""
  size = min(n, max(1, round(fraction * n)))
  return np.sort(seeded('subset', seed).permutation(n)[:size])


def carve(
  keys: Sequence[Hashable], labels: np.ndarray | None, shares: Sequence[float], seed: int
) -> list[np.ndarray]:
  """Sorted row indices [rest, part of shares[0], part of shares[1], ...], stratified by int labels.

  Rows with equal keys stay together, so that no text is carved into two parts. Each class (and each
  column of a multi-label array) keeps a row in the rest. A part is empty only where there are too
  few rows.
  """
  groups: dict[Hashable, list[int]] = {}
  for i, key in enumerate(keys):
    groups.setdefault(key, []).append(i)
  members = list(groups.values())
  order = [members[g] for g in seeded('carve', seed).permutation(len(members))]
  strata: dict[int, list[list[int]]] = {}
  pinned = 1
  single = labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
  if single:
    for group in order:
      strata.setdefault(int(labels[group[0]]), []).append(group)
  elif labels is not None and labels.ndim == 2:
    strata[0], pinned = _one_of_each_first(order, labels)
  else:
    strata[0] = order
  parts: list[list[list[int]]] = [[] for _ in shares]
  rest: dict[int, list[list[int]]] = {}
  seen = 0
  for stratum in sorted(strata):
    left = strata[stratum]
    seen += len(left)
    for part, share in zip(parts, shares, strict=True):
      # Rounded over all classes so far, so that small classes do not add up to a part too large or
      # small.
      due = round(seen * share) - len(part)
      size = min(max(due, 0), len(left) - pinned)
      part += left[len(left) - size :]
      left = left[: len(left) - size]
    rest[stratum] = left
  for part in parts:
    largest = max(rest, key=lambda k: len(rest[k]))
    if not part and len(rest[largest]) > pinned:
      part.append(rest[largest].pop())
  kept = [group for left in rest.values() for group in left]
  if single:
    _bring_back(kept, parts, labels)
  return [
    np.sort([i for group in chosen for i in group]).astype(np.int64) for chosen in (kept, *parts)
  ]


def _bring_back(kept: list[list[int]], parts: list[list[list[int]]], labels: np.ndarray) -> None:
  """Of equal texts with different labels: a class that is in `parts` alone moves to `kept`.

  A part that is left empty gets a group whose classes are all in others of `kept`, if there is one.
  """

  def classes(group):
    return {int(labels[i]) for i in group}

  there = Counter(c for group in kept for c in classes(group))
  for part in parts:
    for group in list(part):
      if not all(there[c] for c in classes(group)):
        part.remove(group)
        kept.append(group)
        there.update(classes(group))
        if not part:
          spare = next((g for g in kept if all(there[c] > 1 for c in classes(g))), None)
          if spare is not None:
            kept.remove(spare)
            part.append(spare)
            there.subtract(classes(spare))


def _one_of_each_first(order: list[list[int]], labels: np.ndarray) -> tuple[list[list[int]], int]:
  """Multi-label: a group of each class moves to the front. Returns the order and how many moved."""
  has = np.stack([labels[group].any(0) for group in order])
  first = {int(column.argmax()) for column in has.T if column.any()}
  rest = [group for g, group in enumerate(order) if g not in first]
  return [order[g] for g in sorted(first)] + rest, max(1, len(first))


def leakage(splits: Mapping[str, Split]) -> dict[str, int]:
  """Per evaluation split: how many of its examples training also has (text and pair alike)."""
  train = set(splits['train'].keys())
  return {
    name: sum(key in train for key in split.keys())
    for name, split in splits.items()
    if name != 'train'
  }
