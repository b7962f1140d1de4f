"""Files of `torch.save`, read and written without torch; of unknown origin, so nothing is executed.

Since torch 1.6 they are zip archives without compression (caffe2/serialize/inline_container.h):

    <any name>/data.pkl     a pickle: {name: tensor}, which refers to its storages by number
    <any name>/data/<k>     storage k, raw
    <any name>/byteorder    'little' or 'big'; missing in older files, which are little
    <any name>/version

The pickle is read by `torch_pickle`.
"""

import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from efft.errors import EnvironmentProblem, InputError
from efft.interop import torch_pickle
from efft.interop.torch_pickle import STORAGES, Broken, Global, Storage, Tensor

# A storage may stand in many tensors (prefixes: one for each layer), but not without end.
_MOST_SHARED = 256
_RESAVE = (
  'save it again with torch: torch.save(torch.load(file, map_location="cpu", weights_only=True), '
  'file), or take the .safetensors'
)
_IMPOSTORS = {
  b'\x80': ('a pickle of torch before 1.6 (or no torch file)', _RESAVE),
  b'version https://git-lfs': ('a Git LFS pointer in place of the file', 'run `git lfs pull`'),
  b'<': ('a web page', 'download the file itself, not the page that shows it'),
}
_AGAIN = 'download it again'


def read(path: str | Path) -> dict[str, np.ndarray]:
  """{name: array} of a .bin file; arrays are read-only and may share memory.

  Raises:
    InputError: a file that is damaged, of another kind, or that holds anything but tensors.
  """
  path = Path(path)
  if not path.is_file():
    found = 'something that is not a regular file' if path.exists() else 'no such file'
    raise InputError(str(path), found, 'a file', 'complete the checkpoint')
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise EnvironmentProblem(f'{path}: cannot read: {error.strerror}; try again') from error
  return loads(raw, str(path))


def loads(raw: bytes, where: str = 'torch file') -> dict[str, np.ndarray]:
  """As `read`, of the file's content."""
  if not raw.startswith(b'PK\x03\x04'):
    found, fix = next(
      (words for start, words in _IMPOSTORS.items() if raw.startswith(start)),
      ('something else' if raw else 'an empty file', _AGAIN),
    )
    raise InputError(where, found, 'a file of torch.save, 1.6 or newer', fix)
  try:
    records = _records(raw)
    order = records.get('byteorder', b'little')
    if order not in (b'little', b'big'):
      raise Broken(f'the byte order {order[:20]!r}')
    found = torch_pickle.unpickled(records.pop('data.pkl'), _storages(records, order.decode()))
    if type(found) is not dict:
      raise Broken('no dictionary of tensors')
    other = [name for name, x in found.items() if type(x) is not Tensor]
    if other:
      raise Broken(f'{other[0][:100]!r}, which is no tensor')
    total = sum(x.values.nbytes for x in found.values())
    if total > _MOST_SHARED * len(raw):
      raise Broken(f'{total} bytes of tensors in a file of {len(raw)}')
  except Broken as error:
    fix = 'do not use this file; take another copy, or the .safetensors'
    raise InputError(where, str(error), 'tensors by name, saved by torch.save', fix) from None
  return {name: x.values for name, x in found.items()}


def _records(raw: bytes) -> dict[str, bytes]:
  """{name without the archive's: content}, every checksum verified."""
  try:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
      entries = archive.infolist()
      names = [entry.orig_filename for entry in entries]
      for entry, name in zip(entries, names, strict=True):
        parts = name.split('/')
        if re.search(r'[\\:\0]', name) or len(parts) < 2 or {'', '.', '..'} & set(parts):
          raise Broken(f'a record named {name[:100]!r}')
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
          raise Broken(f'{name[:100]!r} compressed or encrypted, which torch does not')
      if len({name.split('/')[0] for name in names}) != 1 or len(set(names)) != len(names):
        raise Broken('records twice or of several archives')
      if sum(entry.file_size for entry in entries) > len(raw):
        raise Broken('records larger than the file')
      if min(entry.header_offset for entry in entries) != 0:
        raise Broken('something before its first record')
      found = {n.split('/', 1)[1]: archive.read(e) for e, n in zip(entries, names, strict=True)}
  except (
    zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, EOFError,
    ValueError, OverflowError, LookupError, OSError,
  ) as error:  # fmt: skip
    raise Broken(f'a damaged zip archive ({str(error)[:200]})') from None
  if 'data.pkl' not in found or 'constants.pkl' in found:
    raise Broken('an archive that is not of torch.save (TorchScript?)')
  return found


