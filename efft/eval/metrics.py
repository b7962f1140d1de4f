"""Scores of gathered predictions, computed on host arrays by scikit-learn and scipy.

Shapes, by the kind of the problem (N examples, C classes):

    kind        labels             logits
    single      [N] int            [N, C]    class = argmax
    multi       [N, C] 0 or 1      [N, C]    class present = logit > 0, a probability above 1/2
    regression  [N] float          [N, 1]    the prediction itself

A score that does not exist is None, which JSON writes as null: a correlation where predictions or
labels are constant, or of fewer than two rows. None is worse than any number when runs are
compared. The Matthews correlation of constant predictions is 0, as in GLUE.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats
from sklearn import metrics as sk

BINS = 15  # of the calibration error; Guo et al. 2017 (arXiv 1706.04599) report with 15

Metric = Callable[[np.ndarray, np.ndarray], float | None]


def accuracy(labels, logits):
  """Share of right rows; for several labels at once a row is right when all of its labels are."""
  return float(sk.accuracy_score(labels, _classes(logits, labels)))


def f1(labels, logits):
  """F1 of class 1 where there are two classes, else the mean over classes (`f1_macro`)."""
  if labels.ndim == 2 or logits.shape[1] > 2:
    return f1_macro(labels, logits)
  return float(sk.f1_score(labels, _classes(logits, labels), pos_label=1, zero_division=0.0))


def f1_macro(labels, logits):
  """Mean of the F1 of each class; single: of the classes among labels or predictions."""
  predicted = _classes(logits, labels)
  return float(sk.f1_score(labels, predicted, average='macro', zero_division=0.0))


def f1_micro(labels, logits):
  """F1 over all decisions pooled; for one label a row this is the accuracy."""
  predicted = _classes(logits, labels)
  return float(sk.f1_score(labels, predicted, average='micro', zero_division=0.0))


def matthews(labels, logits):
  """Matthews correlation coefficient, in [-1, 1]; 0 where labels or predictions are constant."""
  predicted = _classes(logits, labels)
  if np.ptp(labels) == 0 or np.ptp(predicted) == 0:
    return 0.0  # scikit-learn's answer too, but it warns
  return float(sk.matthews_corrcoef(labels, predicted))


def pearson(labels, logits):
  """Linear correlation with the labels, or None where one side is constant."""
  return _correlation(stats.pearsonr, labels, logits)


def spearman(labels, logits):
  """Rank correlation with the labels, or None where one side is constant."""
  return _correlation(stats.spearmanr, labels, logits)


def ece(labels, logits):
  """Expected calibration error (Naeini et al. 2015): sum_b |B_b| / N * |acc(B_b) - conf(B_b)|.

  The confidence is the largest softmax probability; bins are `BINS` equal widths (l, r] of (0, 1].
  """
  logits = logits.astype(np.float64)
  p = np.exp(logits - logits.max(axis=1, keepdims=True))
  p /= p.sum(axis=1, keepdims=True)
  confidence, right = p.max(axis=1), p.argmax(axis=1) == labels
  edges = np.linspace(0, 1, BINS + 1)
  bins = np.clip(np.searchsorted(edges, confidence, side='left') - 1, 0, BINS - 1)
  gap = np.bincount(bins, weights=right - confidence, minlength=BINS)
  return float(np.abs(gap).sum() / len(labels))


METRICS: dict[str, Metric] = {
  m.__name__: m for m in (accuracy, f1, f1_macro, f1_micro, matthews, pearson, spearman, ece)
}
KINDS = {
  'single': ('accuracy', 'f1', 'f1_macro', 'f1_micro', 'matthews', 'ece'),
  'multi': ('accuracy', 'f1', 'f1_macro', 'f1_micro'),
  'regression': ('pearson', 'spearman'),
}


def compute(names: Sequence[str], labels, logits, kind: str) -> dict[str, float | None]:
  """{name: score} in the order of `names`; shapes as in the head of this module.

  Raises:
    ValueError: no rows, shapes that do not fit, logits that are not finite, a name that `kind` does
      not have. All of them are caught earlier in a run, so none is an InputError.
  """
  labels, logits = np.asarray(labels), np.asarray(logits)
  if not len(labels):
    raise ValueError('no rows to score')
  fits = labels.shape == (logits.shape if kind == 'multi' else logits.shape[:1])
  if logits.ndim != 2 or not fits or (kind == 'regression' and logits.shape[1] != 1):
    raise ValueError(f'labels {labels.shape} and logits {logits.shape} do not fit kind {kind!r}')
  if not np.isfinite(logits).all():
    raise ValueError('logits that are not finite')
  wrong = [name for name in names if name not in KINDS[kind]]
  if wrong:
    raise ValueError(f'metrics {wrong} for kind {kind!r}, which has {KINDS[kind]}')
  if kind == 'multi':
    labels = labels.astype(np.int32)  # scikit-learn takes float indicators for continuous targets
  return {name: METRICS[name](labels, logits) for name in names}


def _classes(logits, labels):
  return (logits > 0).astype(np.int32) if labels.ndim == 2 else logits.argmax(axis=1)


def _correlation(fn, labels, logits):
  x, y = logits[:, 0].astype(np.float64), labels.astype(np.float64)
  if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return None
  return float(fn(x, y)[0])
