"""Logits of a whole split, in order, from padded batches on any mesh; and what they score."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import numpy as np

from efft import mesh as meshes
from efft.errors import EnvironmentProblem, out_of_memory
from efft.eval import metrics

log = logging.getLogger(__name__)


def predict(logits: Callable, variables, batches: Iterable[Mapping], mesh) -> np.ndarray:
  """float32 [N, C] in the order of the rows.

  Args:
    logits: jitted (variables, batch) -> [B, C].
    variables: what the model applies, placed on the mesh.
    batches: dictionaries with 'rows' (the number of each example) and 'weights' (0 for padding);
      every host sees the same ones.
    mesh: from `efft.mesh.make`.
  """
  rows, scores = [], []
  for batch in batches:
    real = batch['weights'] > 0
    inputs = {name: batch[name] for name in ('input_ids', 'mask', 'token_types', 'weights')}
    y = logits(variables, meshes.put_batch(inputs, mesh))
    rows.append(batch['rows'][real])
    scores.append((y, real))
  # Fetched after the loop: the device is never kept waiting for the host.
  scores = [meshes.gather(y)[: len(real)][real] for y, real in scores]
  return np.concatenate(scores)[np.argsort(np.concatenate(rows))].astype(np.float32)


def in_memory(
  predict: Callable[[int], np.ndarray], size: int, least: int
) -> tuple[np.ndarray, int]:
  """`predict` with as many rows at once as memory has room for: (what it gives, how many).

  Args:
    predict: takes how many rows go into a batch.
    size: to begin with; half as many each time that memory runs out.
    least: where that ends: a row for each device.

  Raises:
    EnvironmentProblem: there is no room for the least.
  """
  while True:
    try:
      return predict(size), size
    except (MemoryError, RuntimeError) as error:
      if not out_of_memory(error) or jax.process_count() > 1:
        raise  # several hosts have to do the same
      if size <= least:
        raise EnvironmentProblem(
          f'out of memory in an evaluation of {size} examples; lower config.model.max_length'
        ) from None
    # Outside of the handler, whose traceback keeps the arrays of the failed attempt alive.
    size = max(least, size // 2)
    log.warning('out of memory: going on with evaluations of %d examples at once', size)


def score(
  names: Sequence[str], loss: Callable, labels: np.ndarray, logits: np.ndarray, kind: str
) -> dict[str, float]:
  """The metrics and the mean loss; NaN where a metric does not exist."""
  if not np.isfinite(logits).all():
    return {name: float('nan') for name in (*names, 'loss')}
  values = metrics.compute(names, labels, logits, kind)
  values = {name: float('nan') if value is None else value for name, value in values.items()}
  return {**values, 'loss': float(np.mean(jax.device_get(loss(logits, labels))))}
