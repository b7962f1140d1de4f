"""Losses per example: (logits float32 [B, C], labels) -> float32 [B]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def single(label_smoothing: float = 0.0) -> Callable:
  """Softmax cross-entropy; labels int32 [B].

  With smoothing s the target is (1 - s) on the label plus s / C on every class, as in torch.
  """

  def loss(logits, labels):
    target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, target)

  return loss


def multi(label_smoothing: float = 0.0) -> Callable:
  """Mean over classes of the binary cross-entropies; labels {0, 1} float32 [B, C].

  With smoothing s targets become (1 - s) label + s / 2.
  """

  def loss(logits, labels):
    target = labels * (1 - label_smoothing) + label_smoothing / 2
    return optax.sigmoid_binary_cross_entropy(logits, target).mean(-1)

  return loss


def regression() -> Callable:
  """Squared error; labels float32 [B], logits [B, 1]."""
  return lambda logits, labels: jnp.square(logits[:, 0] - labels)


def build(kind: str, label_smoothing: float = 0.0) -> Callable:
  """The loss of a task kind: 'single', 'multi' or 'regression' (which ignores smoothing)."""
  if kind == 'regression':
    return regression()
  return {'single': single, 'multi': multi}[kind](label_smoothing)


def divergence(kind: str, weight: float = 1.0) -> Callable:
  """How far two passes over one batch disagree: (logits, logits) -> float32 [B], times `weight`.

  Half the sum of both Kullback-Leibler divergences, as in R-Drop (Liang et al. 2021,
  https://arxiv.org/abs/2106.14448, equation 2): over the classes, or the mean over the classes'
  yes and no. The squared difference for regression.
  """

  def single(a, b):
    p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
    return weight * jnp.sum((jnp.exp(p) - jnp.exp(q)) * (p - q), -1) / 2

  def multi(a, b):
    # The log odds of p are its logits, so both divergences sum to this.
    return weight * jnp.mean((jax.nn.sigmoid(a) - jax.nn.sigmoid(b)) * (a - b), -1) / 2

  def regression(a, b):
    return weight * jnp.square(a[:, 0] - b[:, 0])

  return {'single': single, 'multi': multi, 'regression': regression}[kind]


def example_weights(weights, labels, class_weights=None):
  """How much each example counts: its own weight times that of its class.

  Args:
    weights: float32 [B], 0 for padding rows.
    labels: int32 [B], or {0, 1} [B, C], where the classes' weights of an example are averaged
      over the classes that it has (1 where it has none).
    class_weights: float32 [C] or None.
  """
  if class_weights is None:
    return weights
  class_weights = jnp.asarray(class_weights, jnp.float32)
  if labels.ndim == 1:
    return weights * class_weights[labels]
  has = labels.sum(-1)
  return weights * jnp.where(has > 0, labels @ class_weights / jnp.maximum(has, 1), 1.0)
