"""Strict while testing: eight simulated devices, and our own warnings are errors.

(The latter is `filterwarnings` in pyproject.toml.) The environment is set here because jax reads it
once, at import; subprocesses of the tests inherit it.
"""

import collections
import os
import re
import tempfile
import zlib
from pathlib import Path

import pytest

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
# Compiling dominates tests of tiny models; a second run of the suite finds the programs made.
CACHE = Path(tempfile.gettempdir()) / f'efft-tests-{os.getuid()}'
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
# Integers are what the tests are about, on processors that are slow with them too.
os.environ.setdefault('EFFT_INT8', 'always')
# A test that reaches for the network is wrong, and should fail at once.
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
# Processes started in other folders run this checkout, installed or not.
ROOT = str(Path(__file__).parents[1])
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [ROOT, os.environ.get('PYTHONPATH')]))


def pytest_addoption(parser):
  about = 'of tests with many parameters, every n-th; which ones differs from test to test'
  parser.addoption('--every', type=int, default=1, metavar='N', help=about)


def pytest_collection_modifyitems(config, items):
  every, left = config.getoption('--every'), []
  tests = [item.nodeid.partition('[')[0] for item in items]
  sizes, counts = collections.Counter(tests), collections.Counter()
  for item, test in zip(items, tests, strict=True):
    # One at least of each: the first is among those that a test has.
    first = zlib.crc32(test.encode()) % min(every, sizes[test])
    if counts[test] % every != first:
      left.append(item)
    counts[test] += 1
  config.hook.pytest_deselected(items=left)
  gone = set(map(id, left))
  items[:] = [item for item in items if id(item) not in gone]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """What shares compiled programs or a trained run goes to one process: a file, or a method."""
  from xdist.scheduler import LoadScopeScheduling

  class ByFileOrRow(LoadScopeScheduling):
    def _split_scope(self, nodeid):
      file, _, test = nodeid.partition('::')
      row = re.search(r'\[(\w+)', test)
      return row[1] if row and file.endswith('test_methods.py') else file

  return ByFileOrRow(config, log)
