"""Which matrices are held in which format: (path regex, format) rules, the first that matches wins.

    config.model.quantize = 'int8'                     # frozen base: kernels and word embeddings
    config.model.quantize = (
      (r'params/layer_5/mlp/.*/kernel', 'float'),      # but not the last feed-forward block of six
      (KERNELS, 'int8'),
    )

What no rule names stays in float: norms, biases, the head, sums and softmax have no format at all.
With numpy alone, so that the integers do not depend on the device.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from efft import tree
from efft.errors import InputError, unknown
from efft.formats import FLOAT, FORMATS, Format
from efft.qtensor import QTensor, dequantize, quantize

WHERE = 'config.model.quantize'
KERNELS = r'params/layer_\d+/(attention/(query|key|value|out)|mlp/(up|down))/kernel'
TABLES = r'params/embed/(word|position)/embedding'


def rules(setting: str | Sequence) -> tuple[tuple[str, str], ...]:
  """The rules of a format's name: kernels in it, large tables in int8; rules as they are."""
  if not isinstance(setting, str):
    return tuple((pattern, name) for pattern, name in setting)
  return ((KERNELS, setting), (TABLES, 'int8'))


def formats(params: Mapping, setting: str | Sequence, where: str = WHERE) -> dict[str, str]:
  """{path: format} of the matrices that the rules name, float ones left out.

  Args:
    params: {'params': ...}: arrays, QTensors, or shapes.
    setting: a format's name, or rules.
    where: how errors call them.

  Raises:
    InputError: an unknown format, a rule that is first for nothing, or one for something that no
      format takes.
  """
  given = rules(setting)
  for _, name in given:
    if name not in (*FORMATS, FLOAT):
      raise unknown(where, 'format', name, (*FORMATS, FLOAT))
  labels = tree.labels(params, given, where, default=FLOAT)
  found = {path: name for path, name in labels.items() if name != FLOAT}
  for path, name in found.items():
    if not path.endswith(('/kernel', '/embedding')):
      raise InputError(
        where, f'{name} for {path}', 'kernels and embeddings',
        f'name them: {KERNELS!r}',
      )  # fmt: skip
    if path.endswith('/embedding') and FORMATS[name].inputs == 'static':
      fix = 'use int8'
      raise InputError(where, f'{name} for {path}', 'kernels: a table has no inputs', fix)
  return found


def plain(path: str, w: np.ndarray, form: Format, **fields) -> QTensor:
  """A matrix by itself: nearest codes. Raises ValueError for what would want a calibration."""
  if path.endswith('/embedding'):
    return quantize(w, form.codes, block=form.block, axis=1, inputs='float', **fields)
  if form.inputs == 'static' and 'x_scale' not in fields:
    raise ValueError('ranges of inputs that nothing has calibrated: a stage does (quant.quantize)')
  fields |= {'inputs': form.inputs, 'stochastic': form.stochastic}
  return quantize(w, form.codes, block=form.block, **fields)


def quantized(
  values: Mapping, setting: str | Sequence, where: str = WHERE, make: Callable = plain
) -> dict:
  """Variables with the matrices of {'params'} in their formats.

  Args:
    values: {'params', ...}.
    setting: a format's name, or rules; () for none.
    where: how errors call them.
    make: (path, float32 matrix, Format) -> QTensor.

  Raises:
    InputError: as `formats`; a matrix that does not take its format, or has another one already.
  """
  own = {'params': values['params']}
  found = formats(own, setting, where)
  flat = tree.flatten(own)
  for path, name in found.items():
    x, form = flat[path], FORMATS[name]
    if isinstance(x, QTensor):
      if x.codes == form.codes and (path.endswith('/embedding') or x.inputs == form.inputs):
        if path.endswith('/kernel') and x.stochastic != form.stochastic:
          flat[path] = dataclasses.replace(x, stochastic=form.stochastic)
        continue
      fix = 'leave it, or start from the float model'
      raise InputError(where, f'{name} for {path}, which is {_called(x)} already', 'the same', fix)
    try:
      flat[path] = make(path, np.asarray(x, np.float32), form)
    except ValueError as error:
      fix = "another format, or 'float' for it before the other rules"
      raise InputError(where, f'{name} for {path}: {error}', 'numbers that fit', fix) from None
  return {**values, **tree.unflatten(flat)}


def floats(values: Mapping) -> dict:
  """Variables with all matrices in float32, by numpy."""
  return tree.map_paths(lambda p, x: dequantize(x) if isinstance(x, QTensor) else x, values)


def held(values: Mapping) -> bool:
  """Whether any matrix is held in a format."""
  return any(isinstance(x, QTensor) for x in tree.flatten(values).values())


def beside(values: Mapping) -> list[list[str]]:
  """config.rules that train the head and all that is not held in a format."""
  flat = tree.flatten({'params': values['params']})
  own = {path for path, x in flat.items() if isinstance(x, QTensor)}
  rules = {}
  for path in own:
    pattern = re.sub(r'layer_\d+', r'layer_\\d+', re.escape(path))
    alike = {other for other in flat if re.fullmatch(pattern, other)}
    rules[pattern if alike <= own else re.escape(path)] = 'frozen'
  held_rules = [[pattern, group] for pattern, group in sorted(rules.items())]
  return [['params/head/.*', 'head'], *held_rules, ['params/.*', 'encoder']]


def summary(values: Mapping) -> list[str]:
  """What every kernel and table became, and the size of those that are held in few bits.

  A line for each kind of place and format; with the numbers of the layers where these differ in
  their formats. Nothing where all are float.
  """
  kinds: dict[str, dict[str, list[str]]] = {}
  sizes = [0, 0]
  for path, x in tree.flatten({'params': values['params']}).items():
    if isinstance(x, QTensor):
      sizes[0] += 4 * x.size
      sizes[1] += x.nbytes
    elif not path.endswith(('/kernel', '/embedding')):
      continue
    layer = re.search(r'layer_(\d+)', path)
    kind = kinds.setdefault(re.sub(r'layer_\d+', 'layer_*', path.removeprefix('params/')), {})
    kind.setdefault(_called(x), []).append(layer[1] if layer else '')
  if not sizes[1]:
    return []
  lines = []
  for kind, called in kinds.items():
    for name, layers in called.items():
      mixed = len(called) > 1
      place = kind.replace('layer_*', f'layer_{{{",".join(layers)}}}') if mixed else kind
      lines.append(f'{place} x {len(layers)}: {name}')
  return [
    *lines,
    f'those of few bits take {sizes[1] / 1e6:.1f} MB, and {sizes[0] / 1e6:.1f} MB as float32',
  ]


def _called(x) -> str:
  if not isinstance(x, QTensor):
    return 'float'
  inputs = {'float': 'float', 'token': 'int8 by token', 'static': 'int8 by calibration'}[x.inputs]
  smooth = ', smoothed' if x.smooth is not None else ''
  scales = 'x'.join(map(str, np.shape(x.scale)))
  return f'{x.codes}, {scales} scales, inputs {inputs}{smooth}'
