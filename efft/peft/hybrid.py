"""Several methods as one: fused adapters, and deltas of different kinds put together."""

import jax
import jax.numpy as jnp

from efft.peft import adapter, wrap
from efft.peft.base import Delta, product
from efft.peft.lora import lora
from efft.peft.prefix import prefix

FAMILY = 'hybrids'  # in `efft methods`


def fusion(
  n: int = 2,
  reduction: int = 16,
  activation: str = 'relu',
  regularization: float = 0.01,
  at: str = r'layer_\d+/mlp_out',
) -> Delta:
  """AdapterFusion (Pfeiffer et al. 2020, https://arxiv.org/abs/2005.00247): adapters attended to.

  With h = norm(x + F) and z_i the output of the i-th Pfeiffer adapter for h, i < n:
  y = F + sum_i a_i z_i W_v, a = softmax_i((h W_q + b_q) . (z_i W_k + b_k)). As in AdapterHub, Q and
  K start normal with standard deviation 0.02 and zero biases, V as the identity (with noise of
  1e-6, where AdapterHub's is 1e-6 off the diagonal), and `regularization` times the squared
  distance of V from the identity is added to the loss. b_k, which AdapterHub has too, cancels in
  the softmax and never moves. AdapterHub's dropout of the scores is left out.

  The adapters are stacked along the first axis of `down`, `down_bias`, `up` and `up_bias`. Each
  starts as its own: the paper's come from other tasks and stay frozen, which is to overwrite these
  leaves and a rule ('delta/.*/(down|up)(_bias)?', 'frozen'). Has n (2 d m + m + d) numbers of
  adapters and 3 d^2 + 2 d of fusion a layer.

  Args:
    n: adapters at each site.
    reduction, activation: as in `adapter.pfeiffer`.
    regularization: weight of the penalty on V.
    at: which blocks.
  """
  if n < 1:
    raise ValueError(f'n {n} is below 1')
  act = adapter.activation_function(activation)
  single = adapter.pfeiffer(reduction, activation, at)

  def init(key, site):
    d = site.y.shape[-1]
    keys = jax.random.split(key, n + 3)
    return {
      **jax.vmap(lambda key: single.init(key, site))(keys[3:]),
      'query': adapter.normal(keys[0], (d, d), jnp.float32),
      'query_bias': jnp.zeros(d, jnp.float32),
      'key': adapter.normal(keys[1], (d, d), jnp.float32),
      'key_bias': jnp.zeros(d, jnp.float32),
      'value': jnp.eye(d) + 1e-6 * jax.random.normal(keys[2], (d, d), jnp.float32),
    }

  def apply(p, site):
    h = adapter.after_norm(site)
    each = [{name: p[name][i] for name in ('down', 'down_bias', 'up', 'up_bias')} for i in range(n)]
    z = jnp.stack([adapter.branch(own, h, act) for own in each], 2).astype(h.dtype)
    q = product(h, p['query']) + p['query_bias']
    k = product(z, p['key']) + p['key_bias']
    a = jax.nn.softmax(jnp.sum(q[:, :, None] * k, -1), -1)
    y = jnp.sum(a[..., None] * product(z, p['value']), 2)
    return site.y + y.astype(site.y.dtype)

  def penalty(p, path):
    return regularization * jnp.sum(jnp.square(p['value'] - jnp.eye(len(p['value']))))

  return Delta(init, apply, at, penalty=penalty if regularization else None)


def mam(
  length: int = 16,
  hidden: int = 512,
  size: int = 16,
  scale: float = 2.0,
  layers: str = r'layer_\d+',
) -> tuple[Delta, ...]:
  """MAM adapter (He et al. 2022, https://arxiv.org/abs/2110.04366): prefixes and parallel adapters.

  `prefix.prefix` in every attention and `adapter.parallel` beside every FFN. Defaults are the
  paper's for GLUE, but for the width of the prefixes' network (800 in the authors' code). Not the
  identity at the start, because of the prefixes. Trains length d + d hidden + hidden numbers in
  all, and 2 (hidden + 1) d + 2 d size + size + d a layer.

  Args:
    length, hidden: of the prefixes.
    size, scale: of the adapters.
    layers: regex of the layers to act in.
  """
  beside = adapter.parallel(size, scale, at=f'({layers})/mlp_out')
  return (*prefix(length, hidden, layers=layers), beside)


