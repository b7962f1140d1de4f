"""Codes of a kernel rounded one row after the other, the rest making up for each.

GPTQ (Frantar et al. 2022, https://arxiv.org/abs/2210.17323). Kernels here are [d_in, d_out], the
transpose of the paper's: K inputs, N outputs, one input a step.
"""

from collections.abc import Callable

import numpy as np

from efft import qtensor


def gptq(
  w, h, codes: str, block: int = 0, scales: Callable = qtensor.scales,
  dampening: float = 0.01, lazy: int = 128,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
  """Codes with a small ||X W - X Q||.

  With U^T U = (h + damping I)^-1, U upper triangular, input i gets its nearest codes q, and
  W[i + 1:] -= U[i, i + 1:]^T (w_i - q) / U[i, i]: the least squares answer of the inputs that are
  still float. The scales of a block are set when its first input is reached, from its rows as
  updated by then; one scale for all inputs is set by the kernel as given.

  Deviations: for each output, the nearest codes of the kernel as given are taken instead where
  their error is smaller, so no output is worse than by rounding. Weights of inputs that are always
  0 are rounded, not set to 0. No order by activation.

  AdaRound (Nagel et al. 2020, https://arxiv.org/abs/2004.10568) minimises the same error by
  thousands of gradient steps for each layer, and may only round up or down.

  Args:
    w: float [K, N].
    h: [K, K], 2 X^T X.
    codes: 'int8', 'int4' or 'nf4'.
    block: inputs that share a scale; 0: all.
    scales: (w, codes) -> float32 [1, N], for the inputs of a block.
    dampening: what is added to h's diagonal, as a share of its mean; above 0.
    lazy: inputs between two updates of the whole of W; the result does not depend on it.

  Returns:
    (int8 [K, N] codes, one a byte, float32 [K / block, N] scales).

  Raises:
    ValueError: sizes that do not fit, numbers that are not finite.
  """
  start, h = np.asarray(w, np.float32), np.asarray(h, np.float64)
  inputs, outputs = start.shape
  size = block or inputs
  if inputs % size:
    raise ValueError(f'{inputs} inputs, which are not cut into blocks of {size}')
  if h.shape != (inputs, inputs):
    raise ValueError(f'{inputs} inputs with H of {h.shape}')
  if not (np.isfinite(h).all() and np.isfinite(start).all()):
    raise ValueError('numbers that are not finite')
  w, u = start.astype(np.float64), _factor(h, dampening)
  lazy = max(size, lazy - lazy % size) if block else lazy
  found = np.empty((inputs, outputs), np.int8)
  used = np.empty((inputs // size, outputs), np.float32)
  for first in range(0, inputs, lazy):
    last = min(first + lazy, inputs)
    off = np.empty((last - first, outputs))
    for i in range(first, last):
      if i % size == 0:
        used[i // size] = scales(w[i : i + size].astype(np.float32), codes)
      scale = used[i // size][None]
      found[i] = qtensor.encode(w[i][None], codes, scale)
      off[i - first] = (w[i] - qtensor.values(found[i][None], codes, scale)[0]) / u[i, i]
      w[i + 1 : last] -= np.outer(u[i, i + 1 : last], off[i - first])
    w[last:] -= u[first:last, last:].T @ off
  given = np.concatenate([scales(part, codes) for part in start.reshape(-1, size, outputs)])
  plain = qtensor.encode(start, codes, given)
  worse = _errors(start, found, codes, used, h) > _errors(start, plain, codes, given, h)
  return np.where(worse, plain, found), np.where(worse, given, used)


def _factor(h: np.ndarray, dampening: float) -> np.ndarray:
  """U [K, K]."""
  # Inputs that are all 0 leave nothing to make up for.
  damping = dampening * (np.trace(h) / len(h) or 1.0)
  inverse = np.linalg.inv(h + damping * np.eye(len(h)))
  return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _errors(w, found, codes: str, scale, h) -> np.ndarray:
  """[N]: 2 ||X w - X q||^2 of each output."""
  off = qtensor.values(found, codes, scale) - w
  return np.einsum('kn,kn->n', off, h @ off)
