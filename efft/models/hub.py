"""Checkpoints by folder or Hugging Face id: found, downloaded, read, and their tokenizers.

Nothing in a model folder is imported or unpickled; of its JSON only known keys are read.
"""

import collections
import dataclasses
import json
import logging
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import tokenizers

from efft import files
from efft.errors import EnvironmentProblem, InputError
from efft.models import convert, sentence, weights
from efft.models.encoder import EncoderConfig

log = logging.getLogger(__name__)

_VOCABULARIES = (
  'vocab.txt',
  'vocab.json',
  'merges.txt',
  'sentencepiece.bpe.model',
  'spiece.model',
)
_FILES = (
  'config.json', weights.SINGLE, weights.INDEX, 'model-*.safetensors', 'modules.json',
  f'{sentence.POOLING}/config.json', f'{sentence.DENSE}/config.json',
  f'{sentence.DENSE}/{weights.SINGLE}', 'tokenizer.json', 'tokenizer_config.json',
  'special_tokens_map.json', 'added_tokens.json', *_VOCABULARIES,
)  # fmt: skip
_PROBLEMS = {
  'single_label_classification': 'single',
  'multi_label_classification': 'multi',
  'regression': 'regression',
}


@dataclasses.dataclass(frozen=True)
class Base:
  """A pretrained encoder and where it came from.

  Attributes:
    params: the tree below 'params', f32 numpy arrays.
    name: as the user wrote it.
    sha256: over the weight files, a sentence encoder's head and config.json (`weights.digest`).
    problem: 'single', 'multi' or 'regression', if the checkpoint says so.
    labels: the checkpoint's own class names, if it has real ones.
  """

  cfg: EncoderConfig
  params: dict
  folder: Path
  name: str
  sha256: str
  problem: str | None = None
  labels: tuple[str, ...] | None = None


def load(
  name_or_path: str, *, num_labels: int, pooling: str = 'auto', head: str = 'new', key: jax.Array
) -> Base:
  """Reads an encoder.

  Args:
    name_or_path: see `resolve`.
    num_labels: outputs of the classification head.
    pooling: 'cls', 'mean', or 'auto': what a sentence encoder's 1_Pooling/config.json says, else
      'cls'. A sentence encoder's 'cls' is read by the architecture's own head here.
    head: 'new' draws a classification head with `key`, 'keep' takes the checkpoint's, which of a
      sentence encoder is a linear layer over the mean (`sentence.head`).

  Raises InputError as `resolve`, `weights.Weights`, `convert.config_from_hf`, `convert.from_hf`.
  """
  folder = resolve(name_or_path)
  file = folder / 'config.json'
  config = weights.read_json(file)
  if pooling == 'auto':
    pooling = sentence.pooling(folder)
  cfg = convert.config_from_hf(config, num_labels=num_labels, pooling=pooling, where=str(file))
  tensors = weights.Weights(folder)
  sources = [file, *tensors.files]
  if linear := pooling == 'mean' and sentence.head(folder):
    layer = weights.Weights(linear)
    sources += layer.files
    name = convert.hf_name('head/out/bias', cfg).removesuffix('bias')
    own = {name + key.removeprefix('linear.'): layer[key] for key in layer}
    tensors = collections.ChainMap(own, tensors)
  params = convert.from_hf(tensors, cfg, head=head, key=key, where=str(folder))
  return Base(
    cfg, params, folder, str(name_or_path), weights.digest(sources),
    _PROBLEMS.get(str(config.get('problem_type'))), _labels(config.get('id2label')),
  )  # fmt: skip


def resolve(name_or_path: str) -> Path:
  """The folder of a checkpoint: an existing one, a package's, or a hub id's, downloaded once.

  A hub id that was once downloaded whole needs no network. Raises InputError for a path that is not
  there and for a model the hub does not give, EnvironmentProblem where the hub is out of reach.
  """
  name = str(name_or_path)
  folder = Path(name).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise InputError(name, 'a file', 'a folder with config.json and weights', 'pass its folder')
  from efft.data import packages  # loads nothing heavy, but is of no use to most callers

  if packaged := packages.model_folder(name):
    return packaged
  if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name) or '--' in name or '..' in name:
    fix = 'check the path; a Hugging Face id looks like roberta-base or owner/name'
    raise InputError('model.name', f'no folder {name!r}', 'a folder or a Hugging Face id', fix)
  return _download(name)


def tokenizer(folder: Path, vocab_size: int | None = None) -> tokenizers.Tokenizer:
  """The checkpoint's fast tokenizer, without padding and truncation.

  Without a tokenizer.json, transformers converts the vocabulary, from a copy of the known files
  only. With `vocab_size`, ids that the embedding table does not have are an error.
  """
  file = Path(folder) / 'tokenizer.json'
  if file.is_file():
    try:
      tok = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises Exception itself
      weights.read_json(file)  # names the cause where it is not JSON at all
      found = f'a tokenizer that does not load ({str(error)[:200]!r})'
      raise InputError(str(file), found, 'a tokenizers file', 'download it again') from error
  else:
    tok = _converted(Path(folder))
  tok.no_padding()
  tok.no_truncation()
  if vocab_size is None:
    return tok
  top = max(tok.get_vocab(with_added_tokens=True).values(), default=0)
  if top >= vocab_size:
    raise InputError(
      str(file), f'token id {top}', f'ids below the vocab_size {vocab_size} of config.json',
      'take the tokenizer that belongs to this checkpoint',
    )  # fmt: skip
  return tok