def unipelt(
  length: int = 10,
  hidden: int = 512,
  reduction: int = 16,
  rank: int = 8,
  alpha: float = 16.0,
  layers: str = r'layer_\d+',
) -> tuple[Delta, ...]:
  """UniPELT (Mao et al. 2022, https://arxiv.org/abs/2110.07577): prefix, adapter and LoRA, gated.

  `prefix.prefix`, `adapter.pfeiffer` and `lora.lora` of query and value, each with a gate of its
  own at each site: see `wrap.gated`. The gates read the attention's input, what the adapter reads,
  and the kernel's input. They average over real tokens; AdapterHub averages over padding too, and
  forgets LoRA's alpha / rank where there is a gate. Not the identity at the start, because of the
  prefixes. Trains what the three do and 4 (d + 1) numbers a layer.

  Args:
    length, hidden: of the prefixes.
    reduction: of the adapters.
    rank, alpha: of the LoRAs.
    layers: regex of the layers to act in.
  """
  low = lora(rank, alpha, at=f'({layers})/attention/(query|value)/matmul')
  behind = adapter.pfeiffer(reduction, at=f'({layers})/mlp_out')
  return (
    *(wrap.gated(part) for part in prefix(length, hidden, layers=layers)),
    wrap.gated(behind, adapter.after_norm),
    wrap.gated(low),
  )


def s4(
  layers: int = 12,
  length: int = 4,
  reduction: int = 32,
  rank: int = 4,
  alpha: float = 8.0,
) -> tuple[Delta, ...]:
  """S4 (Chen et al. 2023, https://arxiv.org/abs/2301.01821): each group of layers its own methods.

  Four groups of consecutive layers in a spindle, of about 1, 2, 2 and 1 sixths of the layers.
  In the paper's letters, A for Pfeiffer's adapter, L for LoRA of query and value, P for prefixes
  and B for biases, they have A L, A P, A P B and P B L: what its search ended with for T5-base.
  B adds to the biases of the linear layers (the paper trains the biases themselves, the
  LayerNorms' too). The paper gives every layer as many numbers; here the sizes of the methods are
  the same in every group. Not the identity at the start, because of the prefixes.

  Args:
    layers: of the encoder; those beyond stay as they are.
    length: of the prefixes.
    reduction: of the adapters.
    rank, alpha: of the LoRAs.
  """
  if layers < 1:
    raise ValueError(f'layers {layers} is below 1')
  ends = [round(layers * share / 6) for share in (0, 1, 3, 5, 6)]
  groups = [range(a, b) for a, b in zip(ends, ends[1:], strict=False)]

  def where(*letters):
    """Regex of the layers of the groups with these numbers; '' if there are none."""
    return '|'.join(f'layer_{i}' for number in letters for i in groups[number - 1])

  query_value = 'attention/(query|value)/matmul'
  linears = 'attention/(query|key|value|out)|mlp/(up|down)'
  parts = []
  if at := where(1, 2, 3):
    parts.append(adapter.pfeiffer(reduction, at=f'({at})/mlp_out'))
  if at := where(2, 3, 4):
    parts += prefix(length, layers=at)
  if at := where(3):
    parts.append(_bias(f'({at})/({linears})/matmul'))
  if at := where(1):
    parts.append(lora(rank, alpha, at=f'({at})/{query_value}'))
  if at := where(4):
    # The bias of a kernel that has a LoRA is that LoRA's: a site holds one entry of a method.
    parts.append(lora(rank, alpha, at=f'({at})/{query_value}', lora_bias=True))
    parts.append(_bias(f'({at})/(attention/(key|out)|mlp/(up|down))/matmul'))
  return tuple(parts)


def _bias(at: str) -> Delta:
  def init(key, site):
    return {'bias': jnp.zeros(site.y.shape[-1], jnp.float32)}

  def merge(p, module):
    return {**module, 'bias': module['bias'] + p['bias']}

  return Delta(init, lambda p, site: site.y + p['bias'], at, merge)
