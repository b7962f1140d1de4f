"""What sentence-transformers keeps beside an encoder: how it is pooled, and a layer on top.

`modules.json` lists Transformer, Pooling and what else there is, each with a folder. A Dense layer
right after a mean, without activation, is a classification head whose outputs are logits:
`efft.interop.st_format` writes such folders.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from efft.errors import InputError
from efft.models import weights

log = logging.getLogger(__name__)

MODULES, POOLING, DENSE = 'modules.json', '1_Pooling', '2_Dense'
IDENTITY = 'torch.nn.modules.linear.Identity'


def pooling(folder: Path) -> str:
  """'mean' or 'cls', as the sentence encoder in `folder` says; 'cls' where it is none."""
  listed = _modules(folder)
  place = POOLING if listed is None else dict(listed).get('Pooling')
  if place is None:
    return 'cls'
  file = folder / _inside(folder, place) / 'config.json'
  if not file.exists():
    return 'cls'
  mode = _mode(weights.read_json(file))
  if mode not in ('mean', 'cls'):
    fix = 'set model.pooling=mean or model.pooling=cls'
    raise InputError(str(file), f'pooling by {mode!r}', 'mean or cls', fix)
  log.info('%s: a sentence encoder, pooling=%s', folder, mode)
  return mode


def head(folder: Path) -> Path | None:
  """The folder of a linear layer over the mean of all tokens, or None."""
  listed = _modules(folder) or []
  kinds = [kind for kind, _ in listed]
  if kinds[1:] == ['Pooling', 'Dense']:
    pool, dense = (folder / _inside(folder, place) for _, place in listed[1:])
    over = _mode(weights.read_json(pool / 'config.json'))
    if over == 'mean' and _linear(weights.read_json(dense / 'config.json')):
      return dense
  if 'Dense' in kinds:
    log.info('%s: the sentence encoder has a Dense layer, which is left out', folder)
  return None


def _linear(config: Mapping) -> bool:
  """Whether a Dense layer is no more than W x + b of the sentence's vector."""
  return (
    config.get('activation_function') == IDENTITY
    and config.get('bias', True) is True
    and not config.get('use_residual')
    and config.get('module_input_name', 'sentence_embedding') == 'sentence_embedding'
  )


def _modules(folder: Path) -> list[tuple[str, object]] | None:
  """[(class, folder)], or None without a modules.json."""
  file = folder / MODULES
  if not file.exists():
    return None
  entries = [m for m in weights.read_json(file, list) if isinstance(m, dict)]
  return [(str(m.get('type')).rpartition('.')[2], m.get('path')) for m in entries]


def _inside(folder: Path, place) -> str:
  if not isinstance(place, str) or not re.fullmatch(r'\w+', place):
    found = f'path {place!r}'
    raise InputError(str(folder / MODULES), found, 'the name of a folder', 'mend the file')
  return place


def _mode(config: Mapping):
  modes = {
    key.removeprefix('pooling_mode_').removesuffix('_tokens').removesuffix('_token')
    for key, on in config.items()
    if key.startswith('pooling_mode_') and on is True
  }
  return config.get('pooling_mode', ' and '.join(sorted(modes)))
