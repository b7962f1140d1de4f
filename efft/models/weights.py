"""Safetensors files of unknown origin: checked before they are believed, read one tensor at a time.

The header is validated here and not only by the safetensors library, because what the user needs
is the cause: an interrupted download, a Git LFS pointer, a web page, a pickle under another name.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy the name 'bfloat16', which safetensors asks for
import numpy as np
import safetensors

from efft import files
from efft.errors import EnvironmentProblem, InputError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
_MOST = 16 << 20  # bytes of a header or a JSON file; BERT-large's header has 50 kB
_BYTES = {'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2, 'F8_E4M3': 1, 'F8_E5M2': 1, 'BOOL': 1}
_BYTES |= {f'{sign}{bits}': bits // 8 for sign in 'IU' for bits in (8, 16, 32, 64)}
_AGAIN = 'download it again'
_IMPOSTORS = {
  b'': ('an empty file', _AGAIN),
  b'version https://git-lfs': (
    'a Git LFS pointer in place of the file',
    'run `git lfs pull` where it was cloned',
  ),
  b'<': ('a web page', 'download the file itself, not the page that shows it'),
  b'PK\x03\x04': ('a pickled PyTorch file under another name', 'take a safetensors copy'),
  b'\x80': ('a pickle under another name', 'take a safetensors copy'),
}


class Weights(Mapping[str, np.ndarray]):
  """The tensors of a checkpoint folder, single or sharded: {name: array}, each read on access.

  Attributes:
    files: the weight files, sorted.

  Raises InputError for whatever is not a whole and consistent safetensors checkpoint, with the
  cause in words. Pickles are never opened.
  """

  def __init__(self, folder: str | Path):
    self._place, self._open = {}, {}
    shards = _shards(Path(folder))
    for path, names in shards.items():
      held = _header(path)
      if names is not None and names != held:
        other = sorted(names ^ held)
        found = f'tensors that {INDEX} does not put there, or not all ({other[0]!r})'
        raise InputError(str(path), found, 'the shards of one checkpoint', _AGAIN)
      self._place |= dict.fromkeys(sorted(held), path)
    self.files = sorted(shards)

  def __getitem__(self, name: str) -> np.ndarray:
    path = self._place[name]
    try:
      if path not in self._open:
        self._open[path] = safetensors.safe_open(path, framework='numpy')
      return self._open[path].get_tensor(name)
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
      found = f'a tensor that cannot be read ({error})'
      raise InputError(f'{path}: {name}', found, 'float32, float16 or bfloat16', _AGAIN) from error

  def __iter__(self) -> Iterator[str]:
    return iter(self._place)

  def __len__(self) -> int:
    return len(self._place)


def read_file(path: str | Path) -> dict[str, np.ndarray]:
  """All tensors of one safetensors file; raises as `Weights`."""
  path = Path(path)
  names = _header(path)
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      return {name: file.get_tensor(name) for name in sorted(names)}
  except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as error:
    found = f'a tensor that cannot be read ({error})'
    raise InputError(str(path), found, 'dtypes that numpy has', _AGAIN) from error


def present(folder: Path) -> bool:
  """Whether every weight file that a folder promises is there; nothing is said of its content."""
  if (folder / SINGLE).exists():
    return True
  return (folder / INDEX).exists() and all(path.exists() for path in _shards(folder))


def digest(paths: list[Path]) -> str:
  """sha256 over several files, in order of their names: `sha256sum NAMES | sha256sum`."""
  lines = [f'{files.sha256(path)}  {path.name}\n' for path in sorted(paths, key=lambda p: p.name)]
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def read_json(path: Path, kind: type = dict) -> dict | list:
  """A JSON file whose top level is a `kind`; duplicate keys are an error."""
  with _opened(path) as file:
    raw = file.read(_MOST + 1)
  if len(raw) > _MOST:
    raise InputError(str(path), f'more than {_MOST} bytes', 'a smaller JSON file', _AGAIN)
  return _parse(raw, str(path), kind)


@contextlib.contextmanager
def _opened(path):
  if not path.is_file():
    found = 'something that is not a regular file' if path.exists() else 'no such file'
    raise InputError(str(path), found, 'a file', 'complete the checkpoint')
  try:
    with open(path, 'rb') as file:
      yield file
  except OSError as error:
    raise EnvironmentProblem(f'{path}: cannot read: {error.strerror}; try again') from error


def _parse(raw, where, kind):
  try:
    value = json.loads(raw, object_pairs_hook=_unique)
  except (ValueError, RecursionError) as error:
    found = f'what is not JSON ({str(error)[:200]})'
    found, fix = _impostor(raw) or (found, _AGAIN)
    raise InputError(where, found, 'JSON', fix) from error
  if not isinstance(value, kind):
    raise InputError(where, f'a JSON {type(value).__name__}', f'a {kind.__name__}', _AGAIN)
  return value


def _unique(pairs):
  value = {}
  for key, item in pairs:
    if key in value:
      raise ValueError(f'duplicate key {key[:100]!r}')
    value[key] = item
  return value


def _impostor(raw):
  for start, words in _IMPOSTORS.items():
    if raw.lstrip().startswith(start) if start else not raw:
      return words
  return None


def _shards(folder: Path) -> dict[Path, set[str] | None]:
  """{weight file: the tensors that the index puts there, None without an index}."""
  if (folder / SINGLE).exists():
    return {folder / SINGLE: None}
  if not (folder / INDEX).exists():
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    found = f'only pickled weights ({pickles[0]!r})' if pickles else 'no weights'
    fix = (
      'pickles (.bin, .pt) are never opened, for they can run any code: take a revision with '
      'safetensors, or where you trust it, convert it once with torch and transformers: '
      'AutoModel.from_pretrained(folder).save_pretrained(folder)'
    )
    raise InputError(str(folder), found, SINGLE, fix)
  where, shards = str(folder / INDEX), {}
  weight_map = read_json(folder / INDEX).get('weight_map')
  if not isinstance(weight_map, dict) or not weight_map:
    raise InputError(where, 'no weight_map', '{tensor: file}', _AGAIN)
  for name, file in weight_map.items():
    # No separator of any system and no '..': a joined path could leave the folder.
    plain = (
      isinstance(file, str) and file.endswith('.safetensors') and not set(file) & set('/\\:\0')
    )
    if not plain or file.startswith('.'):
      fix = 'do not use this checkpoint, or mend its index'
      raise InputError(where, f'{name!r} in {file!r}', 'the name of a .safetensors file', fix)
    shards.setdefault(folder / file, set()).add(name)
  return shards


def _header(path: Path) -> set[str]:
  """The tensor names of one file, once its header describes every byte of it."""
  where = str(path)
  with _opened(path) as file:
    start, size = file.read(512), path.stat().st_size
    length = int.from_bytes(start[:8], 'little')
    if size < 8 or length > min(size - 8, _MOST):
      truncated = f'a truncated file of {size} bytes'
      found, fix = _impostor(start) or (truncated, _AGAIN)
      if length > _MOST and not _impostor(start):
        found = f'a header of {length} bytes'
      raise InputError(where, found, 'a safetensors file', fix)
    file.seek(8)
    header = _parse(file.read(length), where, dict)
  header.pop('__metadata__', None)
  spans = []
  for name, entry in header.items():
    span = _span(entry)
    if span is None or not name.isprintable():
      found = f'{name[:100]!r} described by {str(entry)[:200]!r}'
      raise InputError(
        f'{where}: header', found, 'dtype, shape and data_offsets that agree', _AGAIN
      )
    spans.append(span)
  end = 0
  for begin, stop in sorted(spans):
    if begin != end:
      raise InputError(
        f'{where}: header', f'tensors with a gap or an overlap at byte {begin}', 'none', _AGAIN
      )
    end = stop
  if size != 8 + length + end:
    found = f'{size} bytes' + (' (a truncated file)' if size < 8 + length + end else '')
    raise InputError(where, found, f'the {8 + length + end} of its header', _AGAIN)
  return set(header)


def _span(entry) -> tuple[int, int] | None:
  """Where a tensor lies in the data, if its dtype, shape and offsets agree."""
  if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
    return None
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  for numbers in (shape, offsets):
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
      return None
  if not isinstance(dtype, str) or dtype not in _BYTES or len(shape) > 8 or len(offsets) != 2:
    return None
  begin, end = offsets
  return (begin, end) if end - begin == math.prod(shape) * _BYTES[dtype] else None
