"""Torch's files: read without torch, written without torch, and nothing executed on the way.

fixtures/torch was written by torch 2.13 (make.py there) and by adapters 1.3.0.
"""

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from efft.errors import InputError
from efft.interop import torch_file

FIXTURES = Path(__file__).parent / 'fixtures'
TORCH = FIXTURES / 'torch'
LORA = (TORCH / 'lora.bin').read_bytes()
KINDS = {'half': np.float16, 'bfloat16': ml_dtypes.bfloat16, 'double': np.float64, 'bool': bool}


def same(found, expected):
  assert found.keys() == expected.keys()
  for name, x in expected.items():
    assert found[name].dtype == x.dtype and found[name].shape == x.shape
    np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize('file', ['kinds', 'protocol4'])
def test_reads_what_torch_wrote(file):
  """Views, parameters, all kinds of numbers, the versions of a state_dict, another protocol."""
  found = torch_file.read(TORCH / f'{file}.bin')
  with np.load(TORCH / 'kinds.npz') as expected:
    same(
      found, {name: expected[name].astype(KINDS.get(name, expected[name].dtype)) for name in found}
    )
    assert set(found) == set(expected)


@pytest.mark.parametrize(('file', 'method'), [('lora', 'lora'), ('prefix', 'prefix_tuning')])
def test_reads_what_adapterhub_wrote(file, method):
  """Prefixes are in one storage that every layer refers to."""
  found = torch_file.read(TORCH / f'{file}.bin')
  expected = load_file(FIXTURES / 'adapters' / 'bert' / method / 'adapter.safetensors')
  copies = {name: x for name, x in found.items() if '.pool.' in name}
  same({name: x for name, x in found.items() if name not in copies}, expected)
  for name, x in copies.items():
    np.testing.assert_array_equal(
      x, found['bert.prefix' + name.split('.self.prefix')[1].replace('.pool', '')]
    )
  assert len(copies) == (10 if file == 'prefix' else 0)


def test_writes_what_it_reads():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 5)).astype(np.float32)
  tensors = {
    'x': x, 'turned': x.T, 'scalar': np.float32(3).reshape(()),
    'empty': np.zeros((0, 2), np.float32),
    'again': x, 'bfloat16': x.astype(ml_dtypes.bfloat16), 'long': np.arange(3), 'bool': x > 0,
    'näme': np.arange(4, dtype=np.float64).reshape(2, 2),
  }  # fmt: skip
  raw = torch_file.write(tensors)
  same(torch_file.loads(raw), tensors)
  assert raw == torch_file.write(tensors), 'the same bytes every time'
  with zipfile.ZipFile(io.BytesIO(raw)) as archive:
    stored = [e for e in archive.infolist() if '/data/' in e.filename]
    assert len(stored) == len(tensors) - 1, 'x and again share a storage'
    for entry in stored:
      start = entry.header_offset + 30 + len(entry.filename) + len(entry.extra)
      assert start % 64 == 0
  with pytest.raises(ValueError, match='complex64'):
    torch_file.write({'x': x.astype(np.complex64)})


def archive(pickled: bytes, records=None, prefix='archive', compression=zipfile.ZIP_STORED):
  file = io.BytesIO()
  with zipfile.ZipFile(file, 'w', compression) as out:
    out.writestr(f'{prefix}/data.pkl', pickled)
    for name, content in (records or {}).items():
      out.writestr(name, content)
  return file.getvalue()


def text(value):
  return b'X' + struct.pack('<I', len(value)) + value.encode()


def number(value):
  return b'\x8a\x09' + value.to_bytes(9, 'little', signed=True)


def numbers(values):
  return b'(' + b''.join(map(number, values)) + b't'


def tensor(offset=0, size=(4,), stride=(1,), count=4, kind='FloatStorage', key='0'):
  """{'x': a view of a storage}, as torch pickles it."""
  storage = f'ctorch\n{kind}\n'.encode() + text(key) + text('cpu') + number(count)
  return b''.join([
    b'\x80\x02}', text('x'), b'ctorch._utils\n_rebuild_tensor_v2\n((', text('storage'), storage,
    b'tQ', number(offset), numbers(size), numbers(stride),
    b'\x89ccollections\nOrderedDict\n)RtRs.',
  ])  # fmt: skip


