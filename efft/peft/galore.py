"""Optimiser states of low rank for weights of full rank."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from efft import tree
from efft.peft.transform import Transform, leaves, map_group

FAMILY = 'optimisers'  # in `efft methods`


class Projected(NamedTuple):
  """State of an optimiser that sees projected gradients: steps taken, bases, what is inside."""

  count: Any
  bases: Any
  inner: Any


def galore(rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25) -> Transform:
  """GaLore (Zhao et al. 2024, https://arxiv.org/abs/2403.03507): full weights, small moments.

  Every `update_proj_gap` steps the gradient G [m, n] of each matrix gives a basis of its narrower
  side, its first `rank` singular vectors: U [m, r] for m <= n, else V [n, r]. The optimiser's
  direction is computed from U' G (G V), with states of that size, and scaled back: the update is
  scale U direction(U' G). States are kept when bases change. Decay and learning rate act on the
  whole matrix, as in the authors' code; leaves that are no matrices train as ever. The basis is
  of the clipped gradient, whose singular vectors are the gradient's own; the largest component of
  each vector is made positive, where the authors take whichever sign their library finds.

  Trains all of the group: what it saves is memory, 2 r max(m, n) + r min(m, n) numbers of state in
  place of 2 m n. The bases are found by a singular value decomposition inside the step.

  Args:
    rank: r; a matrix whose narrower side is smaller keeps all of it.
    update_proj_gap: steps between bases.
    scale: alpha of the paper.
  """
  if rank < 1 or update_proj_gap < 1:
    raise ValueError(f'rank {rank} or update_proj_gap {update_proj_gap} is below 1')
  if scale <= 0:
    raise ValueError(f'scale {scale} is not above 0')

  def basis(g):
    u, _, vt = jnp.linalg.svd(g, full_matrices=False)
    b = u[:, :rank] if g.shape[0] <= g.shape[1] else vt[:rank].T
    # Either sign of a singular vector is right, but moments outlive their basis.
    largest = jnp.take_along_axis(b, jnp.argmax(jnp.abs(b), 0)[None], 0)
    return jnp.where(largest < 0, -b, b)

  def direction(inner, steps, given):
    def init(params):
      bases = {
        path: jnp.zeros((min(x.shape), min(rank, *x.shape)), x.dtype)
        for path, x in leaves(params).items()
        if x.ndim == 2
      }
      low = map_group(_down(bases), params)
      return Projected(jnp.zeros((), jnp.int32), tree.unflatten(bases), inner.init(low))

    def update(grads, state, params=None):
      old, flat = tree.flatten(state.bases), leaves(grads)
      bases = jax.lax.cond(
        state.count % update_proj_gap == 0,
        lambda: {path: basis(flat[path]) for path in old},
        lambda: old,
      )
      low = map_group(_down(bases), grads)
      # Directions look at their parameters' shapes at most.
      low, after = inner.update(low, state.inner, low)

      def up(path, x):
        if path not in bases:
          return x
        b = bases[path]
        return scale * (b @ x if flat[path].shape[0] <= flat[path].shape[1] else x @ b.T)

      new = Projected(state.count + 1, tree.unflatten(bases), after)
      return map_group(up, low), new

    return optax.GradientTransformation(init, update)

  return Transform(direction=direction)


def _down(bases):
  def project(path, g):
    if path not in bases:
      return g
    return bases[path].T @ g if g.shape[0] <= g.shape[1] else g @ bases[path]

  return project
