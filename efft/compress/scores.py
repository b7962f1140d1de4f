"""How much each head, feed-forward unit and layer matters; what scores least is removed first.

A score is a function (subject, gates, **options) -> Scores. L layers; H_i heads and F_i units in
layer i; B examples in a batch, T tokens, D hidden, K head_dim.

`gates` say what is removed already: all scores are of the encoder under them, and what a gate of
0 has closed scores -inf, so that it stays the first to go. (The norms of a layer whose two blocks
are closed still act.)

The gradient scores look at g [B, structures], the derivatives of the loss of each example alone,
without dropout, by a factor on each structure (gate times the derivative by the gate). A layer's
factor is on both of its blocks, before the residual is added. Rows of weight 0 count nowhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efft.compress.base import Gates, Scores, Subject, gated, ones
from efft.errors import nearest
from efft.peft import base as peft


def random(subject: Subject, gates: Gates | None = None) -> Scores:
  """Uniform in [0, 1), from the subject's seed: what every other score has to beat."""
  rng, cfg = np.random.default_rng(subject.seed), subject.cfg
  heads = tuple(rng.random(count) for count in cfg.heads)
  units = tuple(rng.random(count) for count in cfg.mlp)
  return _closed(Scores(heads, units, rng.random(cfg.layers)), gates)


def magnitude(subject: Subject, gates: Gates | None = None) -> Scores:
  """The l2 norm of a structure's kernels, with the deltas folded in; no data is looked at.

  A head: its columns of query, key and value, its rows of out. A unit: its column of up, its row
  of down. A layer: all of its heads and units. Biases do not count.

  Raises:
    ValueError: a delta that cannot be folded into the weights, by name.
  """
  fixed = peft.fixed(subject.net.deltas)
  if fixed:
    raise ValueError(
      f'magnitude is of the weights, into which {", ".join(fixed)} cannot be folded; '
      'choose a score that looks at data'
    )
  cfg, values = subject.cfg, subject.variables
  params = peft.merge(subject.net.deltas, values['params'], values.get('delta', {}))

  def squares(module):
    return np.square(np.asarray(module['kernel'], np.float64))

  heads, units = [], []
  for i, (count, width) in enumerate(zip(cfg.heads, cfg.mlp, strict=True)):
    layer, head, unit = params[f'layer_{i}'], np.zeros(count), np.zeros(width)
    if count:
      for name in ('query', 'key', 'value'):
        head += squares(layer['attention'][name]).sum(0).reshape(count, cfg.head_dim).sum(1)
      head += squares(layer['attention']['out']).sum(1).reshape(count, cfg.head_dim).sum(1)
    if width:
      unit += squares(layer['mlp']['up']).sum(0) + squares(layer['mlp']['down']).sum(1)
    heads.append(head)
    units.append(unit)
  layers = np.array([head.sum() + unit.sum() for head, unit in zip(heads, units, strict=True)])
  found = Scores(tuple(heads), tuple(units), layers)
  return _closed(jax.tree.map(np.sqrt, found), gates)


def michel(subject: Subject, gates: Gates | None = None, normalise: bool = True) -> Scores:
  """Head importance of Michel et al. 2019 (https://arxiv.org/abs/1905.10650): mean |g|.

  I_h = E_x |d L(x) / d xi_h| = E_x |Att_h(x)^T d L(x) / d Att_h(x)|, the product over tokens and
  K: the absolute value is taken of each example's sum over tokens, then the mean over examples,
  as the paper writes it. The authors' code takes it of each token; others take it of each batch,
  which agrees at one example a batch only. Here units and layers are scored alike, beyond the
  paper.

  Args:
    normalise: divides by the l2 norm over the structures of a layer, as the paper does, which
      makes layers alike under one threshold. Layers are not normalised.
  """
  found = _mean_of(np.abs, subject, gates)
  if normalise:
    # A layer of which all is closed has a norm of 0.
    heads, units = (tuple(x / (np.linalg.norm(x) or 1.0) for x in kind) for kind in found[:2])
    found = found._replace(heads=heads, units=units)
  return _closed(found, gates)


def taylor(subject: Subject, gates: Gates | None = None) -> Scores:
  """First-order Taylor importance (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771).

  (mean g)^2, the paper's (g w)^2 at a gate w = 1: the square of what the expected loss changes
  by, to first order, when the structure goes. Signs of examples cancel, unlike in `michel` and
  `fisher`. The mean is over all examples, so that the order does not depend on batches; the
  authors average the squares of mini-batches while they train, or of single examples (their FG
  variant), which is `fisher`.
  """
  found = _mean_of(lambda g: g, subject, gates)
  return _closed(jax.tree.map(np.square, found), gates)


