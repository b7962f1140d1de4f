"""Checkpoint folders of every origin: shards, pickles, impostors, damage, pooling, tokenizers."""

import hashlib
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from efft import tree
from efft.data import packages
from efft.errors import EnvironmentProblem, InputError
from efft.models import hub, weights

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
SINGLE, INDEX = weights.SINGLE, weights.INDEX


@pytest.fixture
def folder(tmp_path):
  """A copy of the BERT fixture, to be damaged."""
  return pathlib.Path(shutil.copytree(FIXTURES / 'bert', tmp_path / 'bert'))


def load(folder, **options):
  options = {'num_labels': 3, 'head': 'keep', 'key': jax.random.key(0)} | options
  return hub.load(str(folder), **options)


def refusal(folder, **options):
  with pytest.raises(InputError) as caught:
    load(folder, **options)
  return str(caught.value)


def edit(file, **changes):
  file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder):
  """Splits the single file in two, with an index; returns the index file."""
  tensors = load_file(folder / SINGLE)
  (folder / SINGLE).unlink()
  names = sorted(tensors)
  weight_map = {}
  for i, part in enumerate((names[::2], names[1::2]), 1):
    file = f'model-0000{i}-of-00002.safetensors'
    save_file({name: tensors[name] for name in part}, folder / file)
    weight_map |= dict.fromkeys(part, file)
  (folder / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))
  return folder / INDEX


def safetensors_bytes(header, data=b''):
  raw = header if isinstance(header, bytes) else json.dumps(header).encode()
  return struct.pack('<Q', len(raw)) + raw + data


def same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def test_load(folder):
  base = load(folder)
  assert base.folder == folder and base.name == str(folder)
  assert (base.cfg.pooling, base.problem) == ('cls', 'single')
  assert base.labels == ('negative', 'neutral', 'positive')
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(base.params))


def test_placeholder_labels_are_none(folder):
  edit(folder / 'config.json', id2label={'0': 'LABEL_0', '1': 'LABEL_1', '2': 'LABEL_2'})
  assert load(folder).labels is None


def test_shards(folder):
  whole = load(folder)
  shard(folder)
  parts = load(folder)
  assert same(parts.params, whole.params) and parts.sha256 != whole.sha256


def test_sha256_covers_weights_and_config_and_is_reproducible(folder):
  before = load(folder).sha256
  lines = ''.join(
    f'{hashlib.sha256((folder / f).read_bytes()).hexdigest()}  {f}\n'
    for f in ('config.json', SINGLE)
  )
  assert before == hashlib.sha256(lines.encode()).hexdigest()
  (folder / 'README.md').write_text('not covered')
  assert load(folder).sha256 == before
  edit(folder / 'config.json', hidden_dropout_prob=0.2)
  assert load(folder).sha256 != before


def test_bfloat16_file(folder):
  half = {k: v.astype(ml_dtypes.bfloat16) for k, v in load_file(folder / SINGLE).items()}
  save_file(half, folder / SINGLE)
  kernel = load(folder).params['head']['out']['kernel']
  np.testing.assert_array_equal(kernel, half['classifier.weight'].astype(np.float32).T)


@pytest.mark.parametrize(
  'file',
  ['../model.safetensors', '/etc/x.safetensors', 'a/b.safetensors', 'a\\b.safetensors', '..',
   'model.bin', '.safetensors', 'x\0.safetensors', 7, None],
)  # fmt: skip
def test_weight_map_must_hold_plain_names(folder, file):
  index = shard(folder)
  weight_map = json.loads(index.read_text())['weight_map']
  edit(index, weight_map=weight_map | {'classifier.bias': file})
  text = refusal(folder)
  assert "'classifier.bias' in" in text and 'the name of a .safetensors file' in text


@pytest.mark.parametrize('content', [{}, {'weight_map': {}}, {'weight_map': ['x']}])
def test_index_without_a_map(folder, content):
  shard(folder).write_text(json.dumps(content))
  assert 'no weight_map' in refusal(folder)


def test_missing_shard(folder):
  shard(folder)
  (folder / 'model-00002-of-00002.safetensors').unlink()
  assert 'model-00002-of-00002.safetensors: found no such file' in refusal(folder)


def test_index_and_shards_must_agree(folder):
  index = shard(folder)
  weight_map = json.loads(index.read_text())['weight_map']
  other = sorted(set(weight_map.values()) - {weight_map['classifier.bias']})[0]
  edit(index, weight_map=weight_map | {'classifier.bias': other})
  assert "'classifier.bias'" in refusal(folder)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt'])
