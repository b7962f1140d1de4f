"""Files of other libraries, of unknown origin: checked before they are believed.

Tensors come as safetensors or as torch's zipped pickles, read without torch by `torch_file`.
"""

from pathlib import Path

import numpy as np

from efft.errors import InputError
from efft.interop import torch_file
from efft.models import weights

# What an adapter on the hub may consist of.
PATTERNS = ('*.json', '*.safetensors', '*.bin')
_FLOATS = ('float16', 'bfloat16', 'float32')


def config(folder: Path, name: str) -> dict:
  """A JSON object of a folder."""
  return weights.read_json(Path(folder) / name)


def find(folder: Path, *names: str) -> Path:
  """The first of the files that is there; InputError where none is."""
  for name in names:
    if (Path(folder) / name).exists():
      return Path(folder) / name
  raise InputError(str(folder), f'no {names[0]}', ' or '.join(names), 'complete the checkpoint')


def tensors(path: Path) -> dict[str, np.ndarray]:
  """All tensors of a .safetensors or .bin file: float32 where they are floats.

  Raises InputError for a file that is not whole, values that are not finite, and pickles that hold
  anything but tensors.
  """
  path = Path(path)
  found = weights.read_file(path) if path.suffix == '.safetensors' else torch_file.read(path)
  for name, x in found.items():
    if str(x.dtype) in _FLOATS:
      found[name] = x = x.astype(np.float32)
    if not np.isfinite(x.astype(np.float64) if x.dtype != bool else x).all():
      fix = 'the adapter is damaged or diverged: take another copy or an earlier step'
      raise InputError(f'{path}: {name}', 'values NaN or infinite', 'finite ones', fix)
  return found
