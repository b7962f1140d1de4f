"""Stages that hold matrices in few bits: {'fn': 'quant.quantize', 'format': 'int8'}.

Nothing is trained. Dynamic int8 looks at no example; static ranges, smoothing and GPTQ are made
from what the linear layers read on some of the training split.
"""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np

from efft import qtensor, tree
from efft import quantize as matrices
from efft.compress import calibrate
from efft.compress.base import Prune, Smaller, Subject
from efft.compress.rounding import gptq
from efft.errors import nearest
from efft.formats import FLOAT, FORMATS, Format
from efft.models import quantized

log = logging.getLogger(__name__)

WHERE = 'quant.quantize'
NORMED = r'.*/(attention/(query|key|value)|mlp/up)/kernel'


def quantize(
  format: str = 'int8', rules: tuple = (), ranges: str = 'minmax', percentile: float = 99.99,
  weights: str = 'max', smooth: float = 0.0, groups: int = 1, symmetric: bool = True,
  rounding: str = 'nearest', examples: int = 128, smooth_at: str = NORMED,
) -> Prune:  # fmt: skip
  """Kernels and large tables of embeddings in a format.

  All layers are calibrated in one pass of the float model. (GPTQ's authors quantise a block and
  then let the next one see its outputs, a pass for each.) Deltas that have not been folded in stay
  float and act while the ranges are seen; to quantise the sum of both, put 'prune.merge' before.
  Matrices that are quantised already are made float first, and stay so where the format is 'float';
  those that nothing here names keep theirs.

  Args:
    format: int8, int8_static, int8_weight, int4, nf4 (`efft.formats`), of kernels that `rules` do
      not name, or 'float'; large tables are int8 then. '': `rules` say it all.
    rules: (path regex, format) pairs that come before those of `format`: mixed precision.
    ranges: of static inputs: minmax, percentile, mse (`efft.compress.calibrate`).
    percentile: of a hundred.
    weights: max, or mse: the largest number of each range, or the least squared error.
    smooth: SmoothQuant's alpha, 0.5 in the paper; 0: no smoothing. For inputs that become integers.
    groups: ranges of static inputs in each layer, sorted by size; they have to divide its width.
    symmetric: whether the ranges of static inputs are.
    rounding: nearest or gptq (`efft.compress.rounding`), of kernels.
    examples: of the training split, to calibrate with, and to say by how much each layer's output
      is off. 0: none, where nothing is calibrated.
    smooth_at: regex of the kernels that are smoothed. By default those that read what comes from a
      norm, as in the paper: of the inputs of `mlp/down`, most of which are near 0, division makes
      the rare large ones small, and rounding costs more than before.
  """
  setting = matrices.rules(rules)
  names = [name for _, name in setting] + [format] * bool(format)
  setting += matrices.rules(format) if format else ()
  known = (*FORMATS, FLOAT)
  for what, given, able in (
    *(('format', name, known) for name in names),
    ('ranges', ranges, calibrate.RANGES), ('weights', weights, ('max', 'mse')),
    ('rounding', rounding, ('nearest', 'gptq')),
  ):  # fmt: skip
    if given not in able:
      close = nearest(str(given), able)
      meant = f'; did you mean {close}?' if close else ''
      raise ValueError(f'{what} {given!r}, one of {", ".join(able)}{meant}')
  kinds = {FORMATS[name].inputs for name in names if name != FLOAT}
  if not 0 <= smooth <= 1 or not 50 < percentile <= 100 or groups < 1 or examples < 0:
    raise ValueError(
      f'smooth {smooth}, percentile {percentile}, groups {groups} or examples {examples}: '
      'from 0 to 1, above 50 to 100, 1 or more, 0 or more'
    )
  try:
    smoothed = re.compile(smooth_at)
  except re.error as error:
    raise ValueError(f'smooth_at {smooth_at!r}, no regular expression: {error}') from None
  if smooth and kinds <= {'float'}:
    raise ValueError(f'smooth {smooth} with formats whose inputs stay float')
  if 'static' not in kinds and (groups > 1 or not symmetric or ranges != 'minmax'):
    raise ValueError('ranges, groups or asymmetry of inputs with no int8_static among the formats')
  if not examples and (smooth or 'static' in kinds or rounding == 'gptq'):
    raise ValueError('examples 0, and smoothing, static ranges and gptq want some')

  def act(subject: Subject) -> Smaller:
    found = matrices.formats({'params': subject.variables['params']}, setting, WHERE)
    named = tree.labels({'params': subject.variables['params']}, setting, WHERE, default='')
    start = _floats(subject.variables, {path for path, name in named.items() if name})
    paths = {path: _linear(path) for path in found if path.endswith('/kernel')}
    if smooth and not any(map(smoothed.fullmatch, paths)):
      raise ValueError(f'smooth_at {smooth_at!r} matches none of {", ".join(paths)}')
    seen = {}
    if examples and paths:
      given = dataclasses.replace(subject, variables=start)
      seen = calibrate.observe(given, paths.values(), hessians=rounding == 'gptq')

    def scales(w, codes, block=0, axis=0):
      return calibrate.scales(w, codes, block, axis, weights)

    def make(path: str, w: np.ndarray, form: Format) -> qtensor.QTensor:
      if path not in paths:
        return matrices.plain(path, w, form, scale=scales(w, form.codes, form.block, 1))
      inputs, fields = seen.get(paths[path]), {}
      if smooth and form.inputs != 'float' and smoothed.fullmatch(path):
        fields['smooth'] = calibrate.smoothing(inputs, w, smooth)
        inputs, w = inputs.divided(fields['smooth']), w * fields['smooth'][:, None]
      if form.inputs == 'static':
        fields |= calibrate.static(inputs, ranges, groups, symmetric, percentile)
      if 'order' in fields:
        inputs, w = inputs.picked(fields['order']), w[fields['order']]
      if rounding == 'gptq':
        codes, scale = gptq(w, inputs.hessian, form.codes, form.block, scales)
      else:
        scale = scales(w, form.codes, form.block)
        codes = qtensor.encode(w, form.codes, scale)
      fields |= {'inputs': form.inputs, 'stochastic': form.stochastic}
      made = qtensor.from_codes(codes, form.codes, scale, **fields)
      made.check()
      return made

    values = matrices.quantized(start, setting, WHERE, make)
    if quantized.slowed(values):
      log.info('note: %s', quantized.NO_INTEGERS)
    for line in matrices.summary(values):
      log.info('%s', line)
    _say(start, values, seen)
    return Smaller(variables=values)

  return Prune(act, examples)


