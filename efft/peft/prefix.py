"""Learnt keys and values before those of the tokens, in every attention."""

import jax
import jax.numpy as jnp

from efft.peft.base import Delta
from efft.peft.prompt import prepend, remove
from efft.peft.updates import uniform

FAMILY = 'prompts'  # in `efft methods`


def prefix(
  length: int = 20,
  hidden: int = 0,
  shift: bool = False,
  layers: str = r'layer_\d+',
) -> tuple[Delta, ...]:
  """Prefix tuning (Li and Liang 2021, https://arxiv.org/abs/2101.00190): [P_k; k] and [P_v; v].

  With hidden=0 the prefixes themselves train, which is also P-tuning v2 (Liu et al. 2022,
  https://arxiv.org/abs/2110.07602): 2 length d numbers a layer, from a standard normal, as in HF
  PEFT. With hidden=m they come from tanh(E W + b) W_i + b_i, E [length, d] and W [d, m] being
  shared by the layers and W_i [m, 2 d] a layer's own: E starts standard normal, the linear layers
  uniform in +-1/sqrt(fan in), as in torch, and length d + d m + m + L (2 m d + 2 d) numbers train;
  once the delta is expanded, the prefixes are left. Queries are the tokens' alone, and nothing is
  pooled that was not before. Not the identity at the start.

  Args:
    length: prefix positions, at least 1.
    hidden: width of the reparametrising layer; 0 for none.
    shift: whether the text's positions start at `length`, as in HF PEFT with BERT, which takes a
      prefix for a past; then `model.max_length` and `length` together must not exceed the position
      table. AdapterHub and the paper's code for BERT-like models do not shift.
    layers: regex of the layers to act in.
  """
  if length < 1:
    raise ValueError(f'length {length} is below 1')
  if hidden < 0:
    raise ValueError(f'hidden {hidden} is below 0')
  names = ('k', 'v')

  def init(key, site):
    heads, head_dim = site.y[0].shape[2:]
    width, keys = heads * head_dim, jax.random.split(key, 4)
    if not hidden:
      return {
        name: jax.random.normal(k, (length, width)) for name, k in zip(names, keys, strict=False)
      }
    p = {}
    for i, name in enumerate(names):
      p[f'{name}_up'] = uniform(keys[2 * i], (hidden, width), hidden)
      p[f'{name}_up_bias'] = uniform(keys[2 * i + 1], (width,), hidden)
    return p

  def shared(key, sites):
    d = next(iter(sites.values())).x.shape[-1]
    keys = jax.random.split(key, 3)
    return {
      'inputs': jax.random.normal(keys[0], (length, d)),
      'down': uniform(keys[1], (d, hidden), d),
      'down_bias': uniform(keys[2], (hidden,), d),
    }

  def expand(p, path, key):
    h = jnp.tanh(p['inputs'] @ p['down'] + p['down_bias'])
    return {name: h @ p[f'{name}_up'] + p[f'{name}_up_bias'] for name in names}

  def apply(p, site):
    k, v, mask = site.y

    def ahead(rows, y):
      rows = rows.reshape(1, length, *y.shape[2:]).astype(y.dtype)
      return jnp.concatenate([jnp.broadcast_to(rows, (len(y), *rows.shape[1:])), y], 1)

    seen = jnp.concatenate([jnp.ones((len(mask), length), mask.dtype), mask], 1)
    return ahead(p['k'], k), ahead(p['v'], v), seen

  at = f'({layers})/attention/kv'
  more = {'shared': shared, 'expand': expand} if hidden else {}
  parts = (Delta(init, apply, at, **more),)
  return (*parts, *_shifted(length)) if shift else parts


def _shifted(length: int) -> tuple[Delta, Delta]:
  """Tokens that are there while positions are given out, and gone before the first layer."""
  # Expands to itself alone, without what the layers share.
  own = dict(expand=lambda p, path, key: {'length': p['length']})
  behind = remove(length, 'embed')._replace(**own)

  def apply(p, site):
    return prepend(jnp.zeros((length, site.y[0].shape[-1])), site.y)

  return Delta(behind.init, apply, 'embed/words', **own), behind