def _storages(records: Mapping[str, bytes], order: str):
  """(persistent id of a pickle) -> Storage."""

  def storage(reference) -> Storage:
    if type(reference) is not tuple or len(reference) != 5 or reference[0] != 'storage':
      raise Broken('a reference to something that is not a storage')
    _, kind, key, location, count = reference
    if type(kind) is not Global or kind.module != 'torch' or kind.name not in STORAGES:
      raise Broken(f'a storage of kind {torch_pickle.shown(kind)}')
    if type(key) is not str or f'data/{key}' not in records or type(location) is not str:
      raise Broken('a storage that is not there')
    dtype, content = STORAGES[kind.name], records[f'data/{key}']
    if type(count) is not int or len(content) != count * dtype.itemsize:
      raise Broken(
        f'{len(content)} bytes in storage {key[:20]}, which should hold {torch_pickle.shown(count)}'
      )
    # As whole numbers: numpy cannot swap the bytes of a bfloat16.
    bits = np.frombuffer(content, f'{"<" if order == "little" else ">"}u{dtype.itemsize}')
    values = bits != 0 if dtype.kind == 'b' else bits.astype(f'u{dtype.itemsize}').view(dtype)
    return Storage(values)

  cache = {}

  def cached(reference) -> Storage:
    made = storage(reference)
    key = (reference[2], made.values.dtype)
    return cache.setdefault(key, made)

  return cached


def write(tensors: Mapping[str, np.ndarray]) -> bytes:
  """A file that `torch.load(file, weights_only=True)` reads as {name: tensor}.

  Arrays that are one object share a storage, as tensors do. The same tensors give the same bytes.
  """
  kinds = {dtype: name for name, dtype in STORAGES.items()}
  storages: dict[int, tuple[int, np.ndarray]] = {}
  out = [b'\x80\x02}(']
  for name, x in tensors.items():
    whole = np.ascontiguousarray(x).reshape(np.shape(x))
    if whole.dtype not in kinds:
      raise ValueError(f'{name}: torch has no storage of {whole.dtype}')
    key, _ = storages.setdefault(id(x), (len(storages), whole))
    steps = [math.prod(whole.shape[i + 1 :]) for i in range(whole.ndim)]
    out += [
      _text(name), b'ctorch._utils\n_rebuild_tensor_v2\n((', _text('storage'),
      f'ctorch\n{kinds[whole.dtype]}\n'.encode(), _text(str(key)), _text('cpu'),
      _number(whole.size), b'tQ', _number(0),
      *(part for row in (whole.shape, steps) for part in (b'(', *map(_number, row), b't')),
      b'\x89ccollections\nOrderedDict\n)RtR',
    ]  # fmt: skip
  out.append(b'u.')
  records = {'data.pkl': b''.join(out), 'byteorder': b'little'}
  records |= {f'data/{key}': _little(x).tobytes() for key, x in storages.values()}
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as archive:
    for name, content in {**records, 'version': b'3\n'}.items():
      entry = zipfile.ZipInfo(f'archive/{name}')
      # Data begin at multiples of 64 bytes, filled up by a field of the header as torch does.
      gap = -(file.tell() + 30 + len(entry.filename) + 4) % 64
      entry.extra = b'FB' + struct.pack('<H', gap) + b'Z' * gap
      archive.writestr(entry, content)
  return file.getvalue()


def _little(x: np.ndarray) -> np.ndarray:
  return x if x.dtype == ml_dtypes.bfloat16 else x.astype(x.dtype.newbyteorder('<'))


def _text(value: str) -> bytes:
  encoded = value.encode()
  return pickle.BINUNICODE + struct.pack('<I', len(encoded)) + encoded


def _number(value: int) -> bytes:
  if value < 2**31:
    return pickle.BININT + struct.pack('<i', value)
  raw = pickle.encode_long(value)
  return pickle.LONG1 + bytes([len(raw)]) + raw
