"""A bundle, ready to classify."""

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from efft import assemble, bundle, mesh, starting, transfer, tree
from efft.data import batches, tokens
from efft.data.splits import Split
from efft.errors import InputError
from efft.eval import evaluate
from efft.models import hub, quantized
from efft.models.encoder import EncoderConfig, init_params
from efft.training import step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Texts -> logits or records.

  Attributes:
    bundle: what was read.
    labels: class names in the order of the logits; () for regression.
  """

  bundle: bundle.Bundle
  tokenizer: Any
  variables: dict
  apply: Callable
  devices: Any
  batch_size: int = 64

  @property
  def labels(self) -> tuple[str, ...]:
    return self.bundle.labels

  @classmethod
  def load(cls, folder, *, devices: int | None = None) -> 'Classifier':
    """Reads a run folder or a bundle, and its base model where it needs one.

    Warns where it holds integers that this processor multiplies as floats.

    Raises:
      InputError: no bundle, a damaged one, or a base model that is not the one trained on.
    """
    model = cls.of(bundle.load(folder), str(folder), devices=devices)
    if quantized.slowed(model.variables):
      log.warning('note: %s: %s', folder, quantized.NO_INTEGERS)
    return model

  @classmethod
  def of(cls, content: bundle.Bundle, where: str, *, devices: int | None = None) -> 'Classifier':
    """The classifier of a bundle in memory, which errors call `where`."""
    cfg = EncoderConfig.from_dict(content.encoder)
    net = assemble.network(cfg, content.method, content.dtype)
    params = starting.pretrained(content) if content.needs_base else {}
    variables = transfer.restored(net.deltas, content.leaves, params, content.quantize)
    expected = jax.eval_shape(lambda key: init_params(cfg, key), jax.random.key(0))
    if difference := tree.diff(expected, variables['params']):
      raise InputError(
        where, 'other weights than its encoder has:\n' + difference, 'a whole bundle',
        'train again, or restore it from a copy',
      )  # fmt: skip
    devices = mesh.make(devices)
    variables = step.cast_frozen(variables, assemble.DTYPES[content.dtype])
    tokenizer = hub.tokenizer_from(content.tokenizer)
    apply = jax.jit(net.logits)
    return cls(content, tokenizer, mesh.place(variables, devices), apply, devices)

  def logits(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
    """float32 [N, C] (regression: [N, 1])."""
    rows = np.arange(1, len(texts) + 1)
    split = Split(list(texts), None if pairs is None else list(pairs), None, rows, 'texts')
    encoded = tokens.encode(split, self.tokenizer, self.bundle.max_length)
    size = min(self.batch_size, 1 << (len(texts) - 1).bit_length())

    def predicted(size):
      rows = batches.evaluation(encoded, size)
      return evaluate.predict(self.apply, self.variables, rows, self.devices)

    return evaluate.in_memory(predicted, size, self.devices.size)[0]

  def __call__(self, texts: Sequence) -> list[dict]:
    """One record a text; see `efft.run.predict`. A text is a string, or a (text, pair) tuple."""
    if not texts:
      return []
    wants_pairs = 'pair' in self.bundle.columns
    for number, text in enumerate(texts, 1):
      good = isinstance(text, str) if not wants_pairs else (
        isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(t, str) for t in text)
      )  # fmt: skip
      if not good:
        expected, fix = 'a string', 'correct it'
        if wants_pairs:
          expected = 'a (text, pair) tuple of strings'
          fix = 'correct it; on the command line, pass --input=FILE with a column for each'
        raise InputError(f'text {number}', repr(text)[:80], expected, fix)
    first, second = zip(*texts, strict=True) if wants_pairs else (texts, None)
    logits = self.logits(first, second)
    shown = [{'text': text} for text in first]
    if second is not None:
      shown = [{**record, 'pair': pair} for record, pair in zip(shown, second, strict=True)]
    return [{**r, **self._record(y)} for r, y in zip(shown, logits, strict=True)]

  def _record(self, logits: np.ndarray) -> dict:
    kind = self.bundle.kind
    if kind == 'regression':
      return {'score': round(float(logits[0]), 6)}
    y = logits.astype(np.float64)
    if kind == 'multi':
      p = 1 / (1 + np.exp(-y))
    else:
      p = np.exp(y - y.max())
      p /= p.sum()
    scores = {name: round(float(v), 6) for name, v in zip(self.labels, p, strict=True)}
    if kind == 'multi':
      return {'labels': [n for n, v in zip(self.labels, y, strict=True) if v > 0], 'scores': scores}
    best = self.labels[int(p.argmax())]
    return {'label': best, 'score': scores[best], 'scores': scores}


def chunks(items: Iterable, most: int) -> Iterator[list]:
  """Lists of up to `most` items: what has arrived by the time that the last list is done with.

  A pipe that delivers a line now and then is answered line by line, a file in full batches.
  """
  if isinstance(items, Sequence):
    yield from (list(items[i : i + most]) for i in range(0, len(items), most))
    return
  waiting: queue.Queue = queue.Queue(maxsize=4 * most)
  end = object()

  def read():
    try:
      for item in items:
        waiting.put((item, None))
      waiting.put((end, None))
    except BaseException as error:
      waiting.put((end, error))

  threading.Thread(target=read, daemon=True).start()
  while True:
    chunk, (item, error) = [], waiting.get()
    while item is not end:
      chunk.append(item)
      if len(chunk) == most or waiting.empty():
        break
      item, error = waiting.get()
    if chunk:
      yield chunk
    if item is end:
      if error is not None:
        raise error
      return
