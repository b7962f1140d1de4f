"""Which numbers of a group train: masks, chosen before training or drawn at every step.

A mask chosen before training holds for the whole run. Outside of it nothing moves, by decay
neither, and gradients there count nothing in clipping; the two of Child-Tuning mask gradients
alone, as their paper does. All trained leaves are kept whole in a bundle.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from efft.models import dots
from efft.peft.base import at_path
from efft.peft.transform import Transform, map_group, top

FAMILY = 'masks'  # in `efft methods`


def fish(density: float = 0.005, examples: int = 1024, unit: str = 'element') -> Transform:
  """FISH mask (Sung et al. 2021, https://arxiv.org/abs/2111.09839): where the Fisher is largest.

  Trains the share `density` of the group's numbers with the largest diagonal of the empirical
  Fisher information, the mean over training examples of each one's squared gradient at the start.
  One mask over the whole group; labels are the true ones, dropout is off.

  With unit='leaf' whole leaves train or stay: those with the largest mean, as long as `density`
  is not exceeded (one at least). On the biases this is a structured choice as in S-BitFit, and
  unit='element' one as in U-BitFit (Lawton et al. 2023, https://arxiv.org/abs/2305.16597), which
  choose by the loss's first-order change after training instead.

  Args:
    density: share of the group's numbers that train.
    examples: training examples looked at; the paper's experiments use about 1000.
    unit: 'element' or 'leaf'.
  """
  _check(density, examples)
  if unit not in ('element', 'leaf'):
    raise ValueError(f"unit {unit!r} is neither 'element' nor 'leaf'")
  pick = top if unit == 'element' else _top_leaves
  return _chosen(lambda problem: pick(problem.squares(examples), density), density)


def random(density: float = 0.005) -> Transform:
  """A random share of the group's numbers trains: what choosing by data is measured against.

  Exactly the share `density`, uniform over the group, from the run's seed (as the random baseline
  in Sung et al. 2021, https://arxiv.org/abs/2111.09839).
  """
  _check(density)

  def scores(problem):
    rng = np.random.default_rng(problem.seed)
    leaves = sorted(problem.leaves.items())
    return top({path: rng.random(x.shape, np.float32) for path, x in leaves}, density)

  return _chosen(scores, density)


def magnitude(density: float = 0.005, largest: bool = False, prune: bool = False) -> Transform:
  """Chosen by absolute value at the start, without data.

  The smallest train, as in PaFi (Liao et al. 2023, https://arxiv.org/abs/2305.16742), which
  leaves what matters most to the pretrained model untouched; or the largest. One threshold over
  the group.

  Args:
    density: share of the group's numbers that train.
    largest: train the largest instead.
    prune: the others become 0 instead of staying (SparseAdapter, magnitude).
  """
  _check(density)
  sign = 1.0 if largest else -1.0
  return _chosen(
    lambda problem: top({p: sign * np.abs(x) for p, x in problem.leaves.items()}, density),
    density,
    prune,
  )


def snip(density: float = 0.2, examples: int = 128, prune: bool = True) -> Transform:
  """SNIP (Lee et al. 2019, https://arxiv.org/abs/1810.02340): pruned once, before training.

  Keeps the share `density` of the group's matrices with the largest |gradient * value| at the
  start; the rest becomes 0 with the first step and stays. On adapters this is SparseAdapter (He
  et al. 2022, https://arxiv.org/abs/2210.04284), whose default is a sparsity of 80 %. Vectors
  stay whole: a bias starts at 0 and would score 0 whatever it is worth.

  Args:
    density: share of the numbers in matrices that is kept.
    examples: training examples in the gradient.
    prune: False leaves the rest where it is instead of at 0.
  """
  _check(density, examples)

  def choose(problem):
    grads = problem.gradients(examples)
    sizes = {p: np.abs(g * np.asarray(problem.leaves[p])) for p, g in grads.items()}
    matrices = {path: x for path, x in sizes.items() if x.ndim > 1}
    if not matrices:
      raise ValueError('no matrix in the group')
    whole = {path: np.ones(x.shape, bool) for path, x in sizes.items()}
    return {**whole, **top(matrices, density)}

  return _chosen(choose, density, prune)


def second_order(density: float = 0.005, examples: int = 1024) -> Transform:
  """SAM (Fu et al. 2022, https://arxiv.org/abs/2211.15583): by the loss's second-order expansion.

  The best mask of k numbers for a loss g d + h d^2 / 2 with a diagonal h takes the largest
  g^2 / |h|. No Hessian is computed: with h a power of |g| below two, as the gradient-based
  estimates that the paper turns to have it, the order is that of |g|, the mean gradient at the
  start, and so is the mask. Not to be mistaken for sharpness-aware minimisation.

  Args:
    density: share of the group's numbers that train.
    examples: training examples in the gradient.
  """
  _check(density, examples)
  return _chosen(
    lambda problem: top({p: np.abs(g) for p, g in problem.gradients(examples).items()}, density),
    density,
  )


def lt_sft(density: float = 0.08, share: float = 1.0) -> Transform:
  """LT-SFT (Ansell et al. 2022, https://arxiv.org/abs/2110.07560): a lottery ticket.

  Everything that the rules train is trained first, with the optimiser of the run and a schedule of
  its own; the share `density` of the group that moved farthest is the mask. Then all is put back
  to its start and the run begins. Interrupted before that, it begins the first phase again.

  Args:
    density: share of the group's numbers that train.
    share: length of the first phase in lengths of the run; the paper's phases are equally long.
  """
  _check(density)
  if share <= 0:
    raise ValueError(f'share {share} is not above 0')

  def choose(problem):
    ends = problem.train(max(1, round(share * problem.steps)))
    return top({p: np.abs(x - np.asarray(problem.leaves[p])) for p, x in ends.items()}, density)

  return _chosen(choose, density)


class Masked(NamedTuple):
  """State of an optimiser that sees some gradients only."""

  masks: Any
  inner: Any


def child_d(density: float = 0.3, examples: int = 1024) -> Transform:
  """Child-Tuning_D (Xu et al. 2021, https://arxiv.org/abs/2109.05687): a task's own child.

  The gradients of the share `density` of the group with the largest Fisher information (as in
  `fish`, from single examples; the authors' code squares the gradients of batches) are kept, the
  others are 0 after clipping. Weight decay moves all of it, as in the authors' code. There
  embeddings, pooler and head train without mask: groups without a transform.

  Args:
    density: p of the paper, share of the group in the child.
    examples: training examples looked at; the authors' code reads all.
  """
  _check(density, examples)

  def direction(inner, steps, given):
    def init(params):
      return Masked(map_group(lambda path, x: jnp.array(given[path]), params), inner.init(params))

    def update(grads, state, params=None):
      grads = jax.tree.map(lambda mask, g: jnp.where(mask, g, 0), state.masks, grads)
      updates, after = inner.update(grads, state.inner, params)
      return updates, Masked(state.masks, after)

    return optax.GradientTransformation(init, update)

  return Transform(lambda problem: top(problem.squares(examples), density), direction)


class Drawn(NamedTuple):
  """State of an optimiser that draws which gradients it sees."""

  count: Any
  seed: Any
  inner: Any


def child_f(density: float = 0.3) -> Transform:
  """Child-Tuning_F (Xu et al. 2021, https://arxiv.org/abs/2109.05687): a new child every step.

  Each number's gradient is kept with probability `density` and divided by it, after clipping; the
  draws are a function of (seed, step, leaf). Weight decay moves all of the group, as in the
  authors' code.

  Args:
    density: p_F of the paper.
  """
  _check(density)

  def direction(inner, steps, given):
    def init(params):
      start = jnp.zeros((), jnp.int32), jnp.array(given['seed'], jnp.uint32)
      return Drawn(*start, inner.init(params))

    def update(grads, state, params=None):
      key = jax.random.fold_in(jax.random.key(state.seed), state.count)

      def thin(path, g):
        return dots.drop(g, jax.random.bits(at_path(key, path), (2,), jnp.uint32), 1 - density)

      updates, after = inner.update(map_group(thin, grads), state.inner, params)
      return updates, Drawn(state.count + 1, state.seed, after)

    return optax.GradientTransformation(init, update)

  return Transform(lambda problem: {'seed': np.uint32(problem.seed)}, direction)


def _top_leaves(scores: Mapping[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
  left = density * sum(np.size(x) for x in scores.values())
  masks = {path: np.zeros(np.shape(x), bool) for path, x in scores.items()}
  for number, path in enumerate(sorted(scores, key=lambda p: (-float(np.mean(scores[p])), p))):
    if number == 0 or np.size(scores[path]) <= left:
      masks[path][:] = True
      left -= np.size(scores[path])
  return masks


def _chosen(choose, density: float, prune: bool = False) -> Transform:
  return Transform(choose, outside='zero' if prune else 'still', share=density)


def _check(density: float, examples: int = 1) -> None:
  if not 0 < density <= 1:
    raise ValueError(f'density {density} is not in (0, 1]')
  if examples < 1:
    raise ValueError(f'examples {examples} is below 1')