FOUR = {'archive/data/0': np.arange(4, dtype=np.float32).tobytes()}


def test_the_hand_made_file_is_one():
  found = torch_file.loads(archive(tensor(1, (3,)), FOUR))
  np.testing.assert_array_equal(found['x'], [1, 2, 3])


def test_other_byte_order():
  values = np.array([1.5, -2, 3, 4], '>f4').tobytes()
  records = {'archive/data/0': values, 'archive/byteorder': b'big'}
  np.testing.assert_array_equal(torch_file.loads(archive(tensor(), records))['x'], [1.5, -2, 3, 4])
  with pytest.raises(InputError, match='byte order'):
    torch_file.loads(archive(tensor(), records | {'archive/byteorder': b'middle'}))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'size': (5,)}, 'larger than its storage'),
    ({'offset': 2, 'size': (3,)}, 'larger than its storage'),
    ({'size': (2, 2), 'stride': (3, 1)}, 'larger than its storage'),
    ({'size': (2**40,), 'stride': (0,)}, 'larger than its storage'),
    ({'size': (2,), 'stride': (-1,)}, 'impossible shape'),
    ({'offset': -1}, 'impossible shape'),
    ({'size': (2**62, 4), 'stride': (0, 1)}, 'impossible shape'),
    ({'size': (2, 2), 'stride': (1,)}, 'without a shape'),
    ({'count': 5}, 'should hold 5'),
    ({'count': 2**50}, 'should hold'),
    ({'count': -4}, 'should hold'),
    ({'key': '1'}, 'not there'),
    ({'key': '../0'}, 'not there'),
    ({'kind': 'UntypedStorage'}, 'asks for torch.UntypedStorage'),
    ({'kind': 'DoubleStorage'}, 'should hold 4'),
  ],
)
def test_tensors_that_do_not_fit_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    torch_file.loads(archive(tensor(**fields), FOUR))


class Attack:
  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


def state(obj):
  """A pickle that sets attributes of what it has built."""
  return b'\x80\x02ccollections\nOrderedDict\n)R}' + text('__class__') + obj + b'sb.'


REBUILD = b'ctorch._utils\n_rebuild_tensor_v2\n'
EMPTY = b'ccollections\nOrderedDict\n)R'
START = b'\x80\x02}' + text('x')
# Each of two of the one before: 2^250 if it were ever looked through.
DOUBLING = b''.join(bytes([104, i, 104, i, 134, 113, i + 1]) for i in range(250))
HOSTILE = {
  'os.system': pickle.dumps({'x': Attack(os.system, 'touch hostile')}, 2),
  'eval': pickle.dumps({'x': Attack(eval, 'open("hostile", "w")')}, 2),
  'getattr': pickle.dumps({'x': Attack(getattr, 1, '__class__')}, 4),
  'import': pickle.dumps({'x': Attack(__import__, 'antigravity')}, 2),
  'global without a call': START + b'cos\nsystem\ns.',
  'chain': START + EMPTY + b'cos\nsystem\n' + text('a') + b'\x85RRs.',
  'call of a text': START + text('os.system') + b')Rs.',
  'OrderedDict of pairs': b'\x80\x02ccollections\nOrderedDict\n(]]t\x85R.',
  'attributes': state(b'cos\nsystem\n'),
  'attributes of a function': b'\x80\x02' + REBUILD + b'}' + text('__code__') + b'Nsb.',
  'INST': b'\x80\x02(' + text('touch hostile') + b'ios\nsystem\n.',
  'OBJ': b'\x80\x02(cos\nsystem\n' + text('touch hostile') + b'o.',
  'NEWOBJ': b'\x80\x02ctorch\nFloatStorage\n)\x81.',
  'EXT': b'\x80\x02\x82\x01.',
  'stack global of a tuple': b'\x80\x04' + text('torch') + b')\x93.',
  'numpy': pickle.dumps({'x': np.arange(3)}, 2),
  'a number': pickle.dumps({'x': 3}, 2),
  'no dictionary': pickle.dumps([1], 2),
  'key twice': b'\x80\x02}(' + (text('x') + b'N') * 2 + b'u.',
  'key that is no text': pickle.dumps({1: 2}, 2),
  'itself': b'\x80\x02}q\x00' + text('x') + b'h\x00s.',
  'mark in place of a value': START + b'(s.',
  'empty stack': b'\x80\x020.',
  'no end': b'\x80\x02}',
  'memo that is not there': b'\x80\x02h\x07.',
  'storage that is none': START + text('module') + b'Qs.',
  'tensor of nothing': START + REBUILD + b')Rs.',
  'deep': b'\x80\x02' + b')' + b'\x85' * 100_000 + b'.',
  'doubling': b'\x80\x02)q\x00' + DOUBLING + b'Q.',
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError) as error:
    torch_file.loads(archive(HOSTILE[name], FOUR))
  assert not list(tmp_path.iterdir()) and len(str(error.value)) < 500