def floats() -> Prune:
  """All matrices in float32 again: what was lost stays lost."""

  def act(subject: Subject) -> Smaller:
    return Smaller(variables=matrices.floats(subject.variables))

  return Prune(act)


def off(before: dict, after: dict, seen: dict) -> dict[str, float]:
  """||x Q - x W|| / ||x W|| of each linear layer on the inputs that it was seen to have.

  Args:
    before, after: variables with float matrices and with quantised ones.
    seen: of `calibrate.observe`.

  Returns:
    {'layer_0/mlp/up': error}; 0 where x W is 0.
  """
  old, new = tree.flatten(before['params']), tree.flatten(after['params'])
  found = {}
  for path, inputs in seen.items():
    w, q = (leaves[f'{path}/kernel'] for leaves in (old, new))
    if isinstance(q, qtensor.QTensor):
      found[path] = float(_off(inputs.rows, jnp.asarray(w), q))
  return found


@jax.jit
def _off(x, w, q):
  axes = (((1,), (0,)), ((), ()))
  right, wrong = (quantized.dot_general(x, kernel, axes) for kernel in (w, q))
  size = jnp.linalg.norm(right)
  return jnp.where(size > 0, jnp.linalg.norm(wrong - right) / size, 0.0)


def _say(before: dict, after: dict, seen: dict) -> None:
  """A line for each layer: by how much the outputs of its linears are off."""
  lines = {}
  for path, error in off(before, after, seen).items():
    layer, _, name = path.partition('/')
    lines.setdefault(layer, []).append(f'{name or layer} {error:.2%}')
  for layer, errors in lines.items():
    log.info('%s, outputs off by: %s', layer, ', '.join(errors))


def _floats(variables: dict, paths) -> dict:
  """Variables with the matrices at `paths` in float."""

  def visit(path, x):
    again = path in paths and isinstance(x, qtensor.QTensor)
    return qtensor.dequantize(x) if again else x

  return tree.map_paths(visit, variables)


def _linear(path: str) -> str:
  return re.sub('^params/|/kernel$', '', path)
