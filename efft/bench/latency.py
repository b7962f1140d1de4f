"""How long a model takes on this device, by batch, length and precision.

The protocol: the program is compiled (and that is timed, without programs kept on disk), called
until it gets no faster, then called for a given time; each call is timed until its result is there.
Texts are random tokens of exactly the length asked for, on one device, where they lie already:
tokenising and copying are not in the times.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from efft import bundle, cpu, merging, mesh, pipeline, quantize, tree
from efft.classifier import Classifier
from efft.errors import InputError, nearest
from efft.models import quantized
from efft.models.encoder import EncoderConfig
from efft.peft import base as peft
from efft.programs import memory
from efft.qtensor import QTensor

PRECISIONS = {'f32': 'float32', 'bf16': 'bfloat16', 'int8': 'float32'}
LENGTHS = (32, 128, 512)
# Calls in each of the two halves that are compared to see whether it still gets faster; calls that
# are timed, however long they take.
WINDOW, LEAST = 3, 5
NO_BFLOAT16 = 'no bfloat16 instructions on this processor: float32 is faster'

Cell = tuple[int, int, str]  # batch, length, precision


def timed(
  fn: Callable, seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
  """Seconds of each call of `fn`, after calls that do not count.

  Args:
    fn: () -> arrays, compiled.
    seconds: for how long it is called, and the longest that warming up goes on; there are `LEAST`
      calls or more, whatever they take.
    clock: () -> seconds.

  Warm is what gets no faster: the median of the last `WINDOW` calls is at least 95 % of that of as
  many before.
  """

  def once() -> float:
    start = clock()
    jax.block_until_ready(fn())
    return clock() - start

  begin, warming = clock(), [once()]
  while not _steady(warming) and clock() - begin < seconds:
    warming.append(once())
  begin, taken = clock(), []
  while len(taken) < LEAST or clock() - begin < seconds:
    taken.append(once())
  return taken


def _steady(taken: Sequence[float]) -> bool:
  if len(taken) < 2 * WINDOW:
    return False
  before, last = taken[-2 * WINDOW : -WINDOW], taken[-WINDOW:]
  return np.median(last) >= 0.95 * np.median(before)


def summary(taken: Sequence[float], batch: int) -> dict[str, float]:
  """Percentiles in milliseconds (between two calls, linear), examples a second, and how many calls
  they are of."""
  p50, p95, p99 = (float(f'{1000 * x:.4g}') for x in np.percentile(taken, (50, 95, 99)))
  rate = float(f'{batch * len(taken) / sum(taken):.4g}')
  times = {'p50_ms': p50, 'p95_ms': p95, 'p99_ms': p99, 'examples_per_second': rate}
  return {**times, 'repeats': len(taken)}


def cells(
  content: bundle.Bundle, batches: Iterable[int], lengths: Iterable[int] | None,
  precisions: Iterable[str],
) -> list[Cell]:  # fmt: skip
  """All combinations, checked; without lengths, those of `LENGTHS` that the encoder has positions
  for (its longest, where it has for none of them).

  Raises InputError for numbers below 1, unknown precisions, and lengths beyond the positions.
  """
  most = EncoderConfig.from_dict(content.encoder).max_length
  if lengths is None:
    lengths = [n for n in LENGTHS if n <= most] or [most]
  found = [(b, n, p) for p in precisions for n in lengths for b in batches]
  check(content, found)
  return found


def check(content: bundle.Bundle, asked: Iterable[Cell]) -> None:
  """Raises InputError for what `cells` would not give."""
  most = EncoderConfig.from_dict(content.encoder).max_length
  for batch, length, precision in asked:
    for flag, value in (('--batch', batch), ('--length', length)):
      if not isinstance(value, int) or value < 1:
        raise InputError(flag, repr(value), 'a whole number from 1', 'correct it')
    if length > most:
      expected = f'at most {most}, the positions of this encoder'
      raise InputError('--length', length, expected, f'pass --length={most}')
    if precision not in PRECISIONS:
      close = nearest(str(precision), PRECISIONS)
      fix = f'did you mean {close}?' if close else 'choose among them'
      raise InputError('--precision', repr(precision), f'one of {", ".join(PRECISIONS)}', fix)


def measure(
  content: bundle.Bundle, where: str, asked: Iterable[Cell], *, merged: bool = False,
  seconds: float = 2.0, clock: Callable[[], float] = time.perf_counter,
  announce: Callable[[int], None] = lambda rows: None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
  """A row for each cell, as it is measured; those of a precision follow each other.

  Args:
    content: the bundle; its deltas act beside the weights, as they do when it predicts, but for
      int8, where they are folded in before rounding if their method allows that.
    where: how errors call it.
    asked: (batch, length, precision). 'int8' are kernels and large tables in int8, with the inputs
      of products rounded by token as they come. A bundle that holds int8 (or fewer bits) already
      stays what it is: one row a batch and length, which says so.
    merged: fold deltas into the weights first.
    seconds, clock: see `timed`.
    announce: told how many rows there will be, before the first.

  Yields:
    {'batch', 'length', 'precision', 'p50_ms', 'p95_ms', 'p99_ms', 'examples_per_second', 'repeats',
    'compile_seconds', 'memory_mb' (arguments and temporaries of the program)}, and where it matters
    'merged': True and a 'note'.

  Raises:
    InputError: as `cells`; deltas that do not merge; a length that is too long together with what
      the method adds to the text.
  """
  asked = list(asked)
  check(content, asked)
  if merged:
    content = merging.merged(content)
  forms: dict[str, list[Cell]] = {}
  for cell in asked:
    forms.setdefault(cell[2], []).append(cell)
  if held := _held(content):
    # Once, whatever was asked for.
    forms = {held: list(dict.fromkeys((b, n, held) for b, n, _ in asked))}
  announce(sum(map(len, forms.values())))
  cfg = EncoderConfig.from_dict(content.encoder)
  for precision, own in forms.items():
    form, note = _form(content, precision, bool(held))
    model = Classifier.of(form, where, devices=1)
    if quantized.slowed(model.variables):
      note = '; '.join(filter(None, [note, quantized.NO_INTEGERS]))
    for length in dict.fromkeys(length for _, length, _ in own):
      try:
        jax.eval_shape(model.apply, model.variables, texts(cfg, 1, length))
      except InputError as error:  # prompts stand before the text
        raise InputError('--length', error.found, error.expected, 'pass a shorter one') from None
    extras = ({'merged': True} if merged else {}) | ({'note': note} if note else {})
    for batch, length, _ in own:
      placed = mesh.put_batch(texts(cfg, batch, length), model.devices)
      with _nothing_kept():
        begin = clock()
        program = model.apply.lower(model.variables, placed).compile()
        compiling = clock() - begin
      taken = timed(lambda p=program, x=placed, v=model.variables: p(v, x), seconds, clock)
      size = memory(program)
      yield {
        'batch': batch, 'length': length, 'precision': precision, **summary(taken, batch),
        'compile_seconds': round(compiling, 3),
        'memory_mb': None if size is None else round(size / 1e6, 3),
        **extras,
      }  # fmt: skip


def texts(cfg: EncoderConfig, batch: int, length: int) -> dict[str, np.ndarray]:
  """A batch of random tokens, none of them padding: what `Classifier.apply` takes."""
  draw = np.random.default_rng(0).integers(1, max(cfg.vocab_size, 2), (batch, length))
  return {
    'input_ids': np.int32((cfg.pad_id + draw) % cfg.vocab_size),
    'mask': np.ones((batch, length), bool),
    'token_types': np.zeros((batch, length), np.int32),
    'weights': np.ones(batch, np.float32),
  }


def _held(content: bundle.Bundle) -> str:
  """What most matrices of a bundle are held in; '' for floats."""
  leaves = pipeline.alone(content).leaves if content.quantize else content.leaves
  codes = [x.codes for x in leaves.values() if isinstance(x, QTensor)]
  return max(set(codes), key=codes.count) if codes else ''


def _form(content: bundle.Bundle, precision: str, held: bool) -> tuple[bundle.Bundle, str]:
  """The bundle in a precision, and what should be known of it."""
  on_cpu = jax.default_backend() == 'cpu'
  if held:
    return content, f'the bundle holds {precision}: as it is'
  if precision != 'int8':
    plain = precision == 'bf16' and on_cpu and not cpu.multiplies_bfloat16()
    note = NO_BFLOAT16 if plain else ''
    return dataclasses.replace(content, dtype=PRECISIONS[precision]), note
  fixed = peft.fixed(peft.build(content.method))
  whole = pipeline.alone(content) if fixed else merging.merged(content)
  beside = f'{", ".join(fixed)} does not merge: float, beside int8' if fixed else ''
  return rounded(whole), beside


def rounded(whole: bundle.Bundle) -> bundle.Bundle:
  """A bundle that stands alone, with kernels and large tables in int8."""
  params = {path: x for path, x in whole.leaves.items() if path.startswith('params/')}
  values = tree.unflatten(params)
  if not quantize.held(values):
    params = tree.flatten(quantize.quantized(values, 'int8', '--precision'))
  return dataclasses.replace(whole, leaves={**whole.leaves, **params}, dtype=PRECISIONS['int8'])


def described(row: Mapping[str, Any]) -> str:
  """'batch 8, length 128, f32: 12.3 ms'."""
  cell = f'batch {row["batch"]}, length {row["length"]}, {row["precision"]}'
  return f'{cell}: {row["p50_ms"]:g} ms'


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
  """Without the programs that jax keeps on disk: reading one is not compiling it."""
  before = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', before)
    compilation_cache.reset_cache()
