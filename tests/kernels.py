"""Made-up kernels, and what deltas at 'matmul' sites make of them; for tests of definitions."""

import jax
import jax.numpy as jnp
import numpy as np

from efft.peft import base
from efft.peft.base import Site

KEY = jax.random.key(0)
PATH = 'layer_0/attention/query/matmul'


def site(d_in=32, d_out=48, rows=(2, 5), seed=0, path=PATH, mask=None):
  rng = np.random.default_rng(seed)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((*rows, d_in), (d_in, d_out)))
  return Site(path, x @ w, x=x, w=w, mask=mask, contract=base.product)


def shifted(p, seed=1):
  """Parameters that have been somewhere; integers stay."""
  rng = np.random.default_rng(seed)
  return {
    leaf: x if jnp.issubdtype(x.dtype, jnp.integer) else x + rng.normal(0, 0.3, x.shape)
    for leaf, x in p.items()
  }


def matrix(delta, p, here):
  """What the delta adds to the kernel, read off from unit vectors."""
  x = jnp.eye(here.w.shape[0])[None]
  return np.asarray(delta.apply(p, here._replace(x=x, y=x @ here.w))[0] - here.w)


def moved(delta, d_in, d_out, spread=0.3):
  """(parameters of a delta that has been somewhere, a kernel), what is shared included."""
  here = site(d_in, d_out)
  p = delta.init(KEY, here)
  if delta.shared is not None:
    p |= delta.shared(jax.random.key(1), {PATH: here})
  rng = np.random.default_rng(1)
  p = {
    name: x + rng.normal(0, spread, x.shape).astype('f') if x.dtype == jnp.float32 else x
    for name, x in p.items()
  }
  return p, here.w


def merged(delta, p, kernel):
  return np.asarray(delta.merge(p, {'kernel': kernel})['kernel'])
