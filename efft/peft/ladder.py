"""A small network beside the frozen encoder, which no gradient enters."""

import jax
import jax.numpy as jnp

from efft.models import dots
from efft.models.layers import normalised
from efft.peft.adapter import activation_function, normal
from efft.peft.base import Delta, product

FAMILY = 'side network'  # in `efft methods`

lecun = jax.nn.initializers.lecun_normal()


def ladder(
  reduction: int = 8,
  heads: int = 4,
  activation: str = 'gelu',
  temperature: float = 0.1,
  at: str = 'output',
) -> Delta:
  """Ladder side tuning (Sung et al. 2022, https://arxiv.org/abs/2206.06522).

  A transformer of width w = d / reduction with as many layers as the encoder reads the encoder's
  features f_0..f_L through linear layers: s_0 = f_0 W_0, and layer i works on
  mu_i f_i W_i + (1 - mu_i) s_{i-1} with mu_i = sigmoid(alpha_i / temperature), alpha zero at
  first. Its last state, brought back to d channels, takes the place of the encoder's output. The
  features are constants to the gradient, so nothing is stored of the encoder for it and nothing
  flows back.

  Down- and up-sampling start LeCun-normal, the layers' kernels normal with standard deviation
  0.02, biases at zero. The paper starts the side layers from pruned backbone weights and drops
  some of them, which is not done here: training starts from a new representation. Side layers are
  post-norm, with an FFN of 4 w. Trains (L + 1) (d w + w) + L (12 w^2 + 10 w + 1) + w d + d
  numbers: per layer 12 w^2 of kernels, 2 w + 4 w of biases, 4 w of two norms, and the gate.

  Args:
    reduction: r of the paper.
    heads: of the side layers' attention; must divide w.
    activation: of their FFN.
    temperature: of the gates.
    at: the root of the model.
  """
  act = activation_function(activation)
  if reduction < 1 or heads < 1 or temperature <= 0:
    raise ValueError(f'reduction {reduction}, heads {heads}, temperature {temperature}')

  def init(key, site):
    d, layers = site.y[0].shape[-1], len(site.features) - 1
    w = d // reduction
    if not w or w % heads:
      raise ValueError(f'{heads} heads do not divide a side width of {w}')
    keys = iter(jax.random.split(key, 6))

    def stack(make, count, *shape):
      return jax.vmap(lambda key: make(key, shape, jnp.float32))(
        jax.random.split(next(keys), count)
      )

    return {
      'sample': stack(lecun, layers + 1, d, w),
      'sample_bias': jnp.zeros((layers + 1, w)),
      'gate': jnp.zeros(layers),
      'qkv': stack(normal, layers, w, 3 * w),
      'out': stack(normal, layers, w, w),
      'out_bias': jnp.zeros((layers, w)),
      'out_norm': jnp.ones((layers, w)),
      'out_norm_bias': jnp.zeros((layers, w)),
      'up': stack(normal, layers, w, 4 * w),
      'up_bias': jnp.zeros((layers, 4 * w)),
      'down': stack(normal, layers, 4 * w, w),
      'down_bias': jnp.zeros((layers, w)),
      'down_norm': jnp.ones((layers, w)),
      'down_norm_bias': jnp.zeros((layers, w)),
      'restore': lecun(next(keys), (w, d), jnp.float32),
      'restore_bias': jnp.zeros(d),
    }

  def apply(p, site):
    x, mask = site.y
    seen = jnp.where(mask, 0.0, jnp.finfo(jnp.float32).min)
    steps = [
      (product(jax.lax.stop_gradient(f), p['sample'][i]) + p['sample_bias'][i]).astype(x.dtype)
      for i, f in enumerate(site.features)
    ]
    stacked = {n: v for n, v in p.items() if not n.startswith(('sample', 'restore'))}

    def layer(s, step):
      p, f = step
      mu = jax.nn.sigmoid(p['gate'] / temperature).astype(f.dtype)
      s = mu * f + (1 - mu) * s
      b, t, w = s.shape
      qkv = product(s, p['qkv']).astype(s.dtype).reshape(b, t, 3, heads, w // heads)
      y = dots.attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], seen, None, 0.0)
      y = product(y.reshape(b, t, w), p['out']) + p['out_bias']
      s = _norm(s + y, p['out_norm'], p['out_norm_bias']).astype(s.dtype)
      h = act(product(s, p['up']) + p['up_bias']).astype(s.dtype)
      y = product(h, p['down']) + p['down_bias']
      return _norm(s + y, p['down_norm'], p['down_norm_bias']).astype(s.dtype), None

    side, _ = jax.lax.scan(layer, steps[0], (stacked, jnp.stack(steps[1:])))
    return (product(side, p['restore']) + p['restore_bias']).astype(x.dtype), mask

  return Delta(init, apply, at)


def _norm(x, scale, bias):
  return normalised(x, 1e-6) * scale + bias
