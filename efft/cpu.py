"""The processor, and settings of the process that decide how fast JAX starts and is on it."""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_heap() -> bool:
  """Keeps glibc's malloc from giving memory back to the kernel; True where it took effect.

  Each training step allocates the same large buffers. By default malloc maps and unmaps them, so
  every step faults its pages in anew: 389,000 faults and 1.2 s of system time for a LoRA step of
  BERT-base with 16 x 128 tokens, 2.0-2.3 s a step against 1.5 s with these settings. The price is
  resident memory, which never shrinks. One arena, because freed memory is reused within its own
  arena only and XLA allocates from many threads.

  Call it before jax is imported, while there are no threads to own another arena. Only glibc has
  `mallopt`; EFFT_MALLOC=system leaves malloc alone.
  """
  if not sys.platform.startswith('linux') or os.environ.get('EFFT_MALLOC') == 'system':
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:
    return False
  settings = ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
  return all([mallopt(name, value) == 1 for name, value in settings])


def keep_programs(folder: str | os.PathLike) -> None:
  """Lets jax keep its compiled programs below `folder`; the next run of a shape finds them.

  Call it before jax is imported. Each kind of processor has a folder of its own, since programs
  are compiled for the instructions that it has. A JAX_COMPILATION_CACHE_DIR that is set wins.
  """
  flags = ' '.join(sorted(_flags()))
  kind = hashlib.sha256(f'{platform.machine()}{platform.processor()}{flags}'.encode()).hexdigest()
  os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(Path(folder) / kind[:12]))


def multiplies_bfloat16() -> bool:
  """Whether this processor has instructions for it; without them float32 is the faster type."""
  return bool(_flags() & {'avx512_bf16', 'amx_bf16', 'bf16'})


def multiplies_int8() -> bool:
  """Whether this processor has dot products of int8; without them integers are no faster."""
  if sys.platform == 'darwin' and platform.machine() == 'arm64':
    return True
  return bool(_flags() & {'avx512_vnni', 'avx_vnni', 'amx_int8', 'asimddp', 'i8mm'})


def name() -> str:
  """What the processor calls itself."""
  try:
    with open('/proc/cpuinfo', encoding='utf-8') as file:
      return next(line.split(':', 1)[1].strip() for line in file if line.startswith('model name'))
  except (OSError, StopIteration):
    return platform.processor() or platform.machine()


def cores() -> int:
  """How many of its cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def _flags() -> set[str]:
  """Features of the processor as Linux names them; empty elsewhere."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    return set()
  line = next((line for line in lines if line.startswith(('flags', 'Features'))), '')
  return set(line.partition(':')[2].split())
