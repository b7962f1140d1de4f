"""Updates put together from pieces that are shared, random or of fixed length."""

import math

import jax
import jax.numpy as jnp

from efft.peft.base import Delta
from efft.peft.updates import QUERY_VALUE, dense, factored, kernel_shape, uniform

FAMILY = 'shared pieces'  # in `efft methods`


def miss(
  rank: int = 64,
  mini_r: int = 0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """MiSS (Kang & Yin 2024, https://arxiv.org/abs/2409.15371): y + (sum of x's shards) D.

  x is cut into shards of `rank` inputs, the last one filled up with zeros, and all of them are
  multiplied with the same D [rank, d_out]: LoRA whose A is a stack of identities. D starts at
  zero, so the model starts unchanged. Trains rank d_out numbers a kernel. Merges by adding D to
  every shard of the kernel's rows. HF PEFT's variant 'bat' is left out.

  Args:
    rank: r, at most d_in.
    mini_r: the width of a D [rank, mini_r] that is repeated over the outputs; 0: all of D trains.
    dropout: rate on x, while training.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1 or mini_r < 0:
    raise ValueError(f'rank {rank}, mini_r {mini_r}: at least 1 and 0')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    if rank > d_in or d_out % (mini_r or 1):
      raise ValueError(f'rank {rank}, mini_r {mini_r} do not fit a kernel [{d_in}, {d_out}]')
    return {'block': jnp.zeros((rank, mini_r or d_out), jnp.float32)}

  def factors(p, shape):
    d_in, d_out = shape
    shards = jnp.tile(jnp.eye(rank), (-(-d_in // rank), 1))[:d_in]
    return shards, jnp.tile(p['block'], (1, d_out // p['block'].shape[1]))

  return factored(init, factors, at, dropout)


def vblora(
  rank: int = 4,
  num_vectors: int = 256,
  vector_length: int = 256,
  topk: int = 2,
  init_vector_bank_bound: float = 0.02,
  init_logits_std: float = 0.1,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """VB-LoRA (Li et al. 2024, https://arxiv.org/abs/2405.15179): y + x A B, pieces from one bank.

  Every column of A and row of B is cut into pieces of `vector_length`; each is a mixture of the
  `topk` vectors of a bank [num_vectors, vector_length] with the largest logits, weighted by the
  softmax over those. The bank is shared by all kernels. It starts uniform in
  +-init_vector_bank_bound and the logits normal, as in the paper, so the model does not quite start
  unchanged. Trains the bank and rank (d_in + d_out) num_vectors / vector_length logits a kernel;
  what has to be kept afterwards is topk numbers and indices in place of num_vectors logits.

  Args:
    rank: r, at least 1.
    num_vectors: h, of the bank.
    vector_length: b, which divides d_in and d_out.
    topk: k, at most num_vectors.
    init_vector_bank_bound: of the bank's first values.
    init_logits_std: of the logits' first values.
    dropout: rate on x, while training.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1 or not 1 <= topk <= num_vectors:
    raise ValueError(f'rank {rank}, topk {topk} of {num_vectors}: at least 1, and no more than all')

  def init(key, site):
    if any(width % vector_length for width in kernel_shape(site)):
      raise ValueError(f'vector_length {vector_length} does not divide {list(site.w.shape)}')
    d_in, d_out = (width // vector_length for width in site.w.shape)
    a, b = jax.random.split(key)
    return {
      'a': init_logits_std * jax.random.normal(a, (rank, d_in, num_vectors), jnp.float32),
      'b': init_logits_std * jax.random.normal(b, (rank, d_out, num_vectors), jnp.float32),
    }

  def shared(key, sites):
    shape, bound = (num_vectors, vector_length), init_vector_bank_bound
    return {'bank': jax.random.uniform(key, shape, jnp.float32, -bound, bound)}

  def mix(logits, bank):
    """[rank, pieces, num_vectors] -> [rank, pieces * vector_length]."""
    best, index = jax.lax.top_k(logits, topk)
    pieces = jnp.einsum('rpk,rpkl->rpl', jax.nn.softmax(best), bank[index])
    return pieces.reshape(rank, -1)

  def factors(p, shape):
    return mix(p['a'], p['bank']).T, mix(p['b'], p['bank'])

  return factored(init, factors, at, dropout, shared=shared)


def randlora(
  rank: int = 32,
  alpha: float = 640.0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """RandLoRA (Albert et al. 2025, https://arxiv.org/abs/2502.00987): of full rank, random bases.

  y + (alpha / rank) x sum_j B_j diag(lambda_j) A diag(gamma_j) for kernels that read more than
  they write, and its transpose for the others, with n = min(d_in, d_out) / rank (rounded up)
  terms. A [rank, min] and B_j [max, rank] are random, frozen, of unit variance and shared by all
  kernels, which take the slices that fit. lambda starts at 0, so the model starts unchanged, and
  gamma at 1 / max(n, min). Trains n (rank + min) numbers a kernel.

  As in HF PEFT, column k of all B_j, n-th after n-th, meets row k of all A, rank after rank: the
  pairs differ from the equation by an order of random columns, which changes nothing. The bases
  are uniform, as there; its sparse ones are left out.

  Args:
    rank: r, at least 1.
    alpha: numerator of the scale.
    dropout: rate on x, while training.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')

  def terms(shape):
    return -(-min(shape) // rank)

  def init(key, site):
    shape = kernel_shape(site)
    n, least = terms(shape), min(shape)
    return {
      'lambda': jnp.zeros((rank, n), jnp.float32),
      'gamma': jnp.full((n, least), 1 / max(n, least), jnp.float32),
    }

  def shared(key, sites):
    largest = tuple(max(site.w.shape[i] for site in sites.values()) for i in (0, 1))
    a, b = jax.random.split(key)
    bound = math.sqrt(3)
    return {
      'a': jax.random.uniform(a, (rank, min(largest)), jnp.float32, -bound, bound),
      'b': jax.random.uniform(b, (max(largest), terms(largest), rank), jnp.float32, -bound, bound),
    }

  def factors(p, shape):
    d_in, d_out = shape
    least, most = min(shape), max(shape)
    a = p['lambda'][:, :, None] * p['a'][:, None, :least] * p['gamma']
    a = alpha / rank * a.reshape(-1, least)
    b = p['b'][:most, : terms(shape)].reshape(most, -1)
    return (a.T, b.T) if d_in == least else (b, a)

  return factored(init, factors, at, dropout, shared=shared)


def delora(
  rank: int = 8,
  delora_lambda: float = 15.0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """DeLoRA (Bini et al. 2025, https://arxiv.org/abs/2503.18225): directions of fixed strength.

  y + (x * w) A diag(lambda / (rank |a_i| |b_i|)) B: each pair of a column a_i of A and a row b_i
  of B contributes a matrix of norm lambda / rank, however long they are, times w, the norms of the
  kernel's rows before training (frozen). A starts uniform in +-1/sqrt(d_in) and B at zero, as in
  HF PEFT, so the model starts unchanged; the norms are kept above 1e-4, so the first steps of B
  count for much. (The paper starts B at random and takes the start off the kernel.) lambda trains
  too: rank (d_in + d_out) + 1 numbers a kernel.

  Args:
    rank: r, at least 1.
    delora_lambda: the first strength.
    dropout: rate on x, while training.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    return {
      'a': uniform(key, (d_in, rank), d_in),
      'b': jnp.zeros((rank, d_out), jnp.float32),
      'lambda': jnp.full((1,), delora_lambda, jnp.float32),
      'w_norm': jnp.linalg.norm(site.w.astype(jnp.float32), axis=1),
    }

  def length(v, axis):
    # Not max(norm, 1e-4): the norm of zero has no gradient.
    return jnp.sqrt(jnp.maximum(jnp.sum(v * v, axis), 1e-8))

  def factors(p, shape):
    strength = p['lambda'] / rank / (length(p['a'], 0) * length(p['b'], 1))
    return p['w_norm'][:, None] * p['a'], strength[:, None] * p['b']

  return factored(init, factors, at, dropout)


def shira(rank: int = 8, at: str = QUERY_VALUE) -> Delta:
  """SHiRA (Bhardwaj et al. 2024, https://arxiv.org/abs/2406.13175): a sparse update, full rank.

  Of each kernel rank (d_in + d_out) entries at random places (SHiRA-Rand) train: as many numbers as
  LoRA's of that rank. Their changes start at zero, so the model starts unchanged. Merges by adding
  them. The places are integers beside the values. The paper's masks by magnitude and by gradient
  are left out.

  Args:
    rank: r of the LoRA of equal size, at least 1.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    count, size = rank * (d_in + d_out), d_in * d_out
    if count > size:
      raise ValueError(f'rank {rank} asks for {count} entries of a kernel [{d_in}, {d_out}]')
    places = jax.random.choice(key, size, (count,), replace=False)
    return {
      'values': jnp.zeros(count, jnp.float32),
      'rows': (places // d_out).astype(jnp.int32),
      'columns': (places % d_out).astype(jnp.int32),
    }

  def update(p, shape):
    return jnp.zeros(shape, jnp.float32).at[p['rows'], p['columns']].set(p['values'])

  return dense(init, update, at)
