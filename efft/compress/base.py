"""What stays of an encoder, what is looked at to decide, and gates that stand in for removal.

L layers; H_i heads and F_i units (of the feed-forward block) in layer i; D hidden.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from efft.models.encoder import EncoderConfig
from efft.models.layers import Hooks, compose
from efft.peft import base as peft


class Keep(NamedTuple):
  """Indices that stay, ascending; None: all of them. `efft.compress.slicing.cut` removes the rest.

  Attributes:
    layers: of the L layers.
    heads: for each of the L layers, of its heads; () leaves the block's bias.
    units: for each of the L layers, of its feed-forward units; () leaves the block's bias.
    hidden: of the D hidden dimensions.
    words: of the rows of the word embeddings.
  """

  layers: tuple[int, ...] | None = None
  heads: tuple[tuple[int, ...], ...] | None = None
  units: tuple[tuple[int, ...], ...] | None = None
  hidden: tuple[int, ...] | None = None
  words: tuple[int, ...] | None = None


class Scores(NamedTuple):
  """How much each structure matters: float64, larger is more; None where a score says nothing.

  Attributes:
    heads: for each layer, [H_i].
    units: for each layer, [F_i].
    layers: [L].
  """

  heads: tuple[Any, ...] | None = None
  units: tuple[Any, ...] | None = None
  layers: Any = None


class Gates(NamedTuple):
  """Factors, all 1 in the encoder as it is; 0 does what removal does. None: none of that kind.

  Attributes:
    heads: for each layer, [H_i], on the heads' outputs.
    units: for each layer, [F_i], on the units' activations.
    attention, mlp: [L], on the blocks' outputs before the residual is added.
  """

  heads: tuple[Any, ...] | None = None
  units: tuple[Any, ...] | None = None
  attention: Any = None
  mlp: Any = None


class Smaller(NamedTuple):
  """What a stage makes of an encoder.

  Attributes:
    keep: what stays of its structures.
    variables: of the same shapes, where numbers change too (None: they stay); without 'delta' the
      deltas are folded in.
    tokenizer: tokenizer.json for `keep.words`; None: the same.
  """

  keep: Keep = Keep()
  variables: Any = None
  tokenizer: str | None = None


class Prune(NamedTuple):
  """A stage that removes something.

  Attributes:
    act: (subject) -> Smaller.
    examples: of the training split that it looks at; 0: none.
    batch_size: of the subject's batches.
    measure: (config before any pruning, config now, dtype) -> what the stage's row says as well.
  """

  act: Callable
  examples: int = 0
  batch_size: int = 16
  measure: Callable | None = None


def ones(cfg: EncoderConfig) -> Gates:
  """Gates of every kind that do nothing."""
  layers = jnp.ones(cfg.layers)
  heads, units = (tuple(map(jnp.ones, sizes)) for sizes in (cfg.heads, cfg.mlp))
  return Gates(heads, units, layers, layers)


def closed(cfg: EncoderConfig, keep: Keep) -> Gates:
  """Gates that are 0 at what does not stay, of the kinds that `keep` speaks of.

  A layer loses its two blocks by them, not its norms. Hidden dimensions and words have no gates.
  """

  def gate(size, stays):
    return jnp.asarray(np.isin(np.arange(size), stays), jnp.float32)

  def each(sizes, stays):
    return None if stays is None else tuple(map(gate, sizes, stays))

  blocks = None if keep.layers is None else gate(cfg.layers, keep.layers)
  return Gates(each(cfg.heads, keep.heads), each(cfg.mlp, keep.units), blocks, blocks)


def gated(gates: Gates) -> Callable:
  """The tap of gates; they may be traced, so that a gradient tells what each structure does."""

  def tap(module, site, y, **context):
    layer, _, place = '/'.join((*module.path, site)).partition('/')
    field = {
      'attention/heads': 'heads', 'mlp/act': 'units',
      'attention_out': 'attention', 'mlp_out': 'mlp',
    }.get(place)  # fmt: skip
    values = getattr(gates, field) if field else None
    if values is None:
      return y
    gate = values[int(layer.removeprefix('layer_'))].astype(y.dtype)
    return y * (gate[:, None] if field == 'heads' else gate)

  return tap


@dataclasses.dataclass(frozen=True)
class Subject:
  """An encoder that is to become smaller, and data to look at it with.

  Attributes:
    net: `assemble.Network`: the model with its deltas on its tap.
    variables: {'params', 'delta'}.
    loss: (logits, labels) -> [B].
    batches: training batches (`efft.data.batches`), each with as many examples; a mask 'weights'
      [B] is 0 where a row only fills up.
    seed: of whatever is drawn.
    tokenizer: tokenizer.json, as text.
    texts, pairs: of the training split.
    max_length: tokens of them that count.
    dense: config of the encoder before anything was pruned; None: of this one.
    dtype: in which the run computes.
    folded: whether there were deltas, which are in the weights already.
  """

  net: Any
  variables: Mapping
  loss: Callable
  batches: Sequence[Mapping]
  seed: int = 0
  tokenizer: str = ''
  texts: Sequence[str] = ()
  pairs: Sequence[str] | None = None
  max_length: int | None = None
  dense: EncoderConfig | None = None
  dtype: str = 'float32'
  folded: bool = False

  @property
  def cfg(self) -> EncoderConfig:
    return self.net.model.cfg

  def logits(self, variables: Mapping, batch: Mapping, *taps: Callable):
    """float32 [B, C] without dropout, the taps acting after the deltas."""
    model = self.net.model
    tap = compose(model.hooks.tap, *taps)
    model = model.clone(hooks=Hooks(model.hooks.dot_general, tap), remat=False)
    if 'delta' in variables:
      variables = {**variables, 'delta': peft.expand(self.net.deltas, variables['delta'])}
    return model.apply(variables, batch['input_ids'], batch['mask'], batch['token_types'])
