"""Prediction heads of AdapterHub: those of transformers' classes and the library's flexible ones.

A flexible head is a list of layers, `heads.<name>.<k>`, over the first token or the pooler's
output. efft's head is that of the architecture (`HEADS`), and holds what is the same: two layers
where the architecture has a dense layer of that activation; for BERT one layer over the pooler, or
two layers with tanh, of which the first takes the pooler's place. Source: adapters 1.3.0,
head_utils.py, heads/base.py.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from efft.errors import InputError
from efft.interop import adapterhub_parts as parts
from efft.interop import containers, foreign
from efft.interop.foreign import Keys
from efft.models.encoder import HEADS
from efft.models.hub import Base

CONFIG = 'head_config.json'
FILES = ('model_head.safetensors', 'pytorch_model_head.bin')
# Architecture: transformers' class.
CLASSES = {
  'bert': 'BertForSequenceClassification',
  'roberta': 'RobertaForSequenceClassification',
  'xlm-roberta': 'XLMRobertaForSequenceClassification',
  'distilbert': 'DistilBertForSequenceClassification',
  'electra': 'ElectraForSequenceClassification',
}
_FIX = 'take the config and the base model that belong to the adapter'
_KINDS = {'classification': None, 'multilabel_classification': 'multi'}


class Head(NamedTuple):
  leaves: dict[str, np.ndarray]
  labels: tuple[str, ...] | None
  kind: str | None


def num_labels(folder: Path) -> int:
  """The outputs of the head in a folder."""
  config = containers.config(folder, CONFIG)
  inner = config.get('config') or {}
  count = inner.get('num_labels') if isinstance(inner, dict) else None
  labels = config.get('label2id') or (inner.get('label2id') if isinstance(inner, dict) else None)
  count = config.get('num_labels') if count is None else count
  if count is None and isinstance(labels, dict):
    count = len(labels)
  if type(count) is not int or not 1 <= count < 100_000:
    where = str(Path(folder) / CONFIG)
    raise InputError(where, f'num_labels={count!r:.100}', 'the number of labels', 'complete it')
  return count


def read(folder: Path, base: Base) -> Head:
  """The head in a folder, whole."""
  where = str(Path(folder) / CONFIG)
  config = Keys(containers.config(folder, CONFIG), where)
  file = containers.find(folder, *FILES)
  tensors = Keys(containers.tensors(file), str(file))
  count = num_labels(folder)
  config.ignore(('num_labels', 'model_name', 'model_class', 'version', 'config_id', 'model'))
  for key, own in (('hidden_size', base.cfg.hidden), ('model_type', base.cfg.architecture)):
    found = config.take(key, own)
    if found != own:
      raise InputError(where, f'{key}={found!r:.100}', f'{own}, as in the base', 'take its base')
  labels = config.take('label2id', None)
  name, flex = config.take('name', None), config.take('config', None)
  config.finish()
  kind = 'regression' if count == 1 else None
  if flex is None:
    leaves = foreign.head(tensors, base.cfg)
  else:
    if not isinstance(flex, dict):
      raise InputError(where, f'config {flex!r:.100}', 'a head in full', 'save it again')
    inner = Keys(flex, where)
    head_type = inner.take('head_type', 'classification')
    if not isinstance(head_type, str) or head_type not in _KINDS:
      known = ' or '.join(_KINDS)
      raise parts.refuse(where, f'head_type={head_type!r:.100}', known)
    kind = _KINDS[head_type] or kind
    labels = inner.take('label2id', None) or labels
    leaves = _flexible(inner, tensors, foreign.plain(name, where), base.cfg, count)
  tensors.finish()
  own = parts.parameters_of(base)
  for path, x in leaves.items():
    if x.shape != own[path].shape:
      raise InputError(str(file), f'{path} {x.shape}', f'{own[path].shape} of the config', _FIX)
  return Head(leaves, _labels(labels, count, where), kind)


def _flexible(config: Keys, tensors: Keys, name: str, cfg, count: int) -> dict[str, np.ndarray]:
  shape = HEADS[cfg.architecture]
  layers = parts.whole(config, 'layers', 2)
  act, pooler = config.take('activation_function', 'tanh'), config.take('use_pooler', False)
  bias = parts.flag(config, 'bias', True)
  config.ignore(('dropout_prob', 'num_labels', 'id2label'))
  config.finish()
  if shape.pooler and (layers, pooler) == (1, True):
    places = {1: 'head/out'}
  elif shape.pooler and (layers, act, pooler) == (2, 'tanh', False):
    places = {1: 'pooler', 4: 'head/out'}
  elif shape.dense and (layers, act, bool(pooler)) == (2, shape.dense, False):
    places = {1: 'head/dense', 4: 'head/out'}
  else:
    found = f'a head of {layers} layers, {act!r:.50}, use_pooler={pooler!r:.50}'
    expected = f'2 layers, {shape.dense or "tanh"}, use_pooler=false'
    more = ', or 1 with use_pooler=true' if shape.pooler else ''
    raise parts.refuse(config.where, found, expected + more)
  leaves, d = {}, cfg.hidden
  for index, place in places.items():
    out = count if place == 'head/out' else d
    own = {'kernel': tensors.take(f'heads.{name}.{index}.weight')}
    if place == 'head/out' and not bias:
      own['bias'] = np.zeros(out, np.float32)
    else:
      own['bias'] = tensors.take(f'heads.{name}.{index}.bias')
    for leaf, x in own.items():
      leaves[f'params/{place}/{leaf}'] = foreign.turned(f'{place}/{leaf}', x)
  return leaves


def _labels(label2id: Any, count: int, where: str) -> tuple[str, ...] | None:
  if not label2id:
    return None
  try:
    names = {int(i): str(name) for name, i in label2id.items()}
  except (AttributeError, TypeError, ValueError):
    names = {}
  if sorted(names) != list(range(count)) or len(names) != len(label2id):
    found = f'label2id of {len(names)} labels'
    raise InputError(where, found, f'one for each of 0 to {count - 1}', 'correct it')
  ordered = tuple(names[i] for i in range(count))
  return None if all(re.fullmatch(r'LABEL_\d+', name) for name in ordered) else ordered


def write(
  leaves: Keys, base: Base, labels, kind: str | None, about: dict, name: str
) -> tuple[dict, dict[str, np.ndarray]]:
  """(head_config.json, tensors); takes the head, and a pooler that is not the base's."""
  cfg, own = base.cfg, parts.parameters_of(base)
  if cfg.pooling != 'cls':
    raise parts.refuse('head', 'a head over the mean', "the architecture's own head")
  if cfg.architecture not in CLASSES:
    known = ', '.join(CLASSES)
    raise parts.refuse('base model', cfg.architecture, f'one that AdapterHub has: {known}')
  count = cfg.num_labels
  names = labels if labels and len(labels) == count else [f'LABEL_{i}' for i in range(count)]
  label2id = {str(label): i for i, label in enumerate(names)}
  found, tensors = {}, {}
  for hf, path in foreign.parameters(cfg).items():
    if path.startswith(('params/head/', 'params/pooler/')):
      x = leaves.take(path) if path.startswith('params/head/') else leaves.take(path, own[path])
      found[path] = foreign.turned(path, x)
      if path.startswith('params/head/'):
        tensors[hf] = found[path]
      if found[path].shape != foreign.turned(path, own[path]).shape:
        raise InputError('head', f'{path} {found[path].shape}', 'the shape of the base', 'mend it')
  pooled = [p for p in found if p.startswith('params/pooler/')]
  moved = [p for p in pooled if not np.array_equal(found[p], foreign.turned(p, own[p]))]
  if not moved and kind != 'multi':
    about = {**about, 'config': None, 'name': None, 'num_labels': count, 'label2id': label2id}
    return about, tensors
  dense = 'pooler' if moved else 'head/dense' if HEADS[cfg.architecture].dense else ''
  config = {
    'head_type': 'multilabel_classification' if kind == 'multi' else 'classification',
    'layers': 2 if dense else 1, 'activation_function': HEADS[cfg.architecture].dense or 'tanh',
    'use_pooler': not dense, 'bias': True, 'dropout_prob': None, 'num_labels': count,
    'label2id': label2id,
  }  # fmt: skip
  places = {1: dense, 4: 'head/out'} if dense else {1: 'head/out'}
  tensors = {
    f'heads.{name}.{k}.{theirs}': found[f'params/{place}/{leaf}']
    for k, place in places.items()
    for leaf, theirs in (('kernel', 'weight'), ('bias', 'bias'))
  }
  model = CLASSES[cfg.architecture].replace('ForSequenceClassification', 'AdapterModel')
  return {**about, 'config': config, 'name': name, 'model_class': model}, tensors
