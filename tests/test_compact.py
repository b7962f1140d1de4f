"""What is stored of masks and sparse changes, against the arrays themselves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from efft import compact

SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, max_side=7)
FLOATS = arrays.arrays(np.float32, SHAPES, elements=st.floats(-2, 2, width=32))
ANY = st.one_of(
  FLOATS, arrays.arrays(bool, SHAPES), arrays.arrays(np.int32, SHAPES), arrays.arrays('u1', SHAPES)
)


def same(a, b):
  assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@given(st.dictionaries(st.sampled_from(['params/a', 'delta/b', 'delta/c/d']), ANY), st.data())
def test_what_goes_in_comes_out_to_the_bit(leaves, data):
  """Signs of zeros included; a mask comes back as the numbers that stand for it."""
  base = {}
  if leaves.get('params/a') is not None and leaves['params/a'].dtype == np.float32:
    x = leaves['params/a']
    change = data.draw(arrays.arrays(bool, x.shape))
    base['params/a'] = np.where(change, x + 1, x).astype(np.float32)
  packed = compact.compact(leaves, base)
  shapes = {path: x.shape for path, x in packed.items()}
  found = compact.whole(compact.decode(compact.encode(packed), shapes), base)
  assert found.keys() == leaves.keys()
  for path, x in leaves.items():
    same(found[path], x.astype(np.float32) if x.dtype == bool else x)


def test_a_sparse_change_takes_the_room_of_what_changed():
  base = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
  x = base.copy()
  x[3, 5], x[60, 0] = 7, -7
  packed = compact.compact({'params/w': x, 'params/v': base + 1}, {'params/w': base})
  sparse = packed['params/w']
  assert sparse.index.tolist() == [3 * 32 + 5, 60 * 32] and sparse.values.tolist() == [7, -7]
  assert compact.nbytes(sparse) == 2 * (4 + 4)
  assert packed['params/v'].nbytes == compact.nbytes(packed['params/v']) == 4 * base.size
  assert isinstance(
    compact.compact({'params/head': np.zeros((9, 9), 'f4')}, {})['params/head'], np.ndarray
  )
  encoded = compact.encode({'delta/mask': np.ones((5, 5), bool)})
  assert encoded['delta/mask#bits'].nbytes == compact.nbytes(np.ones((5, 5), bool)) == 4


@pytest.mark.parametrize(
  'arrays, shapes',
  [
    ({'a': np.zeros(3)}, {}),
    ({}, {'a': [3]}),
    ({'a': np.zeros(3)}, {'a': [4]}),
    ({'a#bits': np.zeros(1, np.uint8)}, {'a': [9]}),
    ({'a#bits': np.zeros(1, np.int32)}, {'a': [3]}),
    ({'a#index': np.zeros(1, np.uint32)}, {'a': [3]}),
    ({'a#index': np.zeros(2, np.uint32), 'a#values': np.zeros(1)}, {'a': [3]}),
    ({'a#index': np.uint32([3]), 'a#values': np.zeros(1)}, {'a': [3]}),
  ],
)
def test_what_does_not_fit_is_refused(arrays, shapes):
  with pytest.raises(ValueError, match='a'):
    compact.decode(arrays, shapes)
