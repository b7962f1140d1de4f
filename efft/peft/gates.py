"""Pruning while training: stochastic gates that a penalty or a target closes.

A gate z is hard concrete (Louizos et al. 2018, https://arxiv.org/abs/1712.01312): with u uniform,

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)
    z = clip(s (high - low) + low, 0, 1)         low, high, beta = -0.1, 1.1, 2/3

drawn anew at every step from the step's key, and open, z > 0, with the probability
sigmoid(log_alpha - beta log(-low / high)), whose sum is what a penalty can see.
"""

import math
import re

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, at_path
from efft.peft.movement import UNITS, largest, masked
from efft.peft.updates import LINEARS

FAMILY = 'pruning'  # in `efft methods`
HEADS = r'layer_\d+/attention/heads'
LOW, HIGH, BETA = -0.1, 1.1, 2 / 3
SHIFT = BETA * math.log(-LOW / HIGH)
SHARPNESS = 0.8  # of gates at rest, in the code of CoFi's authors


def opened(log_alpha):
  """The probability that a gate is open."""
  return jax.nn.sigmoid(log_alpha - SHIFT)


def drawn(log_alpha, key):
  """A gate's value z in [0, 1] in one step."""
  s = jax.nn.sigmoid((jax.random.logistic(key, log_alpha.shape) + log_alpha) / BETA)
  return jnp.clip(s * (HIGH - LOW) + LOW, 0.0, 1.0)


