"""Metrics against loops written out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efft.eval import metrics


def counts(truth, predicted, c):
  tp = sum(t == c and p == c for t, p in zip(truth, predicted, strict=True))
  fp = sum(t != c and p == c for t, p in zip(truth, predicted, strict=True))
  fn = sum(t == c and p != c for t, p in zip(truth, predicted, strict=True))
  return tp, fp, fn


def f1_of(tp, fp, fn):
  return 2 * tp / (2 * tp + fp + fn) if tp else 0.0


def hand(name, truth, logits):
  predicted = [int(np.argmax(row)) for row in logits]
  truth = [int(t) for t in truth]
  n = len(truth)
  seen = sorted({*truth, *predicted})
  if name == 'accuracy' or name == 'f1_micro':
    return sum(t == p for t, p in zip(truth, predicted, strict=True)) / n
  if name == 'f1' and logits.shape[1] == 2:
    return f1_of(*counts(truth, predicted, 1))
  if name in ('f1', 'f1_macro'):
    return sum(f1_of(*counts(truth, predicted, c)) for c in seen) / len(seen)
  if name == 'matthews':  # Gorodkin's R_K, from covariances of indicator vectors

    def covariance(a, b):
      total = 0.0
      for c in seen:
        x, y = [v == c for v in a], [v == c for v in b]
        total += sum(p * q for p, q in zip(x, y, strict=True)) / n - sum(x) * sum(y) / n**2
      return total

    norm = math.sqrt(covariance(truth, truth) * covariance(predicted, predicted))
    return covariance(truth, predicted) / norm if norm > 1e-12 else 0.0
  assert name == 'ece'
  total = 0.0
  confidences = []
  for row in logits.astype(np.float64):
    e = [math.exp(v - max(row)) for v in row]
    confidences.append(max(e) / sum(e))
  for b in range(15):
    inside = [i for i, c in enumerate(confidences) if b / 15 < c <= (b + 1) / 15]
    if inside:
      right = sum(truth[i] == predicted[i] for i in inside) / len(inside)
      total += len(inside) / n * abs(right - sum(confidences[i] for i in inside) / len(inside))
  return total


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 40))
def test_single_label_metrics(seed, classes, n):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, classes, n).astype(np.int32)
  logits = rng.normal(scale=3, size=(n, classes)).astype(np.float32)
  names = metrics.KINDS['single']
  got = metrics.compute(names, labels, logits, 'single')
  assert list(got) == list(names)
  for name in names:
    assert got[name] == pytest.approx(hand(name, labels, logits), abs=1e-9), name
    assert type(got[name]) is float


def test_constant_predictions():
  labels, logits = np.array([0, 1, 1, 0]), np.tile([0.0, 5.0], (4, 1))
  got = metrics.compute(('matthews', 'f1', 'accuracy'), labels, logits, 'single')
  assert got == {'matthews': 0.0, 'f1': pytest.approx(2 / 3), 'accuracy': 0.5}
  none = metrics.compute(('f1',), labels, -logits, 'single')
  assert none == {'f1': 0.0}


@given(st.integers(0, 10_000), st.integers(3, 30))
def test_correlations(seed, n):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 6, n).astype(np.float32)  # with ties, as similarity scores have
  logits = rng.normal(size=(n, 1)).astype(np.float32)
  got = metrics.compute(('pearson', 'spearman'), labels, logits, 'regression')

  def pearson(x, y):
    mx, my = sum(x) / n, sum(y) / n
    xy = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return xy / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))

  def ranks(x):
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]

  x, y = logits[:, 0].tolist(), labels.tolist()
  if len(set(y)) == 1:
    assert got == {'pearson': None, 'spearman': None}
  else:
    assert got['pearson'] == pytest.approx(pearson(x, y), abs=1e-9)
    assert got['spearman'] == pytest.approx(pearson(ranks(x), ranks(y)), abs=1e-9)


@pytest.mark.parametrize('labels, logits', [([1, 2, 3], [4, 4, 4]), ([2, 2], [1, 3]), ([1], [2])])
def test_a_correlation_that_does_not_exist_is_none(labels, logits):
  logits = np.array(logits, np.float32)[:, None]
  got = metrics.compute(('pearson', 'spearman'), np.array(labels, np.float32), logits, 'regression')
  assert got == {'pearson': None, 'spearman': None}


@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(1, 20))
def test_multi_label_metrics(seed, classes, n):
  rng = np.random.default_rng(seed)
  labels = rng.integers(0, 2, (n, classes)).astype(np.float32)
  logits = rng.normal(size=(n, classes)).astype(np.float32)
  got = metrics.compute(metrics.KINDS['multi'], labels, logits, 'multi')
  present = logits > 0
  each = [counts(labels[:, c], present[:, c], 1) for c in range(classes)]
  assert got['accuracy'] == pytest.approx(sum(all(labels[i] == present[i]) for i in range(n)) / n)
  assert got['f1_macro'] == got['f1'] == pytest.approx(sum(f1_of(*e) for e in each) / classes)
  assert got['f1_micro'] == pytest.approx(f1_of(*map(sum, zip(*each, strict=True))))


@pytest.mark.parametrize(
  'names, labels, logits, kind, part',
  [
    (('accuracy',), np.zeros(0, int), np.zeros((0, 2)), 'single', 'no rows'),
    (('accuracy',), np.zeros(3, int), np.zeros((2, 2)), 'single', 'do not fit'),
    (('accuracy',), np.zeros((2, 3)), np.zeros((2, 2)), 'multi', 'do not fit'),
    (('pearson',), np.zeros(2), np.zeros((2, 2)), 'regression', 'do not fit'),
    (('pearson',), np.zeros(2, int), np.zeros((2, 2)), 'single', 'metrics'),
    (('accuracy',), np.zeros(2, int), np.array([[0, 1], [np.nan, 0]]), 'single', 'finite'),
  ],
)
def test_refuses_what_it_cannot_score(names, labels, logits, kind, part):
  with pytest.raises(ValueError, match=part):
    metrics.compute(names, labels, logits, kind)