def test_pickles_are_never_opened(folder, name):
  class Bomb:
    def __reduce__(self):
      return os.mkdir, (str(folder / 'exploded'),)

  import pickle

  (folder / name).write_bytes(pickle.dumps(Bomb()))
  load(folder)  # beside safetensors it does not matter
  (folder / SINGLE).rename(folder / 'other')
  text = refusal(folder)
  assert f"only pickled weights ('{name}')" in text and 'save_pretrained' in text
  (folder / name).rename(folder / SINGLE)
  assert 'a pickle under another name' in refusal(folder)
  assert not (folder / 'exploded').exists()


def test_no_weights(folder):
  (folder / SINGLE).unlink()
  assert f'found no weights, expected {SINGLE}' in refusal(folder)


LFS = b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n'
F32 = {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 4]}


@pytest.mark.parametrize(
  'content, words',
  [
    (b'', 'an empty file'),
    (b'abc', 'a truncated file of 3 bytes'),
    (LFS, 'a Git LFS pointer'),
    (b'<!DOCTYPE html><html><body>Sign in</body></html>', 'a web page'),
    (b'\n<html>' + b' ' * 600, 'a web page'),
    (b'PK\x03\x04' + bytes(range(200)), 'a pickled PyTorch file'),
    (b'x' * 100, 'a header of 8680820740569200760 bytes'),
    (struct.pack('<Q', 1 << 40) + b'{}', 'a header of 1099511627776 bytes'),
    (safetensors_bytes({'a': F32})[:20], 'a truncated file of 20 bytes'),
    (safetensors_bytes({'a': F32}, b'123'), '(a truncated file)'),
    (safetensors_bytes({'a': F32}, b'12345'), 'bytes, expected the'),
    (safetensors_bytes(b'{"a": ' + b'[' * 100_000), 'what is not JSON'),
    (safetensors_bytes(b'{"a": 1, "a": 2}'), "duplicate key 'a'"),
    (safetensors_bytes(b'\xff\xfe'), 'what is not JSON'),
    (safetensors_bytes([]), 'a JSON list, expected a dict'),
    (safetensors_bytes({'a': F32 | {'shape': [2]}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': F32 | {'shape': [-1]}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': F32 | {'shape': [True]}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': F32 | {'shape': [1 << 60, 1 << 60]}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': F32 | {'dtype': 'F31'}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': F32 | {'data_offsets': [4, 0]}}, b'1234'), "'a' described by"),
    (safetensors_bytes({'a': 3}, b'1234'), "'a' described by '3'"),
    (safetensors_bytes({'a': F32, 'b': F32}, b'1234'), 'a gap or an overlap'),
    (safetensors_bytes({'a': F32 | {'data_offsets': [4, 8]}}, bytes(8)), 'a gap or an overlap'),
    (safetensors_bytes({'a\n\x1b[2J': F32}, b'1234'), "'a\\n\\x1b[2J' described by"),
  ],
)
def test_damaged_weights_are_refused_with_the_cause(folder, content, words):
  (folder / SINGLE).write_bytes(content)
  text = refusal(folder)
  assert words in text and SINGLE in text and len(text) < 1000


def test_interrupted_download(folder):
  whole = (folder / SINGLE).read_bytes()
  (folder / SINGLE).write_bytes(whole[:-1000])
  assert f'found {len(whole) - 1000} bytes (a truncated file)' in refusal(folder)


def test_weights_that_are_not_a_regular_file(folder):
  (folder / SINGLE).unlink()
  os.mkfifo(folder / SINGLE)
  assert 'not a regular file' in refusal(folder)


def test_non_finite_and_wrong_dtype_are_named_with_the_folder(folder):
  tensors = load_file(folder / SINGLE)
  save_file(tensors | {'classifier.bias': np.array([1, np.nan, 2], np.float32)}, folder / SINGLE)
  assert f'{folder}: classifier.bias: found 1 of 3 values NaN' in refusal(folder)
  save_file(tensors | {'classifier.bias': np.arange(3, dtype=np.int32)}, folder / SINGLE)
  assert f'{folder}: classifier.bias: found dtype int32' in refusal(folder)


@pytest.mark.parametrize(
  'content, words',
  [
    (None, 'no such file'),
    (b'', 'an empty file'),
    (LFS, 'a Git LFS pointer'),
    (b'<html>', 'a web page'),
    (b'{"model_type": ', 'what is not JSON'),
    (b'[' * 100_000, 'what is not JSON'),
    (b'[]', 'a JSON list'),
    (b'{"vocab_size": 1, "vocab_size": 2}', "duplicate key 'vocab_size'"),
    (b'{"vocab_size": ' + b'9' * 5000 + b'}', 'what is not JSON'),
    (b'{}', 'model_type None'),
    (b' ' * (17 << 20), 'more than'),
  ],
)
def test_damaged_config(folder, content, words):
  (folder / 'config.json').unlink()
  if content is not None:
    (folder / 'config.json').write_bytes(content)
  text = refusal(folder)
  assert words in text and 'config.json' in text and len(text) < 1000


def test_nothing_in_the_folder_is_imported(folder):
  (folder / 'evil.py').write_text('raise SystemExit("imported")')
  edit(folder / 'config.json', auto_map={'AutoModel': 'evil.Model', 'AutoConfig': 'evil.C'})
  load(folder)
  hub.tokenizer(folder)
  assert not (folder / '__pycache__').exists()


def pooling(folder, path='1_Pooling', modules=True, **config):
  place = folder / path
  place.mkdir(parents=True)
  (place / 'config.json').write_text(json.dumps(config))
  if modules:
    types = [('', 'Transformer'), (path, 'Pooling'), ('2_Normalize', 'Normalize')]
    listing = [{'path': p, 'type': f'sentence_transformers.models.{t}'} for p, t in types]
    (folder / 'modules.json').write_text(json.dumps(listing))


@pytest.mark.parametrize('modules', [True, False])
@pytest.mark.parametrize(
  'config, mode',
  [
    ({'pooling_mode_mean_tokens': True, 'pooling_mode_cls_token': False}, 'mean'),
    ({'pooling_mode_mean_tokens': False, 'pooling_mode_cls_token': True}, 'cls'),
    ({'pooling_mode': 'mean', 'embedding_dimension': 32}, 'mean'),
  ],
)
def test_auto_pooling_asks_the_sentence_encoder(folder, config, mode, modules):
  pooling(folder, modules=modules, **config)
  assert load(folder).cfg.pooling == mode
  assert load(folder, pooling='cls').cfg.pooling == 'cls'


def test_auto_pooling_follows_modules_json(folder):
  pooling(folder, path='3_Pooling', pooling_mode_mean_tokens=True)
  assert load(folder).cfg.pooling == 'mean'
  (folder / 'modules.json').write_text('[]')
  assert load(folder).cfg.pooling == 'cls'
  listing = [{'path': '../elsewhere', 'type': 'sentence_transformers.models.Pooling'}]
  (folder / 'modules.json').write_text(json.dumps(listing))
  assert "'../elsewhere'" in refusal(folder)


@pytest.mark.parametrize(
  'config, words',
  [
    ({'pooling_mode_max_tokens': True}, "pooling by 'max'"),
    ({'pooling_mode_max_tokens': True, 'pooling_mode_mean_tokens': True}, "'max and mean'"),
    ({'pooling_mode': 'lasttoken'}, "'lasttoken'"),
    ({'pooling_mode': ['mean']}, "['mean']"),
    ({}, "pooling by ''"),
  ],
)
def test_other_poolings_ask_for_a_choice(folder, config, words):
  pooling(folder, **config)
  text = refusal(folder)
  assert words in text and 'set model.pooling=mean or model.pooling=cls' in text
  assert load(folder, pooling='mean').cfg.pooling == 'mean'


def test_tokenizers_of_the_fixtures():
  bert, roberta = (hub.tokenizer(FIXTURES / n, load(FIXTURES / n).cfg.vocab_size)
                   for n in ('bert', 'roberta'))  # fmt: skip
  pair = bert.encode('A great film', 'dull')
  assert pair.tokens[0] == '[CLS]' and pair.tokens.count('[SEP]') == 2
  assert set(pair.type_ids) == {0, 1} and '[UNK]' not in pair.tokens
  pair = roberta.encode('A great film', 'dull 漢')
  assert (pair.ids[0], pair.ids[-1], pair.ids.count(2)) == (0, 2, 3) and 3 not in pair.ids
  assert roberta.token_to_id('<pad>') == 1


def test_tokenizer_has_no_padding_and_no_truncation(folder):
  tok = hub.tokenizer(folder)
  tok.enable_padding(length=50)
  tok.enable_truncation(3)
  tok.save(str(folder / 'tokenizer.json'))
  tok = hub.tokenizer(folder)
  assert tok.padding is None and tok.truncation is None


def test_tokenizer_refusals(folder):
  with pytest.raises(InputError, match='token id 149, expected ids below the vocab_size 100'):
    hub.tokenizer(folder, vocab_size=100)
  file = folder / 'tokenizer.json'
  for content, words in ((LFS, 'a Git LFS pointer'), (b'{"model": 1}', 'does not load')):
    file.write_bytes(content)
    with pytest.raises(InputError, match=words):
      hub.tokenizer(folder)
  file.unlink()
  with pytest.raises(InputError, match='no tokenizer'):
    hub.tokenizer(folder)


def test_tokenizer_from_a_vocabulary(folder):
  pytest.importorskip('transformers')
  tok = hub.tokenizer(folder)
  vocab = tok.get_vocab()
  (folder / 'tokenizer.json').unlink()
  (folder / 'vocab.txt').write_text('\n'.join(sorted(vocab, key=vocab.get)) + '\n')
  (folder / 'tokenizer_config.json').write_text(
    json.dumps({'auto_map': {'AutoTokenizer': ['evil.Tok', 'evil.Tok']}, 'do_lower_case': True})
  )
  (folder / 'evil.py').write_text('raise SystemExit("imported")')
  text = 'A gorgeous, witty movie'
  assert hub.tokenizer(folder).encode(text, 'dull').ids == tok.encode(text, 'dull').ids


def test_resolve_takes_folders_and_refuses_what_is_none(folder, tmp_path, monkeypatch):
  assert hub.resolve(folder) == folder
  monkeypatch.chdir(tmp_path)
  assert hub.resolve('bert') == pathlib.Path('bert')
  for name in ('./nowhere', '../nowhere', '/no/where', 'a/b/c', 'a..b', '', '~nobody/x', 'a b'):
    if name:
      with pytest.raises(InputError, match='a folder or a Hugging Face id'):
        hub.resolve(name)
  with pytest.raises(InputError, match='found a file'):
    hub.resolve(folder / 'config.json')


def test_resolve_asks_the_packages(folder, monkeypatch):
  monkeypatch.setattr(packages, 'model_folder', {'all-MiniLM-L6-v2': folder}.get)
  assert hub.resolve('all-MiniLM-L6-v2') == folder


@pytest.fixture
def offline(tmp_path, monkeypatch):
  """An empty hub cache and no network; yields the folder where owner/tiny would be cached."""
  from huggingface_hub import constants

  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  repo = tmp_path / 'hub' / 'models--owner--tiny'
  (repo / 'refs').mkdir(parents=True)
  (repo / 'refs' / 'main').write_text('0' * 40)
  return repo / 'snapshots' / ('0' * 40)


def test_a_cached_hub_id_needs_no_network(offline):
  shutil.copytree(FIXTURES / 'bert', offline)
  base = load('owner/tiny')
  assert base.folder == offline and base.name == 'owner/tiny'


def test_what_another_program_has_cached_is_completed_once(folder, tmp_path, monkeypatch):
  """transformers leaves a sentence encoder without the files that say how it pools."""
  import huggingface_hub

  asked = []

  def download(name, allow_patterns, local_files_only=False):
    asked.append('cache' if local_files_only else 'hub')
    if not local_files_only:
      (folder / '1_Pooling').mkdir(exist_ok=True)
      (folder / '1_Pooling' / 'config.json').write_text('{"pooling_mode_mean_tokens": true}')
    return str(folder)

  class Api:
    def model_info(self, name):
      if offline:
        raise ConnectionError('no network')

  monkeypatch.setenv('EFFT_CACHE', str(tmp_path / 'efft'))
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.setattr(huggingface_hub, 'HfApi', Api)
  offline = True
  assert load('owner/tiny').cfg.pooling == 'cls' and asked == ['cache']
  offline = False
  assert load('owner/tiny').cfg.pooling == 'mean' and asked[1:] == ['cache', 'hub']
  offline = True
  assert load('owner/tiny').cfg.pooling == 'mean' and asked[3:] == ['cache']


@pytest.mark.parametrize('name', ['roberta-base-', 'runs/-abc', 'a.git', 'owner/' + 'a' * 120])
def test_names_that_the_hub_does_not_know_as_names_are_refused(name, offline):
  with pytest.raises(InputError, match='a folder or a Hugging Face id'):
    hub.resolve(name)


def test_a_hub_id_that_is_not_in_the_cache_says_what_to_do(offline):
  with pytest.raises(EnvironmentProblem, match='not in the cache and cannot be downloaded'):
    hub.resolve('owner/other')


def test_half_a_checkpoint_in_the_cache_is_not_taken_for_one(offline):
  shutil.copytree(FIXTURES / 'bert', offline)
  shard(offline)
  (offline / 'model-00002-of-00002.safetensors').unlink()
  (offline / 'tokenizer.json').unlink()
  with pytest.raises(InputError, match='without model.safetensors and tokenizer.json'):
    hub.resolve('owner/tiny')


def test_import_needs_neither_torch_nor_transformers():
  code = (
    'import sys, efft.models.hub; '
    'print([m for m in ("torch", "transformers", "huggingface_hub") if m in sys.modules])'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == '[]'
