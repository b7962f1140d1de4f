"""Updates of the kernels that are sparse or short in the frequency domain."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from efft.peft.base import Delta
from efft.peft.updates import QUERY_VALUE, dense, kernel_shape, uniform

FAMILY = 'spectral'  # in `efft methods`


def fourierft(
  n_frequency: int = 1000,
  scaling: float = 150.0,
  random_loc_seed: int = 777,
  init: str = 'normal',
  at: str = QUERY_VALUE,
) -> Delta:
  """FourierFT (Gao et al. 2024, https://arxiv.org/abs/2405.03003): y + x scaling Re(ifft2(F)).

  F [d_in, d_out] is zero but for `n_frequency` entries, which train; where they are is drawn once
  and is the same for all kernels of a shape. They start as N(0, 1), as in the paper, so the model
  does *not* start unchanged; 'zeros' does. Trains n_frequency numbers a kernel, 24,000 in
  BERT-base. The positions are those that HF PEFT draws from the same seed, and are kept beside
  the coefficients as integers. The update is made in float32 whatever the model computes in.

  Args:
    n_frequency: n, at least 1.
    scaling: alpha; the paper tunes 29 to 150 for base models.
    random_loc_seed: of the positions.
    init: 'normal' or 'zeros'.
    at: which kernels; the default is query and value of every layer.
  """
  if n_frequency < 1:
    raise ValueError(f'n_frequency {n_frequency} is below 1')
  if init not in ('normal', 'zeros'):
    raise ValueError(f"init {init!r} is neither 'normal' nor 'zeros'")

  def start(key, site):
    shape = kernel_shape(site)
    if n_frequency > math.prod(shape):
      raise ValueError(f'n_frequency {n_frequency} is more than a kernel {list(shape)} has')
    spread = 1.0 if init == 'normal' else 0.0
    return {'spectrum': spread * jax.random.normal(key, (n_frequency,), jnp.float32)}

  def shared(key, sites):
    shapes = {site.w.shape for site in sites.values()}
    return {
      _leaf(shape): jnp.asarray(positions(n_frequency, shape, random_loc_seed)) for shape in shapes
    }

  def update(p, shape):
    rows, columns = p[_leaf(shape)]
    spectrum = jnp.zeros(shape, jnp.float32).at[rows, columns].set(p['spectrum'])
    return jnp.fft.ifft2(spectrum).real * scaling

  return dense(start, update, at, shared=shared)


@functools.lru_cache
def positions(n: int, shape: tuple[int, int], seed: int) -> np.ndarray:
  """Rows and columns [2, n] of n different entries of a [d_in, d_out] matrix.

  The first n of torch.randperm(d_out d_in) after manual_seed(seed), as places in torch's [d_out,
  d_in]: the same generator (MT19937) and the same shuffle, stopped early.
  """
  d_in, d_out = shape
  draws = np.random.RandomState(seed).randint(0, 2**32, n, np.uint32).astype(np.int64)
  order = np.arange(d_in * d_out)
  for i, draw in enumerate(draws):
    j = i + draw % (len(order) - i)
    order[i], order[j] = order[j], order[i]
  return np.stack([order[:n] % d_in, order[:n] // d_in]).astype(np.int32)


def c3a(
  block_size: int = 0,
  init: str = 'xavier_uniform',
  at: str = QUERY_VALUE,
) -> Delta:
  """C3A (Chen et al. 2024, https://arxiv.org/abs/2407.19342): y + x C / d_in, C block-circulant.

  The [d_in, d_out] kernel is cut into square blocks, each of which is made from one vector c:
  block[i, j] = c[(i - j) mod block_size], so that it may have full rank. Trains d_in d_out /
  block_size numbers a kernel: 768 for BERT-base's 768 x 768 with one block. The vectors start
  uniform in +-sqrt(6 / (d_in + d_out)) as in HF PEFT, so the model does not quite start unchanged;
  with 'zeros' it does.

  The paper convolves by FFT in the forward pass. Here the circulant matrix is made by copying and
  multiplied, which is the same function: products are what accelerators are fast at, and FFTs of
  the activations would need them in float32.

  Args:
    block_size: b, which divides d_in and d_out; 0: their greatest common divisor, the fewest
      numbers (HF PEFT: 256).
    init: 'xavier_uniform', 'gaussian', 'kaiming_uniform' or 'zeros', by the kernel's sizes.
    at: which kernels; the default is query and value of every layer.
  """
  if block_size < 0:
    raise ValueError(f'block_size {block_size} is below 0')
  draws = {
    'xavier_uniform': lambda key, shape, fan: uniform(key, shape, sum(fan) / 6),
    'kaiming_uniform': lambda key, shape, fan: uniform(key, shape, fan[0]),
    'gaussian': lambda key, shape, fan: jax.random.normal(key, shape, jnp.float32),
    'zeros': lambda key, shape, fan: jnp.zeros(shape, jnp.float32),
  }
  if init not in draws:
    raise ValueError(f'init {init!r} is none of {", ".join(draws)}')

  def start(key, site):
    d_in, d_out = kernel_shape(site)
    block = block_size or math.gcd(d_in, d_out)
    if d_in % block or d_out % block:
      raise ValueError(f'block_size {block} does not divide a kernel [{d_in}, {d_out}]')
    shape = d_out // block, d_in // block, block
    return {'kernel': draws[init](key, shape, (d_in, d_out))}

  def update(p, shape):
    blocks = circulant(p['kernel']).transpose(1, 2, 0, 3)
    return blocks.reshape(shape) / shape[0]

  return dense(start, update, at)


def circulant(c):
  """[..., b] -> [..., b, b] with [i, j] = c[(i - j) mod b], by copies alone: no gather to undo."""
  b = c.shape[-1]
  rows = jnp.tile(c, b + 1).reshape(*c.shape[:-1], b, b + 1)[..., :b]  # c[(i + j) mod b]
  return jnp.roll(rows[..., ::-1], 1, axis=-1)


def _leaf(shape) -> str:
  return f'positions_{shape[0]}x{shape[1]}'
