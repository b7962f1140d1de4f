"""The encoder with its classification head, and the config that fixes every shape in it."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from efft.models.layers import ACTIVATIONS, Embeddings, Hooks, Layer, Linear, dropout


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """Shapes and rates of one encoder; hashable, JSON by `to_dict`.

  Attributes:
    architecture: Hugging Face's model_type; decides the head and DistilBERT's missing parts.
    heads, mlp: one entry a layer, so that pruned layers may differ in width.
    token_types: rows of the token type table; 0 where the architecture has none.
    embed_dim: width of the embedding tables; projected to `hidden` where it differs (ELECTRA).
    positions_from_pad: RoBERTa's positions, which count from pad_id + 1 and skip padding.
    pooling: 'cls' for the architecture's own head over the first token, 'mean' for the masked
      mean of all tokens followed by one linear layer.
  """

  architecture: str
  vocab_size: int
  hidden: int
  heads: tuple[int, ...]
  head_dim: int
  mlp: tuple[int, ...]
  max_positions: int
  token_types: int
  embed_dim: int
  activation: str = 'gelu'
  eps: float = 1e-12
  pad_id: int = 0
  positions_from_pad: bool = False
  dropout: float = 0.1
  attention_dropout: float = 0.1
  head_dropout: float = 0.1
  pooling: str = 'cls'
  num_labels: int = 2
  initializer_range: float = 0.02

  @property
  def layers(self) -> int:
    return len(self.mlp)

  @property
  def max_length(self) -> int:
    """Longest input in tokens; RoBERTa's first pad_id + 1 position rows are never used."""
    return self.max_positions - (self.pad_id + 1 if self.positions_from_pad else 0)

  @property
  def attention_out_dropout(self) -> float:
    """Rate on the attention block's output; DistilBERT has no dropout there."""
    return 0.0 if self.architecture == 'distilbert' else self.dropout

  def to_dict(self) -> dict:
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, d: dict) -> 'EncoderConfig':
    return cls(**{**d, 'heads': tuple(d['heads']), 'mlp': tuple(d['mlp'])})


@dataclasses.dataclass(frozen=True)
class HeadShape:
  """What stands between the pooled token and the last linear layer."""

  pooler: bool = False  # a pretrained dense + tanh, part of the encoder
  dense: str = ''  # activation of a new dense layer, '' for none
  dropout_first: bool = True  # whether the head's dropout also precedes `dense`


HEADS = {
  'bert': HeadShape(pooler=True),
  'roberta': HeadShape(dense='tanh'),
  'xlm-roberta': HeadShape(dense='tanh'),
  'camembert': HeadShape(dense='tanh'),
  'distilbert': HeadShape(dense='relu', dropout_first=False),
  'electra': HeadShape(dense='gelu'),
}


class Head(nn.Module):
  """Pooled features [B, D] -> logits float32 [B, num_labels]."""

  cfg: EncoderConfig
  hooks: Hooks

  @nn.compact
  def __call__(self, x):
    cfg, shape = self.cfg, HEADS[self.cfg.architecture]
    if cfg.pooling == 'cls' and shape.dense:
      if shape.dropout_first:
        x = dropout(self, x, cfg.head_dropout)
      x = Linear(cfg.hidden, self.hooks, cfg.initializer_range, name='dense')(x)
      x = ACTIVATIONS[shape.dense](x)
    x = dropout(self, x, cfg.head_dropout)
    return Linear(cfg.num_labels, self.hooks, cfg.initializer_range, name='out')(x)


class Encoder(nn.Module):
  """Token ids -> class scores.

  Attributes:
    cfg: the shapes.
    hooks: the contraction and the tap; see `Hooks`.
    dtype: type of activations and products. Parameters keep their own type; sums, softmax,
      norms and the head run in float32.
    remat: recomputes each layer in the backward pass instead of storing its activations.
  """

  cfg: EncoderConfig
  hooks: Hooks = Hooks()
  dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(self, ids, mask, token_types=None):
    """Scores a batch.

    Args:
      ids: int32 [B, T].
      mask: bool [B, T], True for real tokens.
      token_types: int32 [B, T], 0 where omitted; ignored by architectures without them.

    Returns:
      float32 [B, num_labels]. Dropout acts if, and only if, a 'dropout' stream is given.
    """
    cfg, hooks = self.cfg, self.hooks
    mask = mask.astype(bool)
    token_types = jnp.zeros_like(ids) if token_types is None else token_types
    x, mask = Embeddings(cfg, hooks, self.dtype, name='embed')(ids, mask, token_types)
    x, mask = hooks.tap(self, 'embed', (x, mask), ids=ids)
    layer = nn.remat(Layer) if self.remat else Layer
    features = [x]
    for i, (heads, width) in enumerate(zip(cfg.heads, cfg.mlp, strict=True)):
      features.append(layer(cfg, hooks, heads, width, name=f'layer_{i}')(features[-1], mask))
    x, mask = hooks.tap(self, 'output', (features[-1], mask), features=features)
    if cfg.pooling == 'mean':
      weight = mask[:, :, None].astype(jnp.float32)
      x = jnp.sum(x.astype(jnp.float32) * weight, 1) / jnp.maximum(weight.sum(1), 1.0)
    else:
      x = x[:, 0].astype(jnp.float32)
      if HEADS[cfg.architecture].pooler:
        x = jnp.tanh(Linear(cfg.hidden, hooks, cfg.initializer_range, name='pooler')(x))
    return Head(cfg, hooks, name='head')(x)


def init_params(cfg: EncoderConfig, key) -> dict:
  """Random parameters of `cfg`'s shapes; under `jax.eval_shape`, the shapes alone."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return Encoder(cfg).init({'params': key}, ids, ids == 0)['params']
