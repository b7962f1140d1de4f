"""A whole model as Hugging Face's AutoModelForSequenceClassification reads it, without torch.

config.json follows from the encoder's shapes, so it is the same wherever the numbers came from.
What transformers cannot hold is refused (a head over the mean of all tokens, which is for
`st_format`; heads that do not fit into the hidden size) or made to fit without a change in
the logits (layers of unequal width, or without heads or units, padded with zeros).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from efft.errors import InputError
from efft.interop import foreign
from efft.models import convert, weights
from efft.models.encoder import EncoderConfig

CLASSES = {
  'bert': 'Bert',
  'roberta': 'Roberta',
  'xlm-roberta': 'XLMRoberta',
  'camembert': 'Camembert',
  'distilbert': 'DistilBert',
  'electra': 'Electra',
}
_PROBLEMS = {
  'single': 'single_label_classification',
  'multi': 'multi_label_classification',
  'regression': 'regression',
}
_SPECIAL = {
  'pad': ('[PAD]', '<pad>'),
  'unk': ('[UNK]', '<unk>'),
  'cls': ('[CLS]', '<s>'),
  'sep': ('[SEP]', '</s>'),
  'mask': ('[MASK]', '<mask>'),
}
# Copied where the base model has them; nothing of it is executed by transformers.
_TOKENIZER = ('tokenizer_config.json', 'special_tokens_map.json')
_VOCABULARY = (
  'added_tokens.json', 'vocab.txt', 'vocab.json', 'merges.txt', 'sentencepiece.bpe.model',
  'spiece.model',
)  # fmt: skip


def check(cfg: EncoderConfig) -> None:
  """Raises InputError for an encoder that no class of transformers computes."""
  if cfg.pooling != 'cls':
    name = f'{CLASSES[cfg.architecture]}ForSequenceClassification'
    raise InputError(
      '--format=hf', f'a head over the {cfg.pooling} of all tokens',
      f"the head of transformers' {name}, over the first token",
      'use --format=sentence-transformers, or train with --config.model.pooling=cls',
    )  # fmt: skip
  fits(cfg, '--format=hf')


def fits(cfg: EncoderConfig, where: str) -> None:
  """Raises InputError, which names `where`, for shapes that no config.json of transformers says."""
  if not cfg.layers:
    raise InputError(where, 'no layers', 'a layer or more', 'keep one, or keep the bundle')
  most = cfg.hidden // cfg.head_dim
  if any(cfg.heads) and (cfg.hidden % cfg.head_dim or max(cfg.heads) > most):
    # Zeros cannot fill the hidden size up: LayerNorm would take their mean and variance, too.
    raise InputError(
      where,
      f'up to {max(cfg.heads)} heads of {cfg.head_dim} in a hidden size of {cfg.hidden}',
      f'a multiple of {cfg.head_dim} and at most {most} heads a layer, as heads fill the hidden '
      'size in transformers',
      'prune so many heads, or fewer hidden dimensions, or keep the bundle',
    )


class Model(NamedTuple):
  """A merged model, and what it is to be written with.

  Attributes:
    cfg, params: the model.
    labels: class names in the order of the logits; () for regression.
    kind: 'single', 'multi' or 'regression'.
    tokenizer: the text of tokenizer.json.
    max_length: tokens that it was trained on.
    base: folder of the checkpoint that it comes from, for the tokenizer's other files (not those
      that spell out a vocabulary which is larger than the model's); None where that is gone.
  """

  cfg: EncoderConfig
  params: Mapping
  labels: Sequence[str]
  kind: str
  tokenizer: str
  max_length: int
  base: Path | None = None


def write(model: Model) -> tuple[dict[str, bytes], list[str]]:
  """({file name: content}, notes) of a checkpoint.

  Raises:
    InputError: as `check`.
  """
  check(model.cfg)
  cfg, params, notes = padded(model.cfg, model.params)
  name = f'{CLASSES[cfg.architecture]}ForSequenceClassification'
  return checkpoint(model, cfg, name, convert.to_hf(params, cfg)), notes


def checkpoint(
  model: Model, cfg: EncoderConfig, name: str, tensors: Mapping[str, np.ndarray]
) -> dict[str, bytes]:
  """The files of transformers' class `name`; `cfg` is the model's, `padded`."""
  return {
    'config.json': json.dumps(_config(cfg, name, model), indent=2).encode() + b'\n',
    'model.safetensors': foreign.packed(tensors, {'format': 'pt'}),
    **_tokenizer_files(model),
  }


def _tokenizer_files(model: Model) -> dict[str, bytes]:
  """What transformers' AutoTokenizer reads."""
  cfg, tokenizer, base = model.cfg, model.tokenizer, model.base
  contents = {'tokenizer.json': tokenizer.encode()}
  pruned = base is not None and _vocab_size(base) not in (None, cfg.vocab_size)
  names = _TOKENIZER if pruned else _TOKENIZER + _VOCABULARY
  found = {name: base / name for name in names if base and (base / name).is_file()}
  contents |= {name: path.read_bytes() for name, path in found.items()}
  if 'tokenizer_config.json' in contents:
    given = json.loads(contents['tokenizer_config.json'])
  else:
    given = _tokenizer_config(cfg, json.loads(tokenizer))
  if pruned and 'added_tokens_decoder' in given:
    given['added_tokens_decoder'] = {
      str(token.pop('id')): token for token in json.loads(tokenizer).get('added_tokens') or ()
    }
  given.pop('auto_map', None)
  given['model_max_length'] = min(model.max_length, cfg.max_length)
  contents['tokenizer_config.json'] = json.dumps(given, indent=2, ensure_ascii=False).encode()
  return contents


