"""The formats that a matrix may be held in. A table of names: nothing is imported for it."""

from typing import NamedTuple


class Format(NamedTuple):
  """How a matrix is held, and what is multiplied with it.

  Attributes:
    codes: 'int8', 'int4' (both symmetric) or 'nf4' (QLoRA's 16 quantiles).
    inputs: what the other operand of a product becomes: 'float' (the matrix becomes float
      instead), 'token' (int8, a scale for each token, from the token), 'static' (int8, ranges that
      were calibrated).
    block: how many numbers along K, or along a row of a table, share a scale; 0: all.
    stochastic: whether the gradient of the inputs is rounded to integers at random, without bias,
      and not to the nearest.
  """

  codes: str
  inputs: str
  block: int
  stochastic: bool = False


# int8: a scale for each output, and for each token. The last three are memory alone.
FORMATS = {
  'int8': Format('int8', 'token', 0),
  'int8_stochastic': Format('int8', 'token', 0, True),
  'int8_static': Format('int8', 'static', 0),
  'int8_weight': Format('int8', 'float', 0),
  'int4': Format('int4', 'float', 32),
  'nf4': Format('nf4', 'float', 64),
}
FLOAT = 'float'
