"""Pruning while fine-tuning: masks of kernels, blocks and units whose scores train.

The masks stand beside frozen kernels or inside of full fine-tuning: what trains is the rules'
business. How much they keep is a number at each site that `schedule` moves, step by step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efft.peft import lora
from efft.peft.base import Delta
from efft.peft.transform import Transform
from efft.peft.updates import LINEARS, kernel_shape

FAMILY = 'pruning'  # in `efft methods`
ATTENTION = r'layer_\d+/attention/(query|key|value|out)/matmul'
UNITS = r'layer_\d+/mlp/act'
LEAST = 0.005  # of a matrix's scores, which thresholds leave open


def movement(keep: float = 1.0, rank: int = 0, alpha: float = 16.0, at: str = LINEARS) -> Delta:
  """Movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): x (W * M).

  M is 1 where the scores S [d_in, d_out] are among the share `keep` of the largest of their
  kernel, exactly max(1, round(keep * size)) of them, and 0 elsewhere. The gradient passes straight
  through M, and with that is the paper's:

      dL/dS = dL/dW' * W     dL/dW = dL/dW' * M     W' = W * M

  so that S gathers how far weights move away from zero. Scores start at 0 and the share at `keep`.
  A group of its own for 'delta/.*/keep' with the transform {'fn': 'movement.schedule', 'final':
  0.15} lowers it; without, it has to be frozen. What evaluates at any time takes the current share
  (of averaged weights, config.optim.ema, the average of it).

  With `rank`, W may stay frozen and what is pruned is W + (alpha / rank) A B, A and B as in
  `lora.lora`; it stands in W's place above. Trains d_in d_out scores a kernel and the share, and
  rank (d_in + d_out) numbers; a bundle stores a bit for a score. Merges into kernels with zeros.

  It acts before other deltas at its sites: a LoRA under a name of its own is added to W * M and not
  masked by it. The product x W that it replaces is dropped by XLA. With `rank` it is computed as
  y + x (W' * M - W), because A B would be lost in a W of bfloat16: a product of the kernel's size
  more, forward and again for the gradient of x. Nothing of that is left once merged.
  Of two such masks at one site, the later alone would count: use one.

  Args:
    keep: share of each kernel that is kept at first, in (0, 1].
    rank: of a LoRA inside of the mask; 0: none.
    alpha: the numerator of its scale.
    at: which kernels.
  """
  if not 0 < keep <= 1:
    raise ValueError(f'keep {keep} is not in (0, 1]')

  def init(site):
    return {'score': jnp.zeros(site.w.shape, jnp.float32), 'keep': jnp.asarray(keep, jnp.float32)}

  def mask(p):
    share = jnp.clip(p['keep'], 0, 1)
    count = jnp.maximum(1, jnp.round(share * p['score'].size).astype(jnp.int32))
    return largest(p['score'], count)

  return masked(init, straight(mask), at, rank, alpha)


def soft(
  threshold: float = 0.1,
  start: float = 0.0,
  penalty: float = 400.0,
  rank: int = 0,
  alpha: float = 16.0,
  at: str = LINEARS,
) -> Delta:
  """Soft movement pruning (Sanh et al. 2020, https://arxiv.org/abs/2005.07683): by a threshold.

  As `movement`, but M = 1 where sigmoid(S) > tau, however many that are: kernels may differ. The
  loss grows by lambda_t x the mean of sigmoid(S) over all that is masked, which closes what the
  task does not hold open. Every site's tau starts at `start`, and {'fn': 'movement.schedule',
  'final': threshold} for 'delta/.*/threshold' raises it, and with it lambda_t = penalty x tau /
  threshold. int(0.005 size) + 1 numbers of each kernel stay in any case.

  Deviation: the mean is over all numbers, in the authors' code over the kernels' means.

  Args:
    threshold: tau at the end, in (0, 1).
    start: tau at first; scores start at 0, so below 1/2 all of them are open.
    penalty: lambda at the end.
    rank, alpha, at: as in `movement`.
  """
  _check_soft(threshold, start, penalty)

  def init(site):
    return {
      'score': jnp.zeros(site.w.shape, jnp.float32),
      'threshold': jnp.asarray(start, jnp.float32),
    }

  def shared(key, sites):
    return {'numbers': jnp.asarray(sum(site.w.size for site in sites.values()), jnp.int32)}

  def cost(p, path):
    weight = penalty * jax.lax.stop_gradient(p['threshold']) / threshold
    return weight * jnp.sum(jax.nn.sigmoid(p['score'])) / p['numbers']

  return masked(init, straight(_above), at, rank, alpha, shared=shared, penalty=cost)


def block(
  size: int = 32,
  threshold: float = 0.1,
  start: float = 0.0,
  penalty: float = 10.0,
  rank: int = 0,
  alpha: float = 16.0,
  attention: str = ATTENTION,
  units: str = UNITS,
) -> tuple[Delta, ...]:
  """Block movement pruning (Lagunas et al. 2021, https://arxiv.org/abs/2109.04838), the hybrid.

  As `soft`, with one score for each block of `size` x `size` numbers of attention's four kernels
  (the last of a row or column may be smaller), whose gradient is the sum over the block, and one
  for each unit of the feed-forward block: a column of up, its bias, and a row of down. Heads
  without a block in value or out and units that are closed can be cut out: see
  `efft.compress.dead`. The penalty's mean of sigmoid(S) is over the kernels' numbers, of which a
  score stands for many.

  Deviations: units are masked once, where they are activated, which is the same as masking kernels
  and bias for activations that are 0 at 0. dL/dS there sums dL/dW' * W over the row of down, and
  for a closed unit it is what opening it would bring; the authors' code masks up and down, so that
  the gradient of a closed unit is 0 and it stays closed. One block of a kernel and one unit of a
  layer stay in any case, 0.5 % where that is more.

  Args:
    size: of a block's side.
    threshold, start, penalty: as in `soft`.
    rank, alpha: of a LoRA inside of attention's masks, as in `movement`.
    attention: which kernels are masked in blocks.
    units: which activations have a mask of units.
  """
  _check_soft(threshold, start, penalty)
  if size < 1:
    raise ValueError(f'size {size} is below 1')

  def scores(shape):
    return {'score': jnp.zeros(shape, jnp.float32), 'threshold': jnp.asarray(start, jnp.float32)}

  def blocks(shape):
    return tuple(-(-length // size) for length in shape)

  def cost(p, numbers):
    weight = penalty * jax.lax.stop_gradient(p['threshold']) / threshold
    total = sum(p[name].astype(jnp.float32) for name in ('blocks', 'rows') if name in p)
    return weight * numbers * jnp.sum(jax.nn.sigmoid(p['score'])) / total

  def shared(key, sites):
    shapes = [blocks(site.w.shape) for site in sites.values()]
    numbers = size**2 * sum(rows * columns for rows, columns in shapes)
    return {'blocks': jnp.asarray(numbers, jnp.int32)}

  def spread(mask, shape):
    return jnp.repeat(jnp.repeat(mask, size, 0), size, 1)[: shape[0], : shape[1]]

  kernels = masked(
    lambda site: scores(blocks(site.w.shape)), straight(_above), attention, rank, alpha, spread,
    shared=shared, penalty=lambda p, path: cost(p, size**2),
  )  # fmt: skip

  def shared_units(key, sites):
    # The numbers of up and down that a unit stands for: the same in all layers.
    unit = 2 * next(iter(sites.values())).x.shape[-1]
    rows = unit * sum(site.y.shape[-1] for site in sites.values())
    return {'unit': jnp.asarray(unit, jnp.int32), 'rows': jnp.asarray(rows, jnp.int32)}

  def apply(p, site):
    return site.y * p['mask'].astype(site.y.dtype)

  def merge(p, module):
    up = {name: x * p['mask'] for name, x in module['up'].items()}
    down = {**module['down'], 'kernel': p['mask'][:, None] * module['down']['kernel']}
    return {**module, 'up': up, 'down': down}

  neurons = Delta(
    lambda key, site: scores(site.y.shape[-1:]), apply, units, merge,
    shared=shared_units, expand=_expand(straight(_above)), pack=_pack(straight(_above)),
    penalty=lambda p, path: cost(p, p['unit']),
  )  # fmt: skip
  return kernels, neurons


def masked(
  init: Callable,
  mask: Callable,
  at: str,
  rank: int = 0,
  alpha: float = 16.0,
  spread: Callable = lambda mask, shape: mask,
  **fields,
) -> Delta:
  """x (W' * M) in place of x W, with W' = W or, of a rank above 0, W + (alpha / rank) A B.

  Args:
    init: (site) -> the parameters of the mask.
    mask: (parameters, path, key or None) -> what `spread` makes M of; a bundle stores its bits.
    at: which kernels.
    rank, alpha: of the LoRA inside.
    spread: (mask, shape of W) -> M.
    fields: others of the Delta.
  """
  if rank < 0:
    raise ValueError(f'rank {rank} is below 0')
  inside = lora.lora(rank, alpha, at=at) if rank else None

  def start(key, site):
    kernel_shape(site)
    return {**init(site), **(inside.init(key, site) if inside else {})}

  def pruned(p, w):
    if inside:
      w = inside.merge(p, {'kernel': w})['kernel']
    return w * spread(p['mask'], w.shape)

  def apply(p, site):
    if inside:
      return site.y + site.contract(site.x, pruned(p, site.w) - site.w)
    return site.contract(site.x, pruned(p, site.w))

  def merge(p, module):
    return {**module, 'kernel': pruned(p, module['kernel'])}

  fields = {'expand': _expand(mask), 'pack': _pack(mask), **fields}
  return Delta(start, apply, at, merge, first=True, **fields)


def straight(mask: Callable) -> Callable:
  """(parameters with a 'score', key) -> 0. or 1., to the bit, with the gradient of the score."""

  def made(p, path, key):
    score = p['score']
    chosen = mask(jax.lax.stop_gradient(p))
    return chosen.astype(score.dtype) + (score - jax.lax.stop_gradient(score))

  return made


def largest(scores, count):
  """bool in the shape of float32 `scores`: the `count` largest; of equals those that come first.

  The least of them is found bit by bit, which takes 32 passes over the scores in place of a sort;
  `count` may be traced.
  """
  bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
  # Unsigned integers in the order of the floats.
  order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

  def refine(place, least):
    trial = least | (jnp.uint32(1 << 31) >> place.astype(jnp.uint32))
    return jnp.where(jnp.sum(order >= trial) >= count, trial, least)

  least = jax.lax.fori_loop(0, 32, refine, jnp.uint32(0))
  above, equal = order > least, order == least
  place = jnp.cumsum(equal.reshape(-1)).reshape(scores.shape)
  return above | (equal & (place <= count - jnp.sum(above)))


def _above(p):
  """bool: where sigmoid(S) > tau, and the largest share LEAST in any case."""
  score = p['score']
  wanted = jax.nn.sigmoid(score) > p['threshold']
  least = int(LEAST * score.size) + 1
  return jax.lax.cond(jnp.sum(wanted) >= least, lambda: wanted, lambda: largest(score, least))


def _expand(mask: Callable) -> Callable:
  """What acts: the mask, as it is where a bundle has stored it, and leaves of other kinds."""

  def expand(p, path, key):
    inside = {name: x for name, x in p.items() if name in ('a', 'b')}
    return {**inside, 'mask': p['mask'] if 'mask' in p else mask(p, path, key)}

  return expand


def _pack(mask: Callable) -> Callable:
  def pack(p):
    found = mask(p, '', None)
    inside = {name: x for name, x in p.items() if name in ('a', 'b')}
    return {**inside, 'mask': found > 0.5}

  return pack


class Scheduled(NamedTuple):
  """State of numbers that a schedule moves.

  Attributes:
    count: steps taken.
    start: the numbers at first.
  """

  count: Any
  start: Any


def schedule(
  final: float, warmup: float = 0.1, cooldown: float = 0.2, power: float = 3.0
) -> Transform:
  """Moves all numbers of a group from where they start to `final`, whatever their gradients.

  The cubic schedule of gradual pruning (Zhu and Gupta 2017, https://arxiv.org/abs/1710.01878) as
  Sanh et al. 2020 (https://arxiv.org/abs/2005.07683) use it. After t of T steps a number is

      final + (start - final) (1 - clip((t - t_i) / (T - t_i - t_f), 0, 1))^power

  with t_i = round(warmup T) and t_f = round(cooldown T). Takes the place of the group's optimiser;
  learning rate and decay have no effect. The next step and what evaluates after this one see the
  new value.

  Args:
    final: where the numbers end, above 0 and below 1: shares, and thresholds of sigmoids.
    warmup: share of the run before they move.
    cooldown: share of the run after they have moved.
    power: 3: fast at first; 1: linear.
  """
  if not 0 < final < 1:
    raise ValueError(f'final {final} is not between 0 and 1: 0.15 is 15 %')
  if warmup < 0 or cooldown < 0 or warmup + cooldown >= 1:
    raise ValueError(f'warmup {warmup} and cooldown {cooldown} leave no time between them')
  if power <= 0:
    raise ValueError(f'power {power} is not above 0')

  def wrap(inner, steps, given):
    first, last = round(warmup * steps), steps - round(cooldown * steps)

    def init(params):
      return Scheduled(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(grads, state, params):
      count = state.count + 1
      left = (1 - jnp.clip((count - first) / max(1, last - first), 0.0, 1.0)) ** power

      def move(x, start):
        return final + (start - final) * left - x

      return jax.tree.map(move, params, state.start), Scheduled(count, state.start)

    return optax.GradientTransformation(init, update)

  return Transform(wrap=wrap, scheduled=True)


def _check_soft(threshold: float, start: float, penalty: float) -> None:
  if not 0 < threshold < 1:
    raise ValueError(f'threshold {threshold} is not in (0, 1)')
  if not 0 <= start < 1:
    raise ValueError(f'start {start} is not in [0, 1)')
  if penalty < 0:
    raise ValueError(f'penalty {penalty} is below 0')
