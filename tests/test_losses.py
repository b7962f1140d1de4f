"""Losses against torch's and against formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efft.training import losses

RNG = np.random.default_rng(0)
B, C = 7, 4
LOGITS = RNG.normal(0, 3, (B, C)).astype(np.float32)
LABEL = RNG.integers(0, C, B).astype(np.int32)
SEVERAL = (RNG.random((B, C)) < 0.4).astype(np.float32)
SEVERAL[2] = 0
CLASS_WEIGHTS = np.array([0.5, 1.0, 2.0, 4.0], np.float32)


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_single_by_hand_and_as_torch(smoothing):
  found = losses.build('single', smoothing)(LOGITS, LABEL)
  target = np.full((B, C), smoothing / C)
  target[np.arange(B), LABEL] += 1 - smoothing
  close(found, -(target * log_softmax(LOGITS)).sum(-1))
  torch = pytest.importorskip('torch')
  cross_entropy = torch.nn.CrossEntropyLoss(reduction='none', label_smoothing=smoothing)
  close(found, cross_entropy(torch.tensor(LOGITS), torch.tensor(LABEL).long()).numpy())


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_multi_by_hand_and_as_torch(smoothing):
  found = losses.build('multi', smoothing)(LOGITS, SEVERAL)
  target = SEVERAL * (1 - smoothing) + smoothing / 2
  p = 1 / (1 + np.exp(-LOGITS))
  close(found, -(target * np.log(p) + (1 - target) * np.log(1 - p)).mean(-1))
  torch = pytest.importorskip('torch')
  bce = torch.nn.BCEWithLogitsLoss(reduction='none')
  close(found, bce(torch.tensor(LOGITS), torch.tensor(target)).mean(-1).numpy())


def test_regression():
  labels = RNG.normal(size=B).astype(np.float32)
  close(losses.build('regression')(LOGITS[:, :1], labels), (LOGITS[:, 0] - labels) ** 2)


@pytest.mark.parametrize('kind', ['single', 'multi'])
def test_extreme_logits_stay_finite(kind):
  labels = LABEL if kind == 'single' else SEVERAL
  loss = losses.build(kind)
  value, grads = jax.value_and_grad(lambda x: loss(x, labels).sum())(LOGITS * 1e4)
  assert jnp.isfinite(value) and jnp.isfinite(grads).all()


def test_class_weights_of_one_class():
  weights = np.array([1, 1, 0, 1, 1, 0.5, 1], np.float32)
  found = losses.example_weights(weights, LABEL, CLASS_WEIGHTS)
  close(found, [w * CLASS_WEIGHTS[c] for w, c in zip(weights, LABEL, strict=True)])


def test_class_weights_of_several_classes():
  found = losses.example_weights(np.ones(B, np.float32), SEVERAL, CLASS_WEIGHTS)
  expected = [CLASS_WEIGHTS[row > 0].mean() if row.any() else 1.0 for row in SEVERAL]
  close(found, expected)


def test_without_class_weights_the_weights_are_kept():
  weights = np.ones(B, np.float32)
  assert losses.example_weights(weights, LABEL) is weights


def test_class_weights_may_come_from_numpy():
  """They are a constant of the step, while the labels are traced."""
  ones = np.ones(B, np.float32)
  found = jax.jit(lambda w, y: losses.example_weights(w, y, CLASS_WEIGHTS))(ones, LABEL)
  close(found, CLASS_WEIGHTS[LABEL])
