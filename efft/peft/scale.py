"""Element-wise rescaling of activations."""

import jax.numpy as jnp

from efft.peft.base import Delta

FAMILY = 'scaling'  # in `efft methods`


def ia3(layers: str = r'layer_\d+', attention_out: bool = False) -> tuple[Delta, ...]:
  """(IA)3 (Liu et al. 2022, https://arxiv.org/abs/2205.05638): learnt scales of activations.

  Keys become l_k * k, values l_v * v, and the FFN's activations l_ff * act(x W_up), *after* the
  activation (the paper's equation 8; AdapterHub scales before it). All scales start at one.
  Trains 2 d + d_ff numbers a layer. Merges into the columns and biases of key and value and into
  the rows of down.

  Args:
    layers: regex of the layers to act in.
    attention_out: whether the heads' outputs are scaled too, before attention's own output layer:
      d more numbers a layer. Not in the paper, but what HF PEFT does to BERT by default, whose
      pattern 'output.dense' matches both blocks.
  """

  def init_kv(key, site):
    heads, width = site.y[0].shape[2:]
    return {name: jnp.ones(heads * width, jnp.float32) for name in ('k', 'v')}

  def apply_kv(p, site):
    k, v, mask = site.y
    return _scale_heads(k, p['k']), _scale_heads(v, p['v']), mask

  def merge_kv(p, module):
    scaled = {
      name: {leaf: x * p[name[0]] for leaf, x in module[name].items()} for name in ('key', 'value')
    }
    return {**module, **scaled}

  def init_ff(key, site):
    return {'ff': jnp.ones(site.y.shape[-1:], jnp.float32)}

  def apply_ff(p, site):
    return _scaled(site.y, p['ff'])

  def merge_ff(p, module):
    down = {**module['down'], 'kernel': p['ff'][:, None] * module['down']['kernel']}
    return {**module, 'down': down}

  def init_heads(key, site):
    heads, width = site.y.shape[2:]
    return {'out': jnp.ones(heads * width, jnp.float32)}

  def apply_heads(p, site):
    return _scale_heads(site.y, p['out'])

  def merge_heads(p, module):
    out = {**module['out'], 'kernel': p['out'][:, None] * module['out']['kernel']}
    return {**module, 'out': out}

  heads = Delta(init_heads, apply_heads, f'({layers})/attention/heads', merge_heads)
  return (
    Delta(init_kv, apply_kv, f'({layers})/attention/kv', merge_kv),
    Delta(init_ff, apply_ff, f'({layers})/mlp/act', merge_ff),
    *((heads,) if attention_out else ()),
  )


def _scale_heads(y, scale):
  return _scaled(y, scale.reshape(y.shape[2:]))


def _scaled(y, scale):
  # The product is rounded, the scale is not: bfloat16 has steps of 2^-7 above 1.
  return (y * scale).astype(y.dtype)