def resting(log_alpha):
  """A gate's value without draws: Louizos et al.'s, equation 13."""
  return jnp.clip(jax.nn.sigmoid(log_alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)


def l0(
  heads: float = 0.02,
  units: float = 2e-4,
  start: float = 2.5,
  at_heads: str = HEADS,
  at_units: str = UNITS,
) -> tuple[Delta, ...]:
  """L0 (Louizos et al. 2018, https://arxiv.org/abs/1712.01312) of heads and units.

  Each head's output and each unit's activation is multiplied by a gate, and the loss grows by
  `heads` x the expected number of open heads + `units` x that of open units. Evaluated, and merged
  into the rows of attention's out and of down, are the gates at rest, z = clip(sigmoid(log_alpha)
  (high - low) + low, 0, 1): exactly 0 below a log_alpha of -2.4, exactly 1 above 2.4. Trains H + F
  numbers a layer; weight decay does not reach them.

  Args:
    heads: what an open head costs.
    units: what an open unit costs; a head has 2 head_dim times the numbers of a unit.
    start: log_alpha at first. 2.5 starts unchanged, at rest; drawn, 1.6 % of the gates are closed.
    at_heads, at_units: which layers' heads and units have gates.
  """
  for name, cost in (('heads', heads), ('units', units)):
    if cost < 0:
      raise ValueError(f'{name} {cost} is below 0')

  def gate(per, apply, at, merge):
    def init(key, site):
      return {'log_alpha': jnp.full(_count(site), start, jnp.float32)}

    def penalty(p, path):
      return per * jnp.sum(opened(p['log_alpha']))

    return Delta(init, apply, at, merge, expand=_value, penalty=penalty)

  return (
    gate(heads, _apply_heads, at_heads, _merge_heads),
    gate(units, _apply, at_units, _merge_units),
  )


def l0_weights(
  penalty: float = 125.0, start: float = 2.5, rank: int = 0, alpha: float = 16.0, at: str = LINEARS
) -> Delta:
  """L0 (Louizos et al. 2018, https://arxiv.org/abs/1712.01312) of single weights: x (W * z).

  The rival that Sanh et al. 2020 (https://arxiv.org/abs/2005.07683) compare movement pruning with.
  The loss grows by `penalty` x the mean probability of being open over all weights. At rest the
  gates are those of `l0`. Trains d_in d_out numbers a kernel, and a bundle stores them all; rank,
  cost and the order beside other deltas are as in `movement.movement`.

  Deviation: gates start at 2.5, unchanged at rest; there at 2.197, 0.98 at rest.

  Args:
    penalty: lambda.
    start: log_alpha at first.
    rank, alpha: of a LoRA inside, W + (alpha / rank) A B in place of W.
    at: which kernels.
  """
  if penalty < 0:
    raise ValueError(f'penalty {penalty} is below 0')

  def init(site):
    return {'log_alpha': jnp.full(site.w.shape, start, jnp.float32)}

  def shared(key, sites):
    return {'numbers': jnp.asarray(sum(site.w.size for site in sites.values()), jnp.int32)}

  def cost(p, path):
    return penalty * jnp.sum(opened(p['log_alpha'])) / p['numbers']

  return masked(
    init, lambda p, path, key: _value(p, path, key)['mask'], at, rank, alpha,
    shared=shared, penalty=cost, pack=None,
  )  # fmt: skip


def cofi(
  start: float = 3.0,
  blocks: float = 10.0,
  layers: str = r'layer_\d+',
) -> tuple[Delta, ...]:
  """CoFi (Xia et al. 2022, https://arxiv.org/abs/2204.00408): coarse and fine gates, one sparsity.

  Gates of whole attention and feed-forward blocks (on what the residual is added to, bias
  included) times gates of their heads and units. With P the probability of being open, the
  expected sparsity, in numbers of the heads (their parts of four kernels and three biases) and
  units (two parts and a bias) of all layers, is

      s = 1 - sum_i (P_attention,i sum_h P_ih per_head + P_mlp,i sum_u P_iu per_unit) / total

  and the loss grows by lambda_1 (s - target) + lambda_2 (s - target)^2. The multipliers start at 0
  and *ascend*: their gradient is turned round on its way to the optimiser. The target starts at 0;
  {'fn': 'movement.schedule', 'final': 0.6, 'power': 1.0} for 'delta/.*/target' raises it linearly.

  Without draws as many of a layer's gates of one kind are 0 as are expected to be, rounded, those
  of the lowest log_alpha; the others are sigmoid(0.8 log_alpha / beta), as in the authors' code.
  This is what evaluates and what merges, so zeros are exact and what stays is scaled; the share of
  zeros meets the target up to that rounding and to how near s has come.

  All gates live at delta/shared_<name>, for the penalty sees all of them at once: the numbers that
  train are 2 + H + F a layer and the two multipliers. A site's own leaf says which of its layer's
  gates act there. Weight decay does not reach them.

  Deviations: no masks of hidden dimensions; heads and units have one start, where the authors' code
  has 10 for heads (as for blocks) and 0 for units; the multipliers train with the group's
  optimiser, whose clipping sees their gradient. The distillation that the paper combines this with
  is apart.

  Args:
    start: log_alpha of heads and units at first; gates of 3 are 0.97 at rest.
    blocks: log_alpha of whole blocks. The target pulls at a block's gate as at all of its units'
      together, and Adam moves all gates alike: from one start, blocks would be gone before
      anything else is weighed.
    layers: regex of the layers whose heads, units and blocks have gates.
  """

  def shared_gates(kind, start):
    def shared(key, sites):
      return {
        f'{kind}_{_layer(path)}': jnp.full(_count(site), start, jnp.float32)
        for path, site in sites.items()
      }

    return shared

  def init(key, site):
    return {'gates': jnp.arange(_count(site), dtype=jnp.int32)}

  def expand(p, path, key):
    log_alpha = p[f'{_kind(path)}_{_layer(path)}']
    value = _rounded(log_alpha) if key is None else drawn(log_alpha, at_path(key, path))
    return {'mask': value[p['gates']]}

  def sized(kind, name, numbers):
    """The gates of one kind, and how many numbers each of them stands for."""

    def shared(key, sites):
      (width,) = {numbers(site) for site in sites.values()}
      return {**shared_gates(kind, start)(key, sites), name: jnp.asarray(width, jnp.int32)}

    return shared

  def shared_heads(key, sites):
    per = sized('heads', 'per_head', lambda s: s.y.shape[3] * (4 * s.x.shape[2] + 3))
    multipliers = {name: jnp.zeros(1) for name in ('lambda_1', 'lambda_2')}
    return {**per(key, sites), **multipliers, 'target': jnp.zeros(())}

  def penalty(p, path):
    # Every layer with heads adds its share of the one cost.
    times = sum(name.startswith('heads_') for name in p)
    away = expected_sparsity(p) - jax.lax.stop_gradient(p['target'])
    first, second = (ascending(p[name])[0] for name in ('lambda_1', 'lambda_2'))
    return (first * away + second * away**2) / times

  shared_units = sized('units', 'per_unit', lambda s: 2 * s.x.shape[2] + 1)
  return (
    Delta(init, _apply_heads, f'({layers})/attention/heads', _merge_heads,
          shared_heads, expand, penalty),
    Delta(init, _apply, f'({layers})/mlp/act', _merge_units, shared_units, expand),
    Delta(init, _apply, f'({layers})/attention_out', _merge_block('attention', 'out'),
          shared_gates('attention', blocks), expand),
    Delta(init, _apply, f'({layers})/mlp_out', _merge_block('mlp', 'down'),
          shared_gates('mlp', blocks), expand),
  )  # fmt: skip


def expected_sparsity(p):
  """float32: the s of `cofi`, of what its sites share."""
  kept = total = 0.0
  for fine, coarse, per in (('heads', 'attention', 'per_head'), ('units', 'mlp', 'per_unit')):
    for name in sorted(name for name in p if name.startswith(f'{fine}_')):
      block = opened(p[f'{coarse}_{name.removeprefix(f"{fine}_")}'])[0]
      kept += block * jnp.sum(opened(p[name])) * p[per]
      total += p[name].size * p[per].astype(jnp.float32)
  return 1 - kept / total


@jax.custom_vjp
def ascending(x):
  """x; what descends its gradient ascends."""
  return x


ascending.defvjp(lambda x: (x, None), lambda _, g: (-g,))


def _rounded(log_alpha):
  size = log_alpha.size
  closed = jnp.round(jnp.sum(1 - opened(log_alpha))).astype(jnp.int32)
  soft = jax.nn.sigmoid(SHARPNESS * log_alpha / BETA)
  return jnp.where(largest(log_alpha, size - closed), soft, 0.0)


def _value(p, path, key):
  """What acts: drawn, or at rest."""
  log_alpha = p['log_alpha']
  return {'mask': resting(log_alpha) if key is None else drawn(log_alpha, at_path(key, path))}


def _count(site) -> int:
  """Gates at a site: of heads, of units, or one of the block."""
  if site.path.endswith('_out'):
    return 1
  return site.y.shape[2]


def _layer(path: str) -> str:
  return re.search(r'layer_(\d+)', path)[1]


def _kind(path: str) -> str:
  place = path.partition('/')[2]
  kinds = {'attention/heads': 'heads', 'mlp/act': 'units', 'attention_out': 'attention'}
  return kinds.get(place, 'mlp')


def _apply(p, site):
  return site.y * p['mask'].astype(site.y.dtype)


def _apply_heads(p, site):
  return site.y * p['mask'].astype(site.y.dtype)[:, None]


def _merge_heads(p, module):
  kernel = module['out']['kernel']
  rows = jnp.repeat(p['mask'], kernel.shape[0] // p['mask'].size)
  return {**module, 'out': {**module['out'], 'kernel': rows[:, None] * kernel}}


def _merge_units(p, module):
  down = {**module['down'], 'kernel': p['mask'][:, None] * module['down']['kernel']}
  return {**module, 'down': down}


def _merge_block(block: str, linear: str):
  def merge(p, module):
    last = {name: x * p['mask'] for name, x in module[block][linear].items()}
    return {**module, block: {**module[block], linear: last}}

  return merge