def tokenizer_from(text: str) -> tokenizers.Tokenizer:
  """A tokenizer from the text of a tokenizer.json that efft itself wrote and has verified."""
  return tokenizers.Tokenizer.from_str(text)


def _labels(id2label) -> tuple[str, ...] | None:
  if not isinstance(id2label, dict) or not id2label:
    return None
  names = tuple(id2label.get(str(i)) for i in range(len(id2label)))
  real = all(isinstance(n, str) and not re.fullmatch(r'LABEL_\d+', n) for n in names)
  return names if real and len(set(names)) == len(names) else None


def snapshot(
  name: str,
  patterns: Sequence[str],
  where: str,
  *,
  otherwise: str = 'try again, or pass a folder',
  whole: Callable[[Path], bool] = lambda folder: True,
) -> Path:
  """The files of a hub id that match, downloaded once.

  What another program has put into the cache may lack files that it had no need of, though they are
  `whole` enough to go on with: the hub is asked until it has once been asked for all, and where it
  is out of reach such files are taken as they are.

  Raises InputError for what the hub does not give, EnvironmentProblem where it is out of reach.
  """
  import huggingface_hub
  from huggingface_hub import errors

  from efft.data import packages

  def get(**options):
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns), **options))

  def asked(folder):
    kinds = zlib.crc32(' '.join(patterns).encode())
    return packages.cache_root() / 'hub' / f'{name.replace("/", "--")}-{folder.name}-{kinds:08x}'

  found = None
  try:
    found = get(local_files_only=True)
  except errors.HFValidationError as error:
    fix = 'check it; an id looks like roberta-base or owner/name'
    raise InputError(where, repr(name), 'a folder or a Hugging Face id', fix) from error
  except OSError:  # not in the cache
    pass
  if found is not None and whole(found) and asked(found).exists():
    return found
  try:
    # Else a hub out of reach would go unnoticed: what is in the cache is then all that is found.
    huggingface_hub.HfApi().model_info(name)
    folder = get()
  except Exception as error:
    if found is None:
      raise _refusal(error, name, where, otherwise) from error
    log.info('%s: from the cache, as it is there: the hub cannot be asked for more', name)
    return found
  with files.disk_errors(asked(folder)):
    asked(folder).parent.mkdir(parents=True, exist_ok=True)
  files.atomic_write(asked(folder), '')
  return folder


def _refusal(error: Exception, name: str, where: str, otherwise: str) -> Exception:
  from huggingface_hub import errors

  if isinstance(error, (errors.RepositoryNotFoundError, errors.GatedRepoError)):
    fix = 'check the name; for a private or gated one, log in with `hf auth login` first'
    return InputError(where, repr(name), 'something that the hub gives you', fix)
  # httpx, requests or the hub's own, by version
  reason = str(error).strip().splitlines() or [type(error).__name__]
  return EnvironmentProblem(
    f'{where}: {name} is not in the cache and cannot be downloaded ({reason[0][:200]}); {otherwise}'
  )


def _download(name: str) -> Path:
  otherwise = 'try again, or pass a folder with config.json, model.safetensors and tokenizer.json'
  folder = snapshot(
    name, _FILES, 'model.name', otherwise=otherwise, whole=lambda found: not _missing(found)
  )
  if missing := _missing(folder):
    found = f'{name!r} without {" and ".join(missing)}'
    fix = (
      'a part may be missing from the cache: try again with a network; pickled weights (.bin) are '
      'never opened: take a revision of the model with safetensors'
    )
    raise InputError('model.name', found, 'a whole checkpoint', fix)
  return folder


def _missing(folder: Path) -> list[str]:
  """What a cached snapshot lacks of a checkpoint."""
  has = {
    'config.json': (folder / 'config.json').exists(),
    weights.SINGLE: weights.present(folder),
    'tokenizer.json': any((folder / f).exists() for f in ('tokenizer.json', *_VOCABULARIES)),
  }
  return [name for name, there in has.items() if not there]


def _converted(folder: Path) -> tokenizers.Tokenizer:
  vocabularies = [f for f in _VOCABULARIES if (folder / f).is_file()]
  if not vocabularies:
    fix = 'copy tokenizer.json from the checkpoint'
    raise InputError(str(folder), 'no tokenizer', 'tokenizer.json or a vocabulary file', fix)
  from transformers import AutoTokenizer

  with tempfile.TemporaryDirectory() as temp:
    for file in vocabularies:
      shutil.copyfile(folder / file, Path(temp) / file)
    for file, keys in _TOKENIZER_KEYS.items():
      if (folder / file).is_file():
        content = weights.read_json(folder / file)
        kept = {k: v for k, v in content.items() if keys is None or k in keys}
        (Path(temp) / file).write_text(json.dumps(kept))
    try:
      tok = AutoTokenizer.from_pretrained(temp, use_fast=True, trust_remote_code=False)
      return tok.backend_tokenizer
    except Exception as error:
      found = f'a tokenizer that transformers cannot convert ({str(error)[:200]!r})'
      fix = 'copy tokenizer.json from the checkpoint'
      raise InputError(str(folder), found, ', '.join(vocabularies), fix) from error


_TOKENIZER_KEYS = {
  'config.json': ('model_type',),
  'tokenizer_config.json': (
    'tokenizer_class', 'do_lower_case', 'strip_accents', 'tokenize_chinese_chars', 'model_type',
    'add_prefix_space', 'unk_token', 'sep_token', 'pad_token', 'cls_token', 'mask_token',
    'bos_token', 'eos_token', 'additional_special_tokens', 'added_tokens_decoder',
  ),
  'special_tokens_map.json': None,
  'added_tokens.json': None,
}  # fmt: skip
