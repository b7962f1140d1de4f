"""Low-rank updates of the kernels."""

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, product


def lora(
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  at: str = r'layer_\d+/attention/(query|value)/matmul',
) -> Delta:
  """LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y + (alpha / rank) x A B.

  A [d_in, rank] starts uniform in +-1/sqrt(d_in), as in the authors' code and in HF PEFT (the
  paper says Gaussian); B [rank, d_out] starts at zero, so the model starts unchanged. Trains
  rank (d_in + d_out) numbers a kernel. Merges as W + (alpha / rank) A B.

  Args:
    rank: r, at least 1.
    alpha: numerator of the scale.
    dropout: rate on x before A, while training.
    at: which kernels; the default is query and value of every layer.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  scale = alpha / rank

  def init(key, site):
    if site.w is None:
      raise ValueError(f'at={at!r}, a site without a kernel')
    d_in, d_out = site.w.shape
    bound = d_in**-0.5
    return {
      'a': jax.random.uniform(key, (d_in, rank), jnp.float32, -bound, bound),
      'b': jnp.zeros((rank, d_out), jnp.float32),
    }

  def apply(p, site):
    low = product(site.dropout(site.x, dropout), p['a']).astype(site.x.dtype)
    return site.y + product(low, p['b']) * scale

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] + scale * (p['a'] @ p['b'])}

  return Delta(init, apply, at, merge)
