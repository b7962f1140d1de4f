"""What a method may do to the optimiser of a group, and to which of its numbers move at all.

`config.optim.groups.encoder.transform = {'fn': 'masks.fish', 'density': 0.005}` is
`efft/peft/masks.py:fish(density=0.005)`, a `Transform`. What it finds out before training (`given`)
is arrays, kept beside the run and inside the optimiser's state, never constants of the program: a
run that goes on reads them from there, and runs that differ in them share what was compiled.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import optax

from efft import tree
from efft.arithmetic import highest
from efft.peft.build import call


class Problem(NamedTuple):
  """What a transform may look at before training.

  Attributes:
    leaves: {path: array} of the group at its start.
    steps: length of the run.
    seed: of the run.
    gradients: (examples) -> {path: array}, the mean gradient of the loss over so many training
      examples (at most all), without dropout, class weights and what deltas add to the loss.
    squares: (examples) -> {path: array}, the mean over examples of each one's squared gradient.
    train: (steps) -> {path: array}, the group after a run of so many steps of everything that the
      rules train, with the config's optimiser but without transforms.
  """

  leaves: Mapping[str, Any]
  steps: int
  seed: int
  gradients: Callable
  squares: Callable
  train: Callable


class Transform(NamedTuple):
  """What is done to one group.

  Attributes:
    prepare: (problem) -> given, {name: numpy array}, once before training.
    direction: (inner, steps, given) -> optax transformation in place of `inner`, which turns
      clipped gradients into the update before weight decay and learning rate.
    wrap: (inner, steps, given) -> optax transformation in place of `inner`, which turns clipped
      gradients into all of the update.
    outside: 'still' or 'zero', where `given` is {path: bool array}: the numbers that train. The
      gradient elsewhere is 0 before it is clipped, and the numbers elsewhere stay as they are,
      decay included, or become 0 with the first step.
    share: of the group's numbers that can differ from the start, or from 0, at the end.
    scheduled: whether only the end of the run is what the options ask for, so that no earlier
      step may be handed on in its place.
  """

  prepare: Callable | None = None
  direction: Callable | None = None
  wrap: Callable | None = None
  outside: str | None = None
  share: float = 1.0
  scheduled: bool = False


def build(config: Mapping, package: str = 'efft.peft') -> dict[str, Transform]:
  """{group: transform} of the resolved config's 'optim'.

  Raises:
    InputError: an unknown function or option, or a value that the function refuses.
  """
  return {
    group: call(f'config.optim.groups.{group}.transform', fields['transform'], 'Transform', package)
    for group, fields in config['groups'].items()
    if fields.get('transform')
  }


def map_group(fn: Callable, values: Mapping) -> dict:
  """`fn(path, leaf)` over a group's own leaves; `optax.partition` leaves gaps for the others'."""
  return tree.map_paths(
    lambda path, x: x if isinstance(x, optax.MaskedNode) else fn(path, x), values
  )


def leaves(values: Mapping) -> dict:
  """{path: leaf} of a group's own leaves."""
  flat = tree.flatten(values)
  return {path: x for path, x in flat.items() if not isinstance(x, optax.MaskedNode)}


def top(scores: Mapping[str, np.ndarray], density: float) -> dict[str, np.ndarray]:
  """{path: bool array} of the share `density` with the largest scores over all leaves together.

  Exactly round(density x size) of them, one at least; of equals those that come first, by path.
  """
  paths = sorted(scores)
  flat = np.concatenate([np.ravel(scores[path]) for path in paths])
  kept = highest(flat, max(1, round(density * flat.size)))
  ends = np.cumsum([np.size(scores[path]) for path in paths])
  parts = np.split(kept, ends[:-1])
  return {p: part.reshape(np.shape(scores[p])) for p, part in zip(paths, parts, strict=True)}
