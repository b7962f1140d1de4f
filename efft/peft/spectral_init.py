"""LoRA that starts from what the weights or the data say."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, product
from efft.peft.lora import lora
from efft.peft.updates import QUERY_VALUE, kernel_shape
from efft.qtensor import NF4

FAMILY = 'low rank'  # in `efft methods`


def pissa(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, at: str = QUERY_VALUE) -> Delta:
  """PiSSA (Meng et al. 2024, https://arxiv.org/abs/2404.02948): trains the principal part of W.

  With the singular values S of W = U diag(S) V' and s = alpha / rank: A = U_r sqrt(S_r / s) and
  B = sqrt(S_r / s) V_r'. The frozen kernel becomes W - s A B, so the model starts unchanged but
  for rounding. Applies, counts and merges as LoRA.

  The start is kept as frozen leaves a0 and b0, from which the residual is computed again when a
  trained model is loaded. The singular values are exact (PEFT's 'pissa', not 'pissa_niter_4').
  """

  def start(w, scale):
    a, b = _truncated(w, rank)
    return a / scale**0.5, b / scale**0.5

  return _beside(lora(rank, alpha, dropout, at), start, rank, alpha / rank)


def olora(rank: int = 8, alpha: float = 8.0, dropout: float = 0.0, at: str = QUERY_VALUE) -> Delta:
  """OLoRA (Buyukakyuz 2024, https://arxiv.org/abs/2406.01775): an orthonormal start from QR.

  With W' = Q R, where W' [d_out, d_in] is the kernel as the paper writes it: A = R[:r]' and
  B = Q[:, :r]'. The frozen kernel becomes W - (alpha / rank) A B, so the model starts unchanged
  but for rounding. Applies, counts and merges as LoRA; a0 and b0 as for `pissa`.
  """

  def start(w, scale):
    q, r = jnp.linalg.qr(w.T)
    return r[:rank].T, q[:, :rank].T

  return _beside(lora(rank, alpha, dropout, at), start, rank, alpha / rank)


def loftq(
  rank: int = 8,
  alpha: float = 8.0,
  dropout: float = 0.0,
  quantizer: str = 'nf4',
  block: int = 64,
  steps: int = 5,
  at: str = QUERY_VALUE,
) -> Delta:
  """LoftQ (Li et al. 2023, https://arxiv.org/abs/2310.08659): LoRA makes up for quantisation.

  From A B = 0, `steps` times: Q = q(W - A B), then A B = the best matrix of that rank for W - Q.
  The frozen kernel becomes Q, and A, B start where the last step left them: near the pretrained
  model, not at it. With s = alpha / rank, A and B are divided by sqrt(s) each, so that s A B is
  what the algorithm found for any alpha. Applies, counts and merges as LoRA; the merged kernel is
  not quantised.

  The quantiser is simulated: Q is held in floating point, at the values that it can take. The
  frozen leaves a0, b0 are A and B before the last step, from which Q is computed again when a
  trained model is loaded; on another kind of device a value that lies between two levels may
  round the other way.

  Args:
    rank: r.
    alpha: numerator of the scale.
    dropout: rate on x before A, while training.
    quantizer: 'nf4', or 'int2' to 'int8': whole multiples of a step, as many below as above zero.
    block: numbers that share a scale, their largest absolute value. They follow each other in the
      rows of torch's weight [d_out, d_in].
    steps: T, at least 1.
    at: which kernels.
  """
  low, scale = lora(rank, alpha, dropout, at), alpha / rank
  if alpha <= 0:
    raise ValueError(f'alpha {alpha} is not positive')
  if steps < 1 or block < 1:
    raise ValueError(f'steps {steps} or block {block} is below 1')
  levels = _levels(quantizer)

  def init(key, site):
    d_in, d_out = _fits(site, rank)
    if d_in * d_out % block:
      raise ValueError(f'a kernel of [{d_in}, {d_out}] is not cut into blocks of {block}')
    w = site.w.astype(jnp.float32)

    def step(_, state):
      (a, b), _ = state
      a_next, b_next = _truncated(w - quantized(residual(w, a, b)), rank)
      return (a_next / scale**0.5, b_next / scale**0.5), (a, b)

    zero = jnp.zeros((d_in, rank), jnp.float32), jnp.zeros((rank, d_out), jnp.float32)
    (a, b), (a0, b0) = jax.lax.fori_loop(0, steps, step, (zero, zero))
    return {'a': a, 'b': b, 'a0': a0, 'b0': b0}

  def residual(w, a, b):
    return w - scale * product(a, b)

  def quantized(w):
    blocks = w.T.reshape(-1, block)
    largest = jnp.maximum(jnp.abs(blocks).max(1, keepdims=True), 1e-30)
    middles = (levels[1:] + levels[:-1]) / 2
    return (levels[jnp.searchsorted(middles, blocks / largest)] * largest).reshape(w.T.shape).T

  def rebase(p, module):
    return {**module, 'kernel': quantized(residual(module['kernel'], p['a0'], p['b0']))}

  return low._replace(init=init, rebase=rebase)


def eva(
  rank: int = 8,
  alpha: float = 8.0,
  dropout: float = 0.0,
  examples: int = 64,
  at: str = QUERY_VALUE,
) -> Delta:
  """EVA (Paischer et al. 2024, https://arxiv.org/abs/2410.07170): LoRA along the activations.

  A holds the `rank` first right singular vectors of the inputs that the linear sees in `examples`
  of the training data, padding left out; B starts at zero, so the model starts unchanged. Applies,
  counts and merges as LoRA. Linears that read the same input start with the same A.

  Deviations: one batch, where the paper goes on until the vectors no longer turn, and every kernel
  gets the same rank (the paper's rho = 1): ranks that depend on the data would not be known before
  it is seen.

  Args:
    rank: r.
    alpha: numerator of the scale.
    dropout: rate on x before A, while training.
    examples: how many texts to look at.
    at: which kernels.
  """
  low = lora(rank, alpha, dropout, at)
  if examples < 1:
    raise ValueError(f'examples {examples} is below 1')

  def init(key, site):
    _fits(site, rank)
    x = site.x.astype(jnp.float32)
    if site.mask is not None:
      x = x * site.mask[..., None]
    x = x.reshape(-1, x.shape[-1])
    # The eigenvectors of x'x, in rising order, are the right singular vectors of x.
    _, vectors = jnp.linalg.eigh(product(x.T, x))
    return {**low.init(key, site), 'a': vectors[:, ::-1][:, :rank]}

  return low._replace(init=init, examples=examples)


def lora_xs(
  rank: int = 16, alpha: float = 16.0, dropout: float = 0.0, at: str = QUERY_VALUE
) -> Delta:
  """LoRA-XS (Balazy et al. 2024, https://arxiv.org/abs/2405.17604): y + (alpha / rank) x A R B.

  A = U_r diag(S_r) and B = V_r' of the kernel's singular value decomposition are frozen; R
  [rank, rank] alone trains, and starts normal with standard deviation 1e-5: nearly, not exactly,
  the identity. rank^2 numbers a kernel, whatever its size. Merges as W + (alpha / rank) A R B.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  scale = alpha / rank

  def init(key, site):
    _fits(site, rank)
    u, s, vt = jnp.linalg.svd(site.w.astype(jnp.float32), full_matrices=False)
    r = 1e-5 * jax.random.normal(key, (rank, rank), jnp.float32)
    return {'a': u[:, :rank] * s[:rank], 'b': vt[:rank], 'r': r}

  def apply(p, site):
    low = product(site.dropout(site.x, dropout), p['a']).astype(site.x.dtype)
    return site.y + scale * product(product(low, p['r']).astype(site.x.dtype), p['b'])

  def merge(p, module):
    update = product(product(p['a'], p['r']), p['b'])
    return {**module, 'kernel': module['kernel'] + scale * update}

  return Delta(init, apply, at, merge)


def _beside(low: Delta, start: Callable, rank: int, scale: float) -> Delta:
  """LoRA from (a, b) = start(w, scale), beside a kernel from which their product is taken."""
  if scale <= 0:
    raise ValueError(f'alpha {scale * rank} is not positive')

  def init(key, site):
    _fits(site, rank)
    a, b = start(site.w.astype(jnp.float32), scale)
    return {'a': a, 'b': b, 'a0': a, 'b0': b}

  def rebase(p, module):
    return {**module, 'kernel': module['kernel'] - scale * product(p['a0'], p['b0'])}

  return low._replace(init=init, rebase=rebase)


def _fits(site, rank: int) -> tuple[int, int]:
  d_in, d_out = kernel_shape(site)
  if rank > min(d_in, d_out):
    raise ValueError(f'rank {rank} of a kernel of [{d_in}, {d_out}]')
  return d_in, d_out


def _truncated(w, rank: int):
  """(a, b) of the given rank with a b nearest to w, the singular values shared out evenly."""
  u, s, vt = jnp.linalg.svd(w, full_matrices=False)
  root = jnp.sqrt(s[:rank])
  return u[:, :rank] * root, root[:, None] * vt[:rank]


def _levels(quantizer: str):
  """What a quantiser can represent between -1 and 1, in rising order."""
  if quantizer == 'nf4':
    return jnp.array(NF4, jnp.float32)
  if quantizer not in [f'int{bits}' for bits in range(2, 9)]:
    raise ValueError(f"quantizer {quantizer!r} is neither 'nf4' nor 'int2' to 'int8'")
  top = 2 ** (int(quantizer[3:]) - 1) - 1
  return jnp.arange(-top, top + 1, dtype=jnp.float32) / top
