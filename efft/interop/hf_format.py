"""A whole model as Hugging Face's AutoModelForSequenceClassification reads it, without torch.

config.json follows from the encoder's shapes, so it is the same wherever the numbers came from.
What transformers cannot hold is refused (a head over the mean of all tokens) or made to fit without
a change in the logits (layers of unequal width, padded with zeros).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efft.errors import InputError
from efft.interop import foreign
from efft.models import convert
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
_TOKENIZER = (
  'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.txt',
  'vocab.json', 'merges.txt', 'sentencepiece.bpe.model', 'spiece.model',
)  # fmt: skip


def check(cfg: EncoderConfig) -> None:
  """Raises InputError for an encoder that no class of transformers computes."""
  if cfg.pooling != 'cls':
    name = f'{CLASSES[cfg.architecture]}ForSequenceClassification'
    raise InputError(
      '--format=hf', f'a head over the {cfg.pooling} of all tokens',
      f"the head of transformers' {name}, over the first token",
      'train with --config.model.pooling=cls',
    )  # fmt: skip


def write(
  cfg: EncoderConfig,
  params: Mapping,
  *,
  labels: Sequence[str],
  kind: str,
  tokenizer: str,
  max_length: int,
  base: Path | None,
) -> tuple[dict[str, bytes], list[str]]:
  """({file name: content}, notes) of a checkpoint.

  Args:
    cfg, params: the merged model.
    labels: class names in the order of the logits; () for regression.
    kind: 'single', 'multi' or 'regression'.
    tokenizer: the text of tokenizer.json.
    max_length: tokens that the model was trained on.
    base: folder of the checkpoint that it comes from, for the tokenizer's other files; None where
      that is gone.

  Raises:
    InputError: as `check`.
  """
  check(cfg)
  whole, params, notes = padded(cfg, params)
  tensors = convert.to_hf(params, whole)
  contents = {
    'config.json': json.dumps(_config(whole, labels, kind), indent=2).encode() + b'\n',
    'model.safetensors': foreign.packed(tensors, {'format': 'pt'}),
    'tokenizer.json': tokenizer.encode(),
  }
  found = {name: base / name for name in _TOKENIZER if base and (base / name).is_file()}
  contents |= {name: path.read_bytes() for name, path in found.items()}
  if 'tokenizer_config.json' in contents:
    given = json.loads(contents['tokenizer_config.json'])
  else:
    given = _tokenizer_config(cfg, json.loads(tokenizer))
  given.pop('auto_map', None)
  given['model_max_length'] = min(max_length, cfg.max_length)
  contents['tokenizer_config.json'] = json.dumps(given, indent=2, ensure_ascii=False).encode()
  return contents, notes


def padded(cfg: EncoderConfig, params: Mapping) -> tuple[EncoderConfig, Mapping, list[str]]:
  """The same function with one width for all layers, as transformers' configs want it.

  Heads are as many as fill the hidden size, MLPs as wide as the widest. What is added is zero on
  the side that leads back into the residual stream, so nothing of it arrives there.
  """
  heads, width = cfg.hidden // cfg.head_dim, max(cfg.mlp)
  if cfg.hidden % cfg.head_dim or max(cfg.heads) > heads:
    raise InputError(
      '--format=hf', f'heads of {cfg.head_dim} in a hidden size of {cfg.hidden}',
      'heads that fill the hidden size', 'keep the bundle',
    )  # fmt: skip
  if set(cfg.heads) == {heads} and set(cfg.mlp) == {width}:
    return cfg, params, []
  whole = dataclasses.replace(cfg, heads=(heads,) * cfg.layers, mlp=(width,) * cfg.layers)
  out = dict(params)
  for i in range(cfg.layers):
    layer = out[f'layer_{i}'] = dict(out[f'layer_{i}'])
    attention = {name: dict(linear) for name, linear in layer['attention'].items()}
    for name in ('query', 'key', 'value'):
      attention[name] = _wider(attention[name], cfg.hidden, -1)
    attention['out'] = _wider(attention['out'], cfg.hidden, 0)
    layer['attention'] = attention
    layer['mlp'] = {
      'up': _wider(layer['mlp']['up'], width, -1),
      'down': _wider(layer['mlp']['down'], width, 0),
    }
  note = (
    f'layers of {min(cfg.heads)} to {max(cfg.heads)} heads and {min(cfg.mlp)} to {max(cfg.mlp)} '
    f'units are padded with zeros to {heads} and {width}: the logits are the same, the speed is '
    'that of the full size'
  )
  return whole, out, [note]


def _wider(linear: Mapping, size: int, axis: int) -> dict:
  """A linear with zeros added to its outputs (axis -1) or inputs (axis 0) up to `size`."""

  def grown(x, axis):
    more = [(0, 0)] * x.ndim
    more[axis] = (0, size - x.shape[axis])
    return np.pad(np.asarray(x), more)

  out = {**linear, 'kernel': grown(linear['kernel'], axis)}
  return {**out, 'bias': grown(linear['bias'], -1)} if axis == -1 else out


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


def _config(cfg: EncoderConfig, labels: Sequence[str], kind: str) -> dict:
  """config.json; `convert.config_from_hf` reads it back."""
  names = list(labels) or ['LABEL_0']
  return convert.config_to_hf(cfg) | {
    'architectures': [f'{CLASSES[cfg.architecture]}ForSequenceClassification'],
    'id2label': {str(i): name for i, name in enumerate(names)},
    'label2id': {name: i for i, name in enumerate(names)},
    'problem_type': _PROBLEMS[kind],
  }
