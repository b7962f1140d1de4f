"""A disk that is full, for a moment."""

import contextlib
import resource


@contextlib.contextmanager
def full(limit: int = 8192):
  """Files cannot grow past `limit` bytes while entered, which stops root as well.

  Not a fixture: those end only after pytest has written its progress, and where its output goes to
  a file that is longer than `limit`, that write would fail too.
  """
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
