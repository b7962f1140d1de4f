"""Deltas around deltas: gated, dropped by depth, mixed, made by masking a shared prototype.

Each takes a Delta that adds to site.y and gives one back.
"""

import re
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from efft.peft import adapter, lora, prefix
from efft.peft.base import Delta, Site, at_path
from efft.peft.updates import QUERY_VALUE

FAMILY = 'hybrids'  # in `efft methods`


def gated(delta: Delta, read: Callable[[Site], jax.Array] = lambda site: site.x) -> Delta:
  """Multiplies what a delta adds by g(h) in (0, 1), one number an example.

  g = mean over real tokens of sigmoid(h W + b), with h = read(site), W [d, 1] normal with
  standard deviation 0.02 and b zero at first: half of the delta acts. At 'attention/kv' it scales
  the keys and values that the delta puts in front. Trains d + 1 numbers more a site.
  """

  def init(key, site):
    own, key = jax.random.split(key)
    d = read(site).shape[-1]
    gate = {'gate': adapter.normal(own, (d, 1), jnp.float32), 'gate_bias': jnp.zeros(1)}
    return {**delta.init(key, site), **gate}

  def apply(p, site):
    g = gate(p, read(site), site.mask)
    after = delta.apply(p, site)
    if isinstance(site.y, tuple):
      k, v, mask = after
      added = jnp.arange(k.shape[1]) < k.shape[1] - site.y[0].shape[1]
      factor = jnp.where(added[:, None, None], g[:, None, None, None], 1.0)
      return k * factor.astype(k.dtype), v * factor.astype(v.dtype), mask
    more = (after - site.y).astype(jnp.float32) * g[:, None, None]
    return site.y + more.astype(site.y.dtype)

  def expand(p, path, key):
    own = {name: x for name, x in p.items() if not name.startswith('gate')}
    kept = {name: x for name, x in p.items() if name.startswith('gate')}
    return {**delta.expand(own, path, key), **kept}

  grow = expand if delta.expand else None
  return delta._replace(init=init, apply=apply, merge=None, expand=grow)


def gate(p, h, mask):
  """float32 [B]: the mean over real tokens of sigmoid(h W + b)."""
  h = h.astype(jnp.float32)
  open_ = jax.nn.sigmoid(jnp.sum(h * p['gate'][:, 0], -1) + p['gate_bias'])
  weight = mask.astype(jnp.float32)
  return jnp.sum(open_ * weight, 1) / jnp.maximum(jnp.sum(weight, 1), 1.0)


def dropped(delta: Delta) -> Delta:
  """While training, leaves the delta out of the first n layers, with n drawn anew every step.

  n is uniform in 0..last, the same at all sites; `last`, the highest layer that the delta acts in,
  is a frozen integer that all sites share.
  """

  def shared(key, sites):
    own = delta.shared(key, sites) if delta.shared else {}
    return {**own, 'last': jnp.asarray(max(_layer(path) for path in sites), jnp.int32)}

  def expand(p, path, key):
    own = _expanded(delta, {name: x for name, x in p.items() if name != 'last'}, path, key)
    if key is None:
      return own
    n = jax.random.randint(key, (), 0, p['last'] + 1)
    return {**own, 'acts': _layer(path) >= n}

  def apply(p, site):
    own = {name: x for name, x in p.items() if name != 'acts'}
    y = delta.apply(own, site)
    return jnp.where(p['acts'], y, site.y) if 'acts' in p else y

  return delta._replace(apply=apply, shared=shared, expand=expand)


def mixture(delta: Delta, experts: int) -> Delta:
  """`experts` deltas at each site: one drawn by each site and step, their mean when evaluating.

  Parameters are stacked along a new first axis, and each expert starts as the delta does, which
  must not have shared parameters.
  """
  if experts < 1:
    raise ValueError(f'experts {experts} is below 1')

  def init(key, site):
    stacked = jax.vmap(lambda key: delta.init(key, site))(jax.random.split(key, experts))
    return {f'experts_{name}': x for name, x in stacked.items()}

  def expand(p, path, key):
    if key is None:
      weights = jnp.full(experts, 1 / experts)
    else:
      drawn = jax.random.randint(at_path(key, path), (), 0, experts)
      weights = jax.nn.one_hot(drawn, experts)

    def take(x):
      return jnp.tensordot(weights, x, 1, precision='highest')

    own = {name.removeprefix('experts_'): take(x) for name, x in p.items()}
    return _expanded(delta, own, path, key)

  return delta._replace(init=init, expand=expand, scale=None)


def masked(delta: Delta, leaves: Sequence[str], keep: float) -> Delta:
  """One delta for all layers, of which each layer applies the part that its own mask keeps.

  The prototype starts as the delta does, one for each kind of place ('mlp_out') and width. A
  layer trains scores S for each of `leaves`, uniform in +-1/sqrt(d_in) at first, and applies
  leaf * mask with mask = 1 where |S| is among the `keep` largest shares of the leaf. The gradient
  passes straight through the mask to |S|. Other leaves are common to all layers, and unmasked.
  The delta must not have shared parameters of its own.
  """
  if not 0 < keep <= 1:
    raise ValueError(f'keep {keep} is not in (0, 1]')

  def kind(path, width):
    return re.sub(r'layer_\d+/', '', path).replace('/', '_') + f'_{width}_'

  def init(key, site):
    made = jax.eval_shape(lambda key: delta.init(key, site), key)
    keys = jax.random.split(key, len(leaves))
    return {
      f'{leaf}_scores': adapter.kaiming(k, made[leaf].shape, jnp.float32)
      for leaf, k in zip(leaves, keys, strict=True)
    }

  def shared(key, sites):
    out = {}
    for path, site in sites.items():
      shapes = jax.eval_shape(lambda key, site=site: delta.init(key, site), key)
      name = kind(path, shapes[leaves[-1]].shape[-1])
      if not any(known.startswith(name) for known in out):
        made = delta.init(jax.random.fold_in(key, zlib.crc32(name.encode())), site)
        out |= {name + leaf: x for leaf, x in made.items()}
    return out

  def expand(p, path, key):
    scores = {leaf: p[f'{leaf}_scores'] for leaf in leaves}
    start = kind(path, scores[leaves[-1]].shape[-1])
    own = {n.removeprefix(start): x for n, x in p.items() if n.startswith(start)}
    own |= {leaf: own[leaf] * largest(scores[leaf], keep) for leaf in leaves}
    return _expanded(delta, own, path, key)

  def pack(p):
    return {
      name: largest(x, keep) > 0.5 if name.endswith('_scores') else x for name, x in p.items()
    }

  return delta._replace(init=init, shared=shared, expand=expand, pack=pack, scale=None)


