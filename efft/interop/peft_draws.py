"""What torch draws from a seed on a CPU, to the bit: constants that PEFT's files may leave out."""

import math
from collections.abc import Sequence

import numpy as np

from efft.errors import InputError

_BITS = 24  # of a float32's fraction, with the one in front


def kaiming(seed: int, shapes: Sequence[tuple[int, int]], where: str) -> list[np.ndarray]:
  """Matrices [rows, fan in], one after the other, each uniform in +-sqrt(6 / fan in).

  As `tensor.uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))`: the same
  generator (MT19937), a draw of 32 bits a number, of which the low 24 count, and one rounding.
  """
  if not isinstance(seed, int) or not 0 <= seed < 2**32:
    found = f'a seed {seed!r:.40} of random projections'
    raise InputError(where, found, 'one from 0 to 2^32 - 1', 'save it with save_projection=True')
  draws, found = np.random.RandomState(seed), []
  for shape in shapes:
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    low, high = np.float32(-bound), np.float32(bound)
    bits = draws.randint(0, 2**32, math.prod(shape), np.uint32) & (2**_BITS - 1)
    values = bits * 2.0**-_BITS * np.float64(high - low) + np.float64(low)
    found.append(values.astype(np.float32).reshape(shape))
  return found
