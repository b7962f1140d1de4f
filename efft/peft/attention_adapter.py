"""Adapters of the attention block's output: a tiny attention, an element-wise map."""

import jax
import jax.numpy as jnp

from efft.models import dots
from efft.peft.adapter import normal
from efft.peft.base import Delta, product

FAMILY = 'adapters'  # in `efft methods`


def tiny_attention(
  heads: int = 4, head_dim: int = 1, at: str = r'layer_\d+/attention_out'
) -> Delta:
  """Tiny-attention adapter (Zhao et al. 2022, https://arxiv.org/abs/2211.01979).

  An attention of `heads` heads of very few channels over the real tokens of the attention block's
  output F(x): y = F + attend(F W_q, F W_k, F W_v) W_o + b, before the residual sum. W_q, W_k and
  W_v start normal with standard deviation 0.02, W_o and b at zero: the model starts unchanged.
  The paper also averages the heads' weights for deployment; here the heads stay. Trains
  4 d heads head_dim + d numbers a layer.
  """
  if heads < 1 or head_dim < 1:
    raise ValueError(f'heads {heads} and head_dim {head_dim} must be at least 1')
  width = heads * head_dim

  def init(key, site):
    d = site.y.shape[-1]
    names = ('query', 'key', 'value')
    keys = jax.random.split(key, 3)
    return {
      **{n: normal(k, (d, width), jnp.float32) for n, k in zip(names, keys, strict=True)},
      'out': jnp.zeros((width, d), jnp.float32),
      'out_bias': jnp.zeros(d, jnp.float32),
    }

  def apply(p, site):
    y = site.y

    def project(name):
      return product(y, p[name]).reshape(*y.shape[:2], heads, head_dim).astype(y.dtype)

    bias = jnp.where(site.mask, 0.0, jnp.finfo(jnp.float32).min)
    mixed = dots.attend(project('query'), project('key'), project('value'), bias, None, 0.0)
    out = product(mixed.reshape(*y.shape[:2], width), p['out']) + p['out_bias']
    return y + out.astype(y.dtype)

  return Delta(init, apply, at)


def hadamard(layers: str = r'layer_\d+') -> Delta:
  """Hadamard adapter (Chen et al. 2023, https://arxiv.org/abs/2407.11033).

  The attention block's output, before the residual sum and norm, becomes w * F(x) + b, element by
  element. w starts at one and b at zero: the model starts unchanged. The paper trains the
  following LayerNorm too (a rule in configs/hadamard.py), and the classifier alone first, which
  is not done here. Trains 2 d numbers a layer. Merges into the columns and bias of the attention's
  last linear layer.

  Args:
    layers: regex of the layers to act in.
  """

  def init(key, site):
    d = site.y.shape[-1]
    return {'weight': jnp.ones(d, jnp.float32), 'bias': jnp.zeros(d, jnp.float32)}

  def apply(p, site):
    # Rounded once: bfloat16 has steps of 2^-7 above a weight of 1.
    return (site.y * p['weight'] + p['bias']).astype(site.y.dtype)

  def merge(p, module):
    out = {name: x * p['weight'] for name, x in module['attention']['out'].items()}
    out['bias'] = out['bias'] + p['bias']
    return {**module, 'attention': {**module['attention'], 'out': out}}

  return Delta(init, apply, f'({layers})/attention_out', merge)
