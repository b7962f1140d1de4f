"""The pickles inside torch's files, run without executing anything.

`unpickled` is a pickle machine of its own that knows how to build dictionaries of tensors: it calls
nothing that a file names and has, unlike a restricted `pickle.Unpickler`, no objects whose
attributes a file could set.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
  'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
  'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}  # fmt: skip
STORAGES = {name: np.dtype(dtype) for name, dtype in STORAGES.items()}


class Broken(Exception):
  """What is wrong with a file, in words."""


class Global(NamedTuple):
  module: str
  name: str


class Storage(NamedTuple):
  values: np.ndarray  # flat, read-only


class Tensor(NamedTuple):
  values: np.ndarray


def _tensor(storage, offset, size, stride, requires_grad, hooks, metadata=None) -> Tensor:
  """torch._utils._rebuild_tensor_v2: a view of a storage, within its bounds."""
  if type(storage) is not Storage or type(requires_grad) is not bool or hooks or metadata:
    raise Broken('a tensor with hooks or metadata')
  lists = [offset], size, stride
  if not all(type(x) in (tuple, list) for x in lists) or len(size) != len(stride):
    raise Broken('a tensor without a shape')
  if len(size) > 32 or not all(type(n) is int and 0 <= n < 2**62 for x in lists for n in x):
    raise Broken('a tensor of an impossible shape')
  values, count = storage.values, math.prod(size)
  last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
  if count > len(values) or (count and last >= len(values)):
    raise Broken('a tensor larger than its storage')
  if not count:
    return Tensor(np.empty(size, values.dtype))
  strides = [step * values.itemsize for step in stride]
  view = np.lib.stride_tricks.as_strided(values[offset:], size, strides, writeable=False)
  return Tensor(view)


def _parameter(data, requires_grad, hooks) -> Tensor:
  """torch._utils._rebuild_parameter."""
  if type(data) is not Tensor or type(requires_grad) is not bool or hooks:
    raise Broken('a parameter that is not of a tensor')
  return data


def _dictionary(*pairs) -> dict:
  if pairs:
    raise Broken('an OrderedDict made from something')
  return {}


_CALLS = {
  Global('torch._utils', '_rebuild_tensor_v2'): _tensor,
  Global('torch._utils', '_rebuild_parameter'): _parameter,
  Global('collections', 'OrderedDict'): _dictionary,
}
_VALUES = {
  'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8', 'BININT', 'BININT1', 'BININT2', 'LONG1',
  'BINFLOAT',
}  # fmt: skip
_CONSTANTS = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}
_TUPLES = {'EMPTY_TUPLE': 0, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_MARK = object()


def unpickled(raw: bytes, storage: Callable) -> Any:
  """What a pickle says, built from dictionaries, lists, tuples, numbers, texts and tensors."""
  machine = _Machine(storage)
  try:
    for opcode, argument, _ in pickletools.genops(raw):
      if opcode.name == 'STOP':
        return machine.pop()
      machine.step(opcode.name, argument)
  except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
    raise Broken(f'a damaged pickle ({type(error).__name__})') from None
  raise Broken('a pickle without an end')


class _Machine:
  """The stack machine of pickle, less all that could call or change something.

  Operations are those of the protocols 2 to 5 that torch's dictionaries of tensors need.
  """

  def __init__(self, storage):
    self.stack: list = []
    self.memo: dict[int, Any] = {}
    self.storage = storage

  def pop(self):
    value = self.stack.pop()
    if value is _MARK:
      raise ValueError('a mark in place of a value')
    return value

  def top(self, kind: type):
    if type(self.stack[-1]) is not kind:
      raise TypeError(f'no {kind.__name__}')
    return self.stack[-1]

  def marked(self) -> list:
    """The values since the last mark, taken away with it."""
    at = len(self.stack) - 1
    while self.stack[at] is not _MARK:
      at -= 1
      if at < 0:
        raise IndexError('no mark')
    values = self.stack[at + 1 :]
    del self.stack[at:]
    return values

  def put(self, pairs: list) -> None:
    target = self.top(dict)
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
      # Text alone: hashing what a file has nested could take for ever.
      if type(key) is not str or key in target:
        raise TypeError('a key that is no text or twice there')
      target[key] = value

  def step(self, name: str, argument) -> None:
    stack = self.stack
    if name in _VALUES:
      stack.append(argument)
    elif name in _CONSTANTS:
      stack.append(_CONSTANTS[name])
    elif name in _TUPLES:
      values = [self.pop() for _ in range(_TUPLES[name])]
      stack.append(tuple(values[::-1]))
    elif handler := getattr(self, f'do_{name.lower()}', None):
      handler(argument)
    elif name not in ('PROTO', 'FRAME'):
      raise Broken(f'a pickle with the operation {name}, which dictionaries of tensors do not need')

  def do_mark(self, _):
    self.stack.append(_MARK)

  def do_tuple(self, _):
    self.stack.append(tuple(self.marked()))

  def do_empty_dict(self, _):
    self.stack.append({})

  def do_empty_list(self, _):
    self.stack.append([])

  def do_append(self, _):
    value = self.pop()
    self.top(list).append(value)

  def do_appends(self, _):
    values = self.marked()
    self.top(list).extend(values)

  def do_setitem(self, _):
    value, key = self.pop(), self.pop()
    self.put([key, value])

  def do_setitems(self, _):
    self.put(self.marked())

  def do_binput(self, index):
    self.memo[index] = self.stack[-1]

  do_long_binput = do_binput

  def do_memoize(self, _):
    self.memo[len(self.memo)] = self.stack[-1]

  def do_binget(self, index):
    self.stack.append(self.memo[index])

  do_long_binget = do_binget

  def do_binpersid(self, _):
    self.stack.append(self.storage(self.pop()))

  def do_global(self, argument):
    self.globally(*argument.split(' '))

  def do_stack_global(self, _):
    name, module = self.pop(), self.pop()
    self.globally(module, name)

  def globally(self, module, name):
    found = Global(module, name)
    storage = type(name) is str and module == 'torch' and name in STORAGES
    if not storage and not (type(module) is type(name) is str and found in _CALLS):
      raise Broken(f'a pickle that asks for {shown(module)}.{shown(name)}')
    self.stack.append(found)

  def do_reduce(self, _):
    arguments, function = self.pop(), self.pop()
    if type(arguments) is not tuple or type(function) is not Global or function not in _CALLS:
      raise Broken('a pickle that calls something')
    self.stack.append(_CALLS[function](*arguments))

  def do_build(self, _):
    # A state_dict carries its modules' versions as an attribute, of which nothing is kept.
    state = self.pop()
    if type(state) is not dict or set(state) - {'_metadata'} or type(self.stack[-1]) is not dict:
      raise Broken('a pickle that sets attributes')


def shown(value) -> str:
  """Text and numbers as they are, of what may be nested without end its type alone."""
  if type(value) is Global:
    return f'{value.module}.{value.name}'[:100]
  return str(value)[:100] if type(value) in (str, int) else f'a {type(value).__name__}'
