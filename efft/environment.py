"""Where a result comes from: package versions, git commit, machine."""

import functools
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

from efft import cpu
from efft.data import packages

PACKAGES = ('efft', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def settle() -> None:
  """What must be settled before jax is imported: malloc, and where compiled programs are kept."""
  cpu.keep_heap()
  cpu.keep_programs(packages.cache_root() / 'programs')


def describe() -> dict:
  """Versions, commit, host, processor, memory and devices, for a record."""
  import jax  # here, so that `versions` is quick

  return {
    'versions': versions(),
    'git': git_commit(),
    'python': platform.python_version(),
    'host': platform.node(),
    'cpu': cpu.name(),
    'cores': cpu.cores(),
    'memory_gib': round(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30, 1),
    'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
  }


def peak_memory() -> int:
  """Bytes: the device's own count where it keeps one, else the process's largest resident set."""
  import jax

  stats = jax.local_devices()[0].memory_stats() or {}
  unit = 1 if sys.platform == 'darwin' else 1024
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return stats.get('peak_bytes_in_use', resident)


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
  """{package: version} of those that are installed."""
  found = {}
  for name in packages:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


@functools.cache
def git_commit() -> str | None:
  """The commit efft runs from, '+' where files differ from it; None outside of its own checkout."""
  root = Path(__file__).resolve().parents[1]
  if not (root / '.git').exists():  # an installed efft inside somebody else's checkout
    return None
  try:
    run = functools.partial(
      subprocess.run, cwd=root, capture_output=True, text=True, timeout=10, check=True
    )
    commit = run(['git', 'rev-parse', 'HEAD']).stdout.strip()
    return commit + ('+' if run(['git', 'status', '--porcelain', '-uno']).stdout.strip() else '')
  except (OSError, subprocess.SubprocessError):
    return None