def fisher(subject: Subject, gates: Gates | None = None) -> Scores:
  """The diagonal of the empirical Fisher information of the gates: mean g^2.

  As in Kwon et al. 2022 (https://arxiv.org/abs/2204.09656), for heads and units; labels are the
  true ones. Their code squares the gradients of batches; here they are of examples, as in the
  paper. Their rearrangement by off-diagonal blocks and their tuning of masks are no part of it.
  """
  return _closed(_mean_of(np.square, subject, gates), gates)


def activation(subject: Subject, gates: Gates | None = None) -> Scores:
  """How strong the outputs are, mean over real tokens (those of a prompt among them).

  A head: the l2 norm over K of its output before `out`. A unit: its absolute activation, after
  the nonlinearity. Labels and gradients are not looked at. Layers: see `similarity`.
  """
  return _closed(_observed(subject, gates)._replace(layers=None), gates)


def similarity(subject: Subject, gates: Gates | None = None) -> Scores:
  """Block Influence of layers (Men et al. 2024, ShortGPT, https://arxiv.org/abs/2403.03853).

  1 - mean over real tokens of cos(x_i, x_{i+1}), for the input and the output [D] of layer i: a
  layer that hardly turns its input scores near 0. The paper's models normalise before a block;
  here both states have come out of a LayerNorm.
  """
  return _closed(Scores(layers=_observed(subject, gates).layers), gates)


SCORES: dict[str, Callable[..., Scores]] = {
  'random': random, 'magnitude': magnitude, 'michel': michel, 'taylor': taylor,
  'fisher': fisher, 'activation': activation, 'similarity': similarity,
}  # fmt: skip
# What each of them says something about.
STRUCTURES = dict.fromkeys(SCORES, ('heads', 'units', 'layers')) | {
  'activation': ('heads', 'units'),
  'similarity': ('layers',),
}

# Those that look at no example.
BLIND = ('random', 'magnitude')


def named(name: str, structure: str) -> Callable[..., Scores]:
  """The score of that name, for choosing among 'heads', 'units' or 'layers'.

  Raises:
    ValueError: no such score, or one that says nothing about these structures.
  """
  if name not in SCORES:
    close = nearest(name, SCORES)
    meant = f'; did you mean {close}?' if close else ''
    raise ValueError(f'no score {name!r}, one of {", ".join(SCORES)}{meant}')
  if structure not in STRUCTURES[name]:
    able = [other for other, kinds in STRUCTURES.items() if structure in kinds]
    could = f'choose {", ".join(able)}' if able else "structures are 'heads', 'units' and 'layers'"
    raise ValueError(f'{name} says nothing about {structure!r}; {could}')
  return SCORES[name]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
  """What a compiled function depends on; equal where these are the same objects."""

  net: Any
  loss: Callable

  def __eq__(self, other):
    return self.net is other.net and self.loss is other.loss

  def __hash__(self):
    return hash((id(self.net), id(self.loss)))


@functools.partial(jax.jit, static_argnums=0)
def _derivatives(program: _Program, variables, gates: Gates, batch) -> Scores:
  """g of one batch: leaves [B, H_i], [B, F_i] and [B, L]."""
  subject = Subject(program.net, variables, program.loss, ())

  def loss(factors, row):
    one = {name: x[None] for name, x in row.items()}
    heads, units = jax.tree.map(jnp.multiply, factors[:2], gates[:2])
    blocks = factors.layers * gates.attention, factors.layers * gates.mlp
    logits = subject.logits(variables, one, gated(Gates(heads, units, *blocks)))
    return subject.loss(logits, one['labels'])[0]

  start = ones(subject.cfg)
  factors = Scores(start.heads, start.units, start.attention)
  return jax.vmap(jax.grad(loss), (None, 0))(factors, batch)