@pytest.mark.parametrize(
  ('raw', 'message'),
  [
    (archive(tensor(), {'archive/../../etc/passwd': b''}), 'a record named'),
    (archive(tensor(), {'/archive/x': b''}), 'a record named'),
    (archive(tensor(), {'archive\\x': b''}), 'a record named'),
    (archive(tensor(), FOUR | {'other/data/0': b''}), 'several archives'),
    (archive(tensor(), FOUR, compression=zipfile.ZIP_DEFLATED), 'compressed'),
    (archive(b'', {'archive/constants.pkl': b''}), 'TorchScript'),
    (archive(tensor(), {}), 'not there'),
    (b'', 'empty file'),
    (b'<html>', 'web page'),
    (b'version https://git-lfs.github.com/spec/v1', 'Git LFS'),
    (b'PK\x03\x04', 'damaged zip'),
    ((TORCH / 'legacy.bin').read_bytes(), 'before 1.6'),
    (LORA + LORA, 'before its first record'),
  ],
)
def test_other_files_are_refused(raw, message):
  with pytest.raises(InputError, match=message):
    torch_file.loads(raw)


def test_records_twice_are_refused():
  with pytest.warns(UserWarning, match='Duplicate'):
    file = io.BytesIO()
    with zipfile.ZipFile(file, 'w') as out:
      for content in (tensor(), tensor(1, (3,))):
        out.writestr('archive/data.pkl', content)
  with pytest.raises(InputError, match='twice'):
    torch_file.loads(file.getvalue())


def test_records_that_claim_to_overlap_are_refused():
  """Each record a view of the same bytes: a bomb without compression."""
  raw = archive(tensor(), {f'archive/data/{k}': bytes(4000) for k in range(3)})
  name = b'archive/data/'
  assert raw.count(name) == 6
  start = raw.index(b'PK\x01\x02')
  claimed = raw[start:].replace(struct.pack('<I', 4000), struct.pack('<I', 13000))
  with pytest.raises(InputError, match='larger than the file'):
    torch_file.loads(raw[:start] + claimed)


def test_no_such_file(tmp_path):
  with pytest.raises(InputError, match='no such file'):
    torch_file.read(tmp_path / 'adapter.bin')
  with pytest.raises(InputError, match='not a regular file'):
    torch_file.read(tmp_path)


EXPECTED = torch_file.loads(LORA)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(LORA) - 1))
def test_truncated_files_are_refused(length):
  with pytest.raises(InputError):
    torch_file.loads(LORA[:length])


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(LORA) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_without_effect(at, bit):
  """What no checksum covers holds nothing of the tensors: dates, padding, versions."""
  raw = bytearray(LORA)
  raw[at] ^= 1 << bit
  try:
    found = torch_file.loads(bytes(raw))
  except InputError:
    return
  same(found, EXPECTED)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_a_changed_pickle_is_refused_or_a_dictionary_of_tensors(data):
  """Where the checksum is right, and only the pickle machine stands in the way."""
  pickled = bytearray(tensor(1, (3,)))
  for _ in range(data.draw(st.integers(1, 4))):
    pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
  try:
    found = torch_file.loads(archive(bytes(pickled), FOUR))
  except InputError:
    return
  assert all(x.size <= 4 and isinstance(x, np.ndarray) for x in found.values())
