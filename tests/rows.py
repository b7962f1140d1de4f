"""What a method promises: a row of the contract table. Families keep theirs in rows_*.py."""

from typing import NamedTuple


class Row(NamedTuple):
  """What a method promises.

  Attributes:
    config: configs/<config>.py, whose method and rules are tested.
    trains: numbers trained in BERT-base without its head, in closed form.
    start: how far the logits may move, relative to the largest, when an untrained delta is
      attached. 0: not at all.
    merges: whether the trained delta folds into the weights.
    options: of the config's only method, where they differ from the config's.
    slices: whether the trained delta follows when heads and units of the encoder go.
    still: regex of trained paths that one batch need not move, where the method says why.
    tolerance: of logits that are the same but for the order of sums; larger where a number may then
      be rounded to the integer beside.
    int8: whether gradients are nearly the same over a base of int8 matrices.
  """

  config: str
  trains: int
  start: float = 0.0
  merges: bool = False
  slices: bool = True
  options: dict = {}
  still: str = ''
  tolerance: float = 2e-5
  int8: bool = True

  def __str__(self):
    return '-'.join((self.config, *self.options))


# BERT-base: layers, hidden, feed-forward; LayerNorms (two a layer and the embedding's).
L, D, F = 12, 768, 3072
NORMS = (2 * L + 1) * 2 * D
LINEARS = r'layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))/matmul'
