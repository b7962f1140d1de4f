"""Batches of fixed shapes, each a pure function of (seed, step).

B examples a batch, T tokens: the smallest bucket that holds the longest example of the batch. A
batch is {'input_ids': int32 [B, T], 'mask': bool [B, T], 'token_types': int32 [B, T], 'labels': as
in Split [B, ...] (absent where unlabelled), 'weights': float32 [B]}. All of it is of the global
batch: a process takes its rows of it.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from efft.data.splits import seeded
from efft.data.tokens import Encoded
from efft.errors import InputError

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
# Batches whose examples are sorted together under group_by_length: enough for even lengths, few
# enough to mix.
MEGA = 50


def buckets_for(encoded: Encoded, buckets: Sequence[int] = BUCKETS) -> tuple[int, ...]:
  """The buckets that can occur: capped at max_length, and none beyond the longest example's."""
  longest = int(encoded.lengths.max(initial=1))
  sizes = sorted({min(size, encoded.max_length) for size in buckets} | {encoded.max_length})
  if sizes[0] < 1:
    raise InputError('buckets', str(sizes[0]), 'lengths of 1 or more', 'correct them')
  last = next(i for i, size in enumerate(sizes) if size >= longest)
  return tuple(sizes[: last + 1])


class Batches:
  """Training batches: each example once an epoch, batches running across the borders of epochs.

  With group_by_length, examples of similar length share a batch: the shuffled epoch is cut into
  runs of MEGA batches, each run sorted, and its batches shuffled.
  """

  def __init__(
    self,
    encoded: Encoded,
    batch_size: int,
    seed: int,
    buckets: Sequence[int] = BUCKETS,
    group_by_length: bool = False,
  ):
    if not len(encoded):
      raise InputError('training split', 'no examples', 'one or more', 'check the data')
    if batch_size < 1:
      raise InputError('batch_size', str(batch_size), '1 or more', 'raise it')
    self.encoded, self.batch_size, self.seed = encoded, batch_size, seed
    self.buckets = buckets_for(encoded, buckets)
    self.group_by_length = group_by_length
    self._orders: dict[int, np.ndarray] = {}

  @property
  def steps_per_epoch(self) -> int:
    """Steps until every example was seen once."""
    return self.steps(1)

  def steps(self, epochs: float) -> int:
    """Steps that see `epochs` times the examples, the last batch full."""
    return max(1, -int(-len(self.encoded) * epochs // self.batch_size))

  def rows(self, step: int) -> np.ndarray:
    """Example indices [B] of a step."""
    size = len(self.encoded)
    stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
    epochs, places = stream // size, stream % size
    return np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

  def batch(self, step: int) -> dict[str, np.ndarray]:
    """The batch of a step, counted from 0."""
    return collate(self.encoded, self.rows(step), self.buckets)

  def _order(self, epoch: int) -> np.ndarray:
    if epoch not in self._orders:
      # Two epochs at a time are in use, at a border; a batch that spans more is of a tiny data set.
      for old in sorted(self._orders)[:-2]:
        self._orders.pop(old, None)
      self._orders[epoch] = self._permutation(epoch)
    return self._orders[epoch]

  def _permutation(self, epoch: int) -> np.ndarray:
    rng = seeded('batches', self.seed, epoch)
    size, length = self.batch_size, len(self.encoded)
    order = rng.permutation(length)
    if not self.group_by_length:
      return order
    # The first batch that begins in this epoch; what stands before it completes the last epoch's
    # batch.
    start = min(-epoch * length % size, length)
    stop = start + (length - start) // size * size
    lengths = self.encoded.lengths
    for run in range(start, stop, MEGA * size):
      chosen = order[run : min(run + MEGA * size, stop)]
      chosen = chosen[np.argsort(lengths[chosen], kind='stable')].reshape(-1, size)
      order[run : run + chosen.size] = chosen[rng.permutation(len(chosen))].ravel()
    return order


def evaluation(
  encoded: Encoded, batch_size: int, buckets: Sequence[int] = BUCKETS
) -> Iterator[dict[str, np.ndarray]]:
  """Every example once, longest first, so that a lack of memory shows at once.

  Each batch also has 'rows', int32 [B]: the examples' indices in the split, -1 where the last batch
  is filled up with repetitions of weight 0. `logits[rows[real]] = batch_logits[real]` restores the
  order.
  """
  sizes = buckets_for(encoded, buckets)
  order = np.argsort(-encoded.lengths, kind='stable')
  for start in range(0, len(order), batch_size):
    rows = order[start : start + batch_size]
    missing = batch_size - len(rows)
    # Repetitions, not empty rows: attention over no token at all is NaN.
    batch = collate(encoded, np.concatenate([rows, np.repeat(rows[:1], missing)]), sizes)
    batch['weights'][len(rows) :] = 0
    batch['rows'] = np.concatenate([rows, np.full(missing, -1)]).astype(np.int32)
    yield batch


def collate(encoded: Encoded, rows: np.ndarray, buckets: Sequence[int]) -> dict[str, np.ndarray]:
  """The batch of the examples `rows` [B]; T is the smallest bucket that holds them all."""
  starts, lengths = encoded.offsets[rows], encoded.lengths[rows]
  width = next(size for size in buckets if size >= lengths.max())
  mask = np.arange(width) < lengths[:, None]
  flat = (starts[:, None] + np.arange(width))[mask]
  input_ids = np.full(mask.shape, encoded.pad_id, np.int32)
  input_ids[mask] = encoded.ids[flat]
  token_types = np.zeros(mask.shape, np.int32)
  token_types[mask] = encoded.type_ids[flat]
  batch = {
    'input_ids': input_ids,
    'mask': mask,
    'token_types': token_types,
    'weights': np.ones(len(rows), np.float32),
  }
  return batch if encoded.labels is None else batch | {'labels': encoded.labels[rows]}
