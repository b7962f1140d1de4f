"""A whole model that pools by the mean, as sentence-transformers reads it, without torch.

`SentenceTransformer(FOLDER).encode(texts)` gives the logits: an encoder, the mean of its tokens and
a Dense layer without activation, in the order of the id2label of config.json. The encoder itself is
a checkpoint that transformers' AutoModel reads, padded as `hf_format` says.
"""

import json

import numpy as np

from efft.errors import InputError
from efft.interop import foreign, hf_format
from efft.models import convert, sentence
from efft.models.encoder import EncoderConfig

_WHERE = '--format=sentence-transformers'
_CLASSES = {'': 'Transformer', sentence.POOLING: 'Pooling', sentence.DENSE: 'Dense'}


def check(cfg: EncoderConfig) -> None:
  """Raises InputError for an encoder that sentence-transformers does not compute."""
  if cfg.pooling != 'mean':
    raise InputError(
      _WHERE, f"{cfg.architecture}'s own head over the first token",
      'one linear layer over the mean of all tokens', 'use --format=hf',
    )  # fmt: skip
  hf_format.fits(cfg, _WHERE)


def write(model: hf_format.Model) -> tuple[dict[str, bytes], list[str]]:
  """({file name: content}, notes) of a folder.

  Raises:
    InputError: as `check`.
  """
  check(model.cfg)
  cfg, params, notes = hf_format.padded(model.cfg, model.params)
  prefix = convert.NAMES[cfg.architecture][0]
  tensors = {
    name.removeprefix(prefix): x
    for name, x in convert.to_hf(params, cfg).items()
    if name.startswith(prefix)
  }
  head = {name: np.asarray(x, np.float32) for name, x in params['head']['out'].items()}
  linear = {'linear.weight': np.ascontiguousarray(head['kernel'].T), 'linear.bias': head['bias']}
  modules = [
    {'idx': i, 'name': str(i), 'path': path, 'type': f'sentence_transformers.models.{name}'}
    for i, (path, name) in enumerate(_CLASSES.items())
  ]
  pooling = {'word_embedding_dimension': cfg.hidden, 'pooling_mode_mean_tokens': True}
  dense = {
    'in_features': cfg.hidden, 'out_features': cfg.num_labels, 'bias': True,
    'activation_function': sentence.IDENTITY,
  }  # fmt: skip
  length = min(model.max_length, cfg.max_length)
  told = {
    sentence.MODULES: modules,
    'sentence_bert_config.json': {'max_seq_length': length, 'do_lower_case': False},
    f'{sentence.POOLING}/config.json': pooling,
    f'{sentence.DENSE}/config.json': dense,
  }
  contents = {
    **hf_format.checkpoint(model, cfg, f'{hf_format.CLASSES[cfg.architecture]}Model', tensors),
    **{name: json.dumps(value, indent=2).encode() + b'\n' for name, value in told.items()},
    f'{sentence.DENSE}/model.safetensors': foreign.packed(linear, {'format': 'pt'}),
  }
  if cfg.architecture not in ('distilbert', 'electra'):
    notes = [*notes, 'transformers says that the pooler is new: nothing here reads it']
  return contents, notes