def _mean_of(fn: Callable, subject: Subject, gates: Gates | None) -> Scores:
  """The mean of `fn(g)` over all examples."""

  def summed(real):
    # Rows of weight 0 are left out, not multiplied: what they hold may be no number.
    return lambda g: fn(np.asarray(g, np.float64)[real]).sum(0)

  def parts():
    names = 'input_ids', 'mask', 'token_types', 'labels'
    for program, variables, opened, batch, real in _batches(subject, gates):
      found = _derivatives(program, variables, opened, {name: batch[name] for name in names})
      yield jax.tree.map(summed(real), found), real.sum()

  found = _average(parts())
  if not any(np.any(x) for x in jax.tree.leaves(found)):
    # A ladder reads the layers' outputs, and stops the gradient there.
    raise ValueError('no gradient reaches the layers; choose activation, similarity or random')
  return found


@functools.partial(jax.jit, static_argnums=0)
def _activity(program: _Program, variables, gates: Gates, batch, real) -> tuple[Scores, Any]:
  """Sums over the real tokens of one batch, and their number."""
  subject = Subject(program.net, variables, program.loss, ())
  seen = {}

  def record(module, site, y, **context):
    del context
    seen['/'.join((*module.path, site))] = y
    return y

  subject.logits(variables, batch, gated(gates), record)
  x, mask = seen['embed']
  mask = mask & real[:, None]
  heads, units, layers = [], [], []

  def total(y):
    return jnp.sum(jnp.where(mask.reshape(*mask.shape, *[1] * (y.ndim - 2)), y, 0.0), (0, 1))

  for i, (count, width) in enumerate(zip(subject.cfg.heads, subject.cfg.mlp, strict=True)):
    # A block without heads or units has no such site.
    outputs = seen[f'layer_{i}/attention/heads'] if count else jnp.zeros((*mask.shape, 0, 1))
    acts = seen[f'layer_{i}/mlp/act'] if width else jnp.zeros((*mask.shape, 0))
    heads.append(total(jnp.linalg.norm(outputs.astype(jnp.float32), axis=-1)))
    units.append(total(jnp.abs(acts.astype(jnp.float32))))
    y = seen[f'layer_{i}/output']
    layers.append(total(1.0 - _cosine(x.astype(jnp.float32), y.astype(jnp.float32))))
    x = y
  return Scores(tuple(heads), tuple(units), jnp.array(layers)), mask.sum()


def _cosine(a, b):
  """Of the last axis; 0 where one of them is 0."""
  lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return jnp.sum(a * b, -1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)


def _observed(subject: Subject, gates: Gates | None) -> Scores:
  """Means over all real tokens of what `activation` and `similarity` look at."""

  def parts():
    names = 'input_ids', 'mask', 'token_types'
    for program, variables, opened, batch, real in _batches(subject, gates):
      batch = {name: batch[name] for name in names}
      found, tokens = _activity(program, variables, opened, batch, real)
      yield jax.tree.map(lambda x: np.asarray(x, np.float64), found), int(tokens)

  return _average(parts())


def _batches(subject: Subject, gates: Gates | None) -> Iterator[tuple]:
  """(program, variables, gates of every kind, batch, bool [B]: its real rows) of each batch."""
  start = ones(subject.cfg)
  given = zip(gates or start, start, strict=True)
  opened = Gates(*(one if gate is None else gate for gate, one in given))
  opened = jax.tree.map(lambda gate: jnp.asarray(gate, jnp.float32), opened)
  # Compiled functions outlive a call: pruning in steps scores the same encoder again and again.
  program, variables = _Program(subject.net, subject.loss), jax.device_put(subject.variables)
  for batch in subject.batches:
    yield program, variables, opened, batch, np.asarray(batch['weights']) > 0


def _average(parts: Iterable[tuple[Scores, Any]]) -> Scores:
  """Sums, each with the number of its terms -> their mean."""
  total, count = None, 0
  for found, terms in parts:
    total = found if total is None else jax.tree.map(np.add, total, found)
    count += int(terms)
  if not count:
    raise ValueError('no examples to score by')
  return jax.tree.map(lambda x: x / count, total)


def _closed(scores: Scores, gates: Gates | None) -> Scores:
  """`scores` with -inf at what the gates have closed."""
  if gates is None:
    return scores

  def mark(values, gate):
    return np.where(np.asarray(gate) == 0, -np.inf, values)

  def each(values, kind):
    if values is None or kind is None:
      return values
    return tuple(map(mark, values, kind))

  layers = scores.layers
  if layers is not None and gates.attention is not None and gates.mlp is not None:
    layers = mark(layers, np.abs(gates.attention) + np.abs(gates.mlp))
  return Scores(each(scores.heads, gates.heads), each(scores.units, gates.units), layers)