def largest(scores, keep: float):
  """1 where |scores| is among the largest, 0 elsewhere; its gradient is that of |scores|."""
  size = jnp.abs(scores)
  count = max(1, round(keep * scores.size))
  least = jax.lax.stop_gradient(jnp.sort(size.reshape(-1))[scores.size - count])
  # In this order the value is 0 or 1 to the bit.
  return (size >= least) + (size - jax.lax.stop_gradient(size))


def adapterdrop(
  reduction: int = 16, activation: str = 'relu', at: str = r'layer_\d+/mlp_out'
) -> Delta:
  """AdapterDrop (Rueckle et al. 2021, https://arxiv.org/abs/2010.11918), the robust form.

  Pfeiffer's adapters, left out of the first n layers while training, n drawn uniformly every step
  from 0 to the index of the last layer, so that any number of them may be left out afterwards; all
  act when evaluating. Init and count are those of `adapter.pfeiffer`. The dropped layers' adapters
  are computed and not used: what is saved is at inference, by whoever takes their parameters out of
  the bundle, which no command does. With a fixed n, see configs/adapterdrop.py.
  """
  return dropped(adapter.pfeiffer(reduction, activation, at))


def adamix(
  experts: int = 4,
  size: int = 16,
  activation: str = 'gelu',
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """AdaMix (Wang et al. 2022, https://arxiv.org/abs/2205.12410), of adapters.

  M adapters F + adapter(norm(x + F)) a site, of which each step and site draws one; when
  evaluating, the adapter whose weights are their mean acts. Kernels start normal with standard
  deviation 0.02. The paper makes two passes over a batch agree, which is config.train.consistency,
  and draws the down- and up-projection apart or shares one of them: here both are of one expert.
  Trains M (2 d m + m + d) numbers a layer, and weight decay acts on the stacked biases too.
  """
  plain = adapter.bottleneck(
    adapter.after_norm, at, size, activation, adapter.normal, adapter.normal
  )
  return mixture(plain, experts)


def adamix_lora(
  experts: int = 4,
  rank: int = 4,
  alpha: float = 8.0,
  at: str = QUERY_VALUE,
) -> Delta:
  """AdaMix (Wang et al. 2022, https://arxiv.org/abs/2205.12410), of LoRAs.

  M updates a kernel as in `lora.lora`, one drawn each step and site; when evaluating and merging,
  A and B are the means of theirs. Starts unchanged. Trains M rank (d_in + d_out) numbers a kernel.
  """
  return mixture(lora.lora(rank, alpha, at=at), experts)


def propetl_adapter(
  reduction: int = 12,
  keep: float = 0.5,
  activation: str = 'relu',
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """ProPETL (Zeng et al. 2023, https://arxiv.org/abs/2305.17682), of adapters.

  One Pfeiffer adapter for all layers, each with its own binary masks of both kernels: see
  `masked`. The biases are shared and not masked. Trains 2 d m + m + d numbers in all and 2 d m
  scores a layer; of the scores a bit each is what deployment needs.
  """
  return masked(adapter.pfeiffer(reduction, activation, at), ('down', 'up'), keep)


def propetl_lora(
  rank: int = 32,
  alpha: float = 48.0,
  keep: float = 0.1,
  at: str = QUERY_VALUE,
) -> Delta:
  """ProPETL (Zeng et al. 2023, https://arxiv.org/abs/2305.17682), of LoRA.

  One update A B for all queries and one for all values, each layer with its own masks of A and B:
  see `masked`. Starts unchanged. Trains rank (d_in + d_out) numbers for each kind of kernel, and
  as many scores a kernel. Merges.
  """
  return masked(lora.lora(rank, alpha, at=at), ('a', 'b'), keep)


def propetl_prefix(length: int = 64, keep: float = 0.5) -> Delta:
  """ProPETL (Zeng et al. 2023, https://arxiv.org/abs/2305.17682), of prefixes.

  The keys and values of one prefix for all layers, each with its own masks of both: see `masked`.
  The authors train the prefixes through a network, whose kernels they mask: here the prefixes
  themselves train, as in `prefix.prefix` with hidden=0. The authors keep 0.1 and train the scores
  at 1e-4; here half is kept, and configs/propetl_prefix.py has 3e-3. Trains 2 length d numbers, and
  as many scores a layer. Not the identity at the start.
  """
  (whole,) = prefix.prefix(length)
  return masked(whole, ('k', 'v'), keep)


def _expanded(delta: Delta, p, path: str, key):
  return delta.expand(p, path, key) if delta.expand else p


def _layer(path: str) -> int:
  found = re.search(r'layer_(\d+)', path)
  return int(found[1]) if found else 0
