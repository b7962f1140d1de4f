"""What a program costs before it is run: its operations, and the memory that it asks for.

Operations are counted in what jax has traced, after the removal of what no result depends on. The
compiler's own count (`compiled.cost_analysis()`) takes the body of a loop once, knows nothing of
calls into libraries, and changes with what each backend fuses: it serves as a check in the tests.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# One operation an element of the result; the rest moves numbers or is an integer's business.
ARITHMETIC = {
  'add', 'sub', 'mul', 'div', 'max', 'min', 'exp', 'log', 'tanh', 'logistic', 'erf', 'erfc',
  'sqrt', 'rsqrt', 'square', 'integer_pow', 'pow', 'neg', 'abs', 'sin', 'cos', 'reduce_sum',
  'reduce_max', 'select_n',
}  # fmt: skip


class Operations(NamedTuple):
  """Attributes:
  products: of matrix products, 2 for a multiplication and its addition, whatever the type.
  others: of arithmetic on floats, element by element, and of Fourier transforms (5 n log2 n).
  """

  products: int
  others: int

  def times(self, n: int) -> 'Operations':
    return Operations(n * self.products, n * self.others)

  def plus(self, other: 'Operations') -> 'Operations':
    return Operations(self.products + other.products, self.others + other.others)


def operations(fn: Callable, *args) -> Operations:
  """Of `fn(*args)`: all of its iterations where jax knows their number (scans), one where it does
  not, and of branches the dearest.

  Args:
    fn: a function, jitted or not; nothing is computed.
    *args: arrays or shapes.
  """
  closed = jax.make_jaxpr(fn)(*args)
  # A backward pass makes gradients of frozen matrices, too, which then nobody wants.
  jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
  return _count(jaxpr)


def flops(fn: Callable, *args) -> int:
  """All `operations` of `fn(*args)`."""
  return sum(operations(fn, *args))


def memory(compiled) -> int | None:
  """Bytes of a compiled program's arguments and temporaries, on each device; None where the backend
  does not say."""
  found = compiled.memory_analysis()
  return None if found is None else found.argument_size_in_bytes + found.temp_size_in_bytes


def _count(jaxpr) -> Operations:
  total = Operations(0, 0)
  for eqn in jaxpr.eqns:
    inner = [
      part.jaxpr if isinstance(part, core.ClosedJaxpr) else part
      for value in eqn.params.values()
      for part in (value if isinstance(value, list | tuple) else (value,))
      if isinstance(part, core.Jaxpr | core.ClosedJaxpr)
    ]
    if inner:
      times = eqn.params.get('length', 1) if eqn.primitive.name == 'scan' else 1
      total = total.plus(max(map(_count, inner), key=sum).times(times))
    elif eqn.outvars:
      total = total.plus(_own(eqn))
  return total


def _own(eqn) -> Operations:
  name, result = eqn.primitive.name, eqn.outvars[0].aval
  size = int(np.prod(result.shape))
  if name == 'dot_general':
    (contracted, _), _ = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    return Operations(2 * size * int(np.prod([shape[axis] for axis in contracted])), 0)
  if name == 'fft':
    length = int(np.prod(eqn.params['fft_lengths']))
    return Operations(0, int(5 * size * np.log2(max(2, length))))
  if name in ARITHMETIC and jnp.issubdtype(result.dtype, jnp.inexact):
    return Operations(0, max(size, *(int(np.prod(v.aval.shape)) for v in eqn.invars)))
  return Operations(0, 0)