def padded(cfg: EncoderConfig, params: Mapping) -> tuple[EncoderConfig, Mapping, list[str]]:
  """The same function with one width for all layers, as transformers' configs want it.

  Of an encoder that passes `check`. Heads are as many as fill the hidden size (one, where no layer
  has any), MLPs as wide as the widest. What is added is zero on the side that leads back into the
  residual stream, so nothing of it arrives there; of a block without heads or units the bias is
  left, as before.
  """
  head_dim = cfg.head_dim if any(cfg.heads) else cfg.hidden
  heads, width, size = cfg.hidden // head_dim, max(1, *cfg.mlp), cfg.hidden
  if set(cfg.heads) == {heads} and set(cfg.mlp) == {width}:
    return cfg, params, []
  shapes = {'heads': (heads,) * cfg.layers, 'mlp': (width,) * cfg.layers}
  out = dict(params)
  for i in range(cfg.layers):
    layer = out[f'layer_{i}']
    attention, mlp = layer['attention'], layer['mlp']
    out[f'layer_{i}'] = {
      **layer,
      'attention': {
        name: _filled(attention.get(name, {}), size, size)
        for name in ('query', 'key', 'value', 'out')
      },
      'mlp': {
        'up': _filled(mlp.get('up', {}), size, width),
        'down': _filled(mlp['down'], width, size),
      },
    }
  note = (
    f'layers of {min(cfg.heads)} to {max(cfg.heads)} heads and {min(cfg.mlp)} to {max(cfg.mlp)} '
    f'units are padded with zeros to {heads} and {width}: the logits are the same, the speed is '
    'that of the full size'
  )
  return dataclasses.replace(cfg, head_dim=head_dim, **shapes), out, [note]


def _filled(linear: Mapping, inputs: int, outputs: int) -> dict[str, np.ndarray]:
  """A linear layer of that size: what the given one has, if anything, and zeros after it."""

  def grown(leaf, *shape):
    x = np.asarray(linear[leaf]) if leaf in linear else np.zeros([0] * len(shape), np.float32)
    return np.pad(x, [(0, whole - part) for whole, part in zip(shape, x.shape, strict=True)])

  return {'kernel': grown('kernel', inputs, outputs), 'bias': grown('bias', outputs)}


def _vocab_size(base: Path) -> int | None:
  file = base / 'config.json'
  return weights.read_json(file).get('vocab_size') if file.is_file() else None


def _tokenizer_config(cfg: EncoderConfig, tokenizer: Mapping) -> dict:
  """What makes transformers take tokenizer.json as it is, whatever the architecture's own class."""
  vocabulary = tokenizer['model']['vocab']
  known = {token for token, *_ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
  known |= {token['content'] for token in tokenizer.get('added_tokens') or ()}
  special = {
    f'{name}_token': next((token for token in spellings if token in known), None)
    for name, spellings in _SPECIAL.items()
  }
  inputs = ['input_ids', *(['token_type_ids'] if cfg.token_types > 1 else []), 'attention_mask']
  return {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'model_input_names': inputs,
    **{name: token for name, token in special.items() if token is not None},
  }


def _config(cfg: EncoderConfig, name: str, model: Model) -> dict:
  """config.json of transformers' class `name`; `convert.config_from_hf` reads it back."""
  names = list(model.labels) or ['LABEL_0']
  return convert.config_to_hf(cfg) | {
    'architectures': [name],
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
    'problem_type': _PROBLEMS[model.kind],
  }
