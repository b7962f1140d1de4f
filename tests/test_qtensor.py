"""Matrices in few bits, against what their definition says of each number."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from efft import compact, qtensor
from efft.models import quantized
from efft.qtensor import QTensor

EVEN = st.integers(1, 5).map(lambda n: 2 * n)
MATRICES = st.tuples(EVEN, EVEN).flatmap(
  lambda shape: arrays.arrays(np.float32, shape, elements=st.floats(-9, 9, width=32))
)
CODES = st.sampled_from(['int8', 'int4', 'nf4'])


@given(MATRICES, CODES, st.sampled_from([0, 2]), st.sampled_from([0, 1]))
@example(np.full((2, 2), 1e-45, np.float32), 'int8', 0, 0)
def test_each_number_becomes_the_nearest_that_its_block_has(w, codes, block, axis):
  q = qtensor.quantize(w, codes, block=block, axis=axis, inputs='float')
  q.check()
  levels = {
    'int8': np.arange(-127, 128) / 127, 'int4': np.arange(-7, 8) / 7, 'nf4': qtensor.NF4,
  }[codes]  # fmt: skip
  found = qtensor.dequantize(q)
  for row in range(w.shape[0]):
    for column in range(w.shape[1]):
      place = row if axis == 0 else column
      size = block or w.shape[axis]
      line = w[:, column] if axis == 0 else w[row]
      largest = np.abs(line[place // size * size : (place // size + 1) * size]).max()
      near = np.abs(largest * np.asarray(levels) - w[row, column]).min()
      error = np.abs(found[row, column] - w[row, column])
      assert error <= near + 1e-5 * max(largest, 1e-30)


@given(arrays.arrays(np.uint8, st.tuples(EVEN, EVEN), elements=st.integers(0, 15)))
def test_two_codes_share_a_byte(codes):
  packed = qtensor.pack(codes)
  assert packed.nbytes == codes.size // 2
  np.testing.assert_array_equal(qtensor.unpack(packed), codes)


def test_an_odd_number_of_columns_has_no_place_for_the_last():
  with pytest.raises(ValueError, match='3 columns'):
    qtensor.quantize(np.ones((2, 3)), 'int4')


def some(codes='int8', seed=0, shape=(12, 8), **fields) -> QTensor:
  w = np.random.default_rng(seed).normal(size=shape)
  return qtensor.quantize(w, codes, inputs=fields.pop('inputs', 'float'), **fields)


KINDS = {
  'kernel': some(inputs='token'),
  'one scale': some(scale=np.full((1, 1), 0.02, np.float32)),
  'int4': some('int4', block=4),
  'nf4 table': some('nf4', block=4, axis=1),
  'smooth': some(inputs='token', smooth=np.linspace(0.5, 2, 12, dtype=np.float32)),
  'groups': some(
    inputs='static', x_scale=np.float32([0.1, 0.2, 0.3]), x_zero=np.int32([3, -4, 0]),
    order=np.random.default_rng(1).permutation(12).astype(np.int32),
  ),
}  # fmt: skip
every_kind = pytest.mark.parametrize('q', KINDS.values(), ids=KINDS)


@every_kind
def test_devices_read_what_the_host_wrote(q):
  w = qtensor.dequantize(q)
  np.testing.assert_array_equal(jax.jit(quantized.dequantized)(q), w)
  if q.scale.shape[0] in (1, 12) and q.smooth is None and q.order is None:
    index = np.array([[3, 0], [11, 3]])
    np.testing.assert_array_equal(jax.jit(quantized.rows)(q, index), w[index])


def test_smooth_and_order_are_undone():
  w = np.random.default_rng(0).normal(size=(12, 8))
  for name in ('smooth', 'groups'):
    np.testing.assert_allclose(qtensor.dequantize(KINDS[name]), w, atol=0.03)


@every_kind
def test_a_file_keeps_every_part(q):
  leaves = {'params/a': q, 'params/b': np.ones(3)}
  found = compact.decode(compact.encode(leaves), compact.described(leaves))
  again = found['params/a']
  assert again.kind() == q.kind() and again.parts().keys() == q.parts().keys()
  for name, x in q.parts().items():
    np.testing.assert_array_equal(again.parts()[name], x)
  assert compact.nbytes(q) == sum(x.nbytes for x in q.parts().values())


def test_room_is_a_quarter_and_an_eighth():
  w = np.random.default_rng(0).normal(size=(256, 256))
  assert qtensor.quantize(w).nbytes == 256 * 256 + 4 * 256
  packed = qtensor.quantize(w, 'nf4', block=64, inputs='float')
  assert packed.nbytes == 256 * 256 / 2 + 4 * 4 * 256


@pytest.mark.parametrize(
  'change, words',
  [
    ({'value': np.zeros((12, 7), np.int8)}, 'value is int8'),
    ({'value': np.zeros((12, 8), np.float32)}, 'value is float32'),
    ({'scale': np.zeros((5, 8), np.float32)}, r'scales \(5, 8\)'),
    ({'scale': np.zeros((4, 8), np.float32)}, 'one scale an output'),
    ({'codes': 'int3'}, "codes 'int3'"),
    ({'inputs': 'x'}, "inputs 'x'"),
    ({'inputs': 'static'}, '0 ranges'),
    ({'x_scale': np.ones(1, np.float32)}, '1 ranges of inputs that are token'),
    ({'x_zero': np.zeros(1, np.int32)}, 'x_zero'),
    ({'smooth': np.ones(11, np.float32)}, 'smooth'),
    ({'order': np.zeros(12, np.int32)}, 'an order'),
  ],
)
def test_parts_that_do_not_fit_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(KINDS['kernel'], **change).check()
  damaged = {'params/a': dataclasses.replace(KINDS['kernel'], **change)}
  with pytest.raises(ValueError, match='params/a'):
    compact.decode(compact.encode(damaged), compact.described(damaged))


@pytest.mark.parametrize(
  'w, block, words',
  [
    (np.full((4, 4), np.nan), 0, 'not finite'),
    (np.full((4, 4), np.inf), 0, 'not finite'),
    (np.ones((4, 4)), 3, 'not cut into blocks of 3'),
  ],
)
def test_matrices_that_have_no_codes(w, block, words):
  with pytest.raises(ValueError, match=words):
    qtensor.quantize(w, block=block)
