"""The artefact of a run: a folder that classifies, with its base model's help where it needs one.

    bundle.json           what follows, in words: encoder, method, labels, base, metrics, digests
    weights.safetensors   leaves by path ('params/head/out/kernel', 'delta/layer_0/...'): float32,
                          integers, and what `efft.compact` makes of masks, sparse changes and
                          matrices in few bits
    tokenizer.json        the fast tokenizer, as `tokenizers` reads it

A bundle appears whole or not at all, and is verified before anything of it is used. Nothing in it
is executed. This module imports no jax, so that reading labels and metrics is quick.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from efft import compact, files
from efft.errors import Diverged, InputError
from efft.qtensor import QTensor

VERSION = 3
_ABOUT, _WEIGHTS, _TOKENIZER = 'bundle.json', 'weights.safetensors', 'tokenizer.json'


@dataclasses.dataclass(frozen=True)
class Bundle:
  """What a bundle folder holds. All but the leaves and the tokenizer is JSON."""

  # path -> array, compact.Sparse or QTensor: all that was trained, and head and delta
  leaves: dict[str, Any]
  tokenizer: str  # the text of tokenizer.json
  encoder: dict[str, Any]  # EncoderConfig.to_dict()
  method: dict[str, dict]  # config.method: {name: {'fn': ..., arguments}}
  rules: tuple[tuple[str, str], ...]  # config.rules: (path regex, group)
  labels: tuple[str, ...]  # class names by index; none for regression
  kind: str  # 'single', 'multi' or 'regression'
  max_length: int  # tokens
  dtype: str  # 'float32' or 'bfloat16': what it was trained to compute in
  pooling: str  # 'cls' or 'mean'
  columns: dict[str, str]  # of the training data: {'text', 'pair' (where there is one), 'label'}
  base: dict[str, Any]  # {'name', 'path' (where it was found: a hint), 'sha256'}
  needs_base: bool  # False where the leaves are the whole model
  metrics: dict[str, float]
  versions: dict[str, str]  # of the packages that made it
  # (path regex, format): what the numbers of the base are held in, see `efft.quantize`
  quantize: tuple[tuple[str, str], ...] = ()


def save(folder: str | Path, bundle: Bundle) -> None:
  """Publishes `bundle` as `folder`, replacing a bundle that is there.

  Raises Diverged where a leaf holds NaN or infinity, EnvironmentProblem where the disk refuses.
  """
  leaves = {path: _storable(x) for path, x in sorted(bundle.leaves.items())}
  for path, leaf in leaves.items():
    if not _finite(leaf):
      raise Diverged(f'{folder}: {path} is not finite; nothing was published')
  about = {f.name: getattr(bundle, f.name) for f in dataclasses.fields(bundle)}
  del about['leaves'], about['tokenizer']
  with files.atomic_folder(folder) as temp:
    (temp / _WEIGHTS).write_bytes(safetensors.numpy.save(compact.encode(leaves)))
    (temp / _TOKENIZER).write_text(bundle.tokenizer, encoding='utf-8')
    about |= {
      'version': VERSION,
      'leaves': compact.described(leaves),
      'files': files.digests(temp),
    }
    about = json.loads(files.to_json(about))
    (temp / _ABOUT).write_text(files.to_json(about | {'digest': _digest(about)}, indent=2) + '\n')


def load(folder: str | Path) -> Bundle:
  """Reads and verifies a bundle, or that of a run; InputError says in words what is wrong."""
  folder = inside(folder)
  about = read_about(folder)
  problem = files.damage(folder, about['files'])
  if problem:
    raise _damaged(folder, problem)
  try:
    arrays = safetensors.numpy.load((folder / _WEIGHTS).read_bytes())
  except (safetensors.SafetensorError, ValueError) as error:
    raise _damaged(folder, f'{_WEIGHTS} is not readable ({error})') from None
  try:
    leaves = compact.decode(arrays, about['leaves'])
  except ValueError as error:
    raise _damaged(folder, f'{_WEIGHTS} and {_ABOUT} differ in {error}') from None
  fields = {f.name: about[f.name] for f in dataclasses.fields(Bundle) if f.name != 'tokenizer'}
  return Bundle(
    **fields
    | {
      'leaves': leaves,
      'tokenizer': (folder / _TOKENIZER).read_text(encoding='utf-8'),
      'rules': tuple(map(tuple, about['rules'])),
      'quantize': tuple(map(tuple, about['quantize'])),
      'labels': tuple(about['labels']),
    }
  )


def read_about(folder: str | Path) -> dict[str, Any]:
  """bundle.json alone, verified: labels, metrics and base without reading the weights."""
  path = inside(folder) / _ABOUT
  try:
    about = json.loads(path.read_bytes())
  except OSError as error:
    raise InputError(
      str(folder),
      f'no readable {_ABOUT} ({error.strerror})',
      'a bundle',
      'name a run or bundle folder',
    ) from None
  except ValueError as error:
    raise _damaged(folder, f'{_ABOUT} is not JSON ({error})') from None
  if not isinstance(about, dict):
    raise _damaged(folder, f'{_ABOUT} is not a JSON object')
  if about.get('version') != VERSION:
    raise InputError(
      str(path),
      f'bundle version {about.get("version")!r}',
      f'version {VERSION}',
      'use the efft that wrote it, or a newer one',
    )
  needed = {f.name for f in dataclasses.fields(Bundle)} - {'tokenizer'} | {'files', 'digest'}
  missing = sorted(needed - about.keys())
  if missing:
    raise _damaged(folder, f'{_ABOUT} lacks {", ".join(missing)}')
  if about.pop('digest') != _digest(about):
    raise _damaged(folder, f'{_ABOUT} is not the file that was written (truncated or changed)')
  missing = sorted({_WEIGHTS, _TOKENIZER} - about['files'].keys())
  if missing:
    raise _damaged(folder, f'{_ABOUT} lists no {" and no ".join(missing)}')
  return about


def check_base(bundle: Bundle, sha256: str) -> None:
  """Refuses a base model whose weights are not those that the bundle was trained on."""
  if bundle.needs_base and sha256 != bundle.base['sha256']:
    raise InputError(
      f'base model {bundle.base["name"]!r}',
      f'sha256 {sha256}',
      f'sha256 {bundle.base["sha256"]}, on which this bundle was trained',
      'restore the model it was trained on, or train again',
    )


def card(about: Mapping[str, Any], *, title: str, machine: Mapping[str, Any], command: str) -> str:
  """README.md of a run: label table, metrics, machine, the command to use it.

  Args:
    about: the fields of a Bundle (`read_about`, or `vars(bundle)`).
    title: the heading.
    machine: `efft.environment.describe()` or parts of it.
    command: a shell command that predicts with it.
  """
  method = ', '.join(about['method']) or 'rules only'
  needs = 'needs its base model' if about['needs_base'] else 'stands alone'
  rows = [f'| {index} | {_cell(label)} |' for index, label in enumerate(about['labels'])]
  scores = [f'| {_cell(name)} | {_number(value)} |' for name, value in about['metrics'].items()]
  facts = [f'| {_cell(name)} | {_cell(value)} |' for name, value in machine.items()]
  return '\n'.join([
    f'# {title}', '',
    f'A text classifier fine-tuned with efft: {method} on `{about["base"]["name"]}` '
    f'({about["encoder"].get("architecture", "encoder")}, {about["pooling"]} pooling, '
    f'{about["kind"]}, at most {about["max_length"]} tokens). The bundle {needs}.', '',
    '    ' + command, '',
    '## Labels', '', '| index | label |', '|---|---|', *rows, '',
    '## Metrics', '', '| metric | value |', '|---|---|', *scores, '',
    '## Made on', '', '| | |', '|---|---|', *facts, '',
  ])  # fmt: skip


def inside(folder: str | Path) -> Path:
  """The bundle of a run folder, or the bundle itself."""
  folder = Path(folder)
  return folder / 'bundle' if (folder / 'bundle').is_dir() else folder


def is_there(folder: str | Path) -> bool:
  """Whether a folder is a bundle, whole or damaged, or a run with one."""
  return (inside(folder) / _ABOUT).is_file()


def identity(folder: str | Path) -> str:
  """sha256 of what the weights and the encoder of a bundle are."""
  about = read_about(folder)
  return _digest({'weights': about['files'][_WEIGHTS], 'encoder': about['encoder']})


def _finite(x) -> bool:
  if isinstance(x, QTensor):
    return x.finite
  return bool(np.isfinite(x.values if isinstance(x, compact.Sparse) else x).all())


def _storable(x):
  if isinstance(x, QTensor):
    return dataclasses.replace(x, **{name: np.asarray(p) for name, p in x.parts().items()})
  if isinstance(x, compact.Sparse):
    return x
  x = np.asarray(x, order='C')
  return x.astype(np.float32) if np.issubdtype(x.dtype, np.floating) else x


def _digest(about: Mapping) -> str:
  return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _damaged(folder, found: str) -> InputError:
  return InputError(
    str(folder), f'a damaged bundle: {found}', 'the files as they were written', 'copy it again'
  )


def _cell(value) -> str:
  return str(value).replace('|', '\\|').replace('\n', ' ')


def _number(value) -> str:
  return (
    'not finite' if value is None else f'{value:.4f}' if isinstance(value, float) else str(value)
  )
