"""Checkpoints of HF PEFT: read, compared with its logits, written again, and refused."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import numpy as np
import peer_files
import pytest
from safetensors.numpy import load_file, save_file

from efft import config, transfer, tree
from efft.errors import InputError
from efft.interop import foreign, peft_format, peft_targets
from efft.models import hub
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base as peft

FOLDER = peer_files.FIXTURES / 'peft'
CONFIG, WEIGHTS = peft_format.CONFIG, peft_format.WEIGHTS[0]
# Trained without a head beside them.
HEADLESS = ('lora_no_task_type', 'trainable_tokens')
FIXTURES = [
  f'{path.parent.parent.name}/{path.parent.name}'
  for path in sorted(FOLDER.glob('*/*/expected.npz'))
  if path.parent.name not in HEADLESS
]
# Written otherwise than they came: beside the base as it was; without copies of the base's head;
# only the half of R that acts; what is added to biases as a difference of them.
OTHERWISE = ('lora_pissa', 'lora_bias_all', 'boft', 'beft')
# Whose leaves the checkpoint gives: its rows are of tokens that no text has.
UNSEEN = ('lora_token_indices',)


@functools.cache
def encoder(architecture):
  return peer_files.encoder(architecture)


def batch_of(folder, cfg):
  with np.load(folder / 'expected.npz') as expected:
    ids = expected['input_ids'].astype(np.int32)
    types = expected['token_type_ids'].astype(np.int32) if cfg.token_types > 1 else ids * 0
    return (ids, expected['attention_mask'].astype(bool), types), expected['logits']


def restored(adapter, base):
  return transfer.restored(peft.build(adapter.method), adapter.leaves, base.params)


def logits(adapter, base, batch):
  """As a bundle of it computes them."""
  deltas, values = peft.build(adapter.method), restored(adapter, base)
  delta = peft.expand(deltas, values.get('delta', {}))
  model = Encoder(base.cfg, Hooks(tap=peft.attach(deltas)))
  return jax.jit(model.apply)({'params': values['params'], 'delta': delta}, *batch)


def written(adapter, base, folder):
  folder.mkdir()
  for name, content in peft_format.write(adapter, base).items():
    (folder / name).write_bytes(content)
  return folder


def close(found, expected, tolerance=1e-5):
  np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('fixture', FIXTURES)
def test_what_peft_wrote_gives_its_logits_and_is_written_again(fixture, tmp_path):
  folder = FOLDER / fixture
  base = encoder(folder.parent.name)
  adapter = peft_format.read(folder, base)
  batch, expected = batch_of(folder, base.cfg)
  close(logits(adapter, base, batch), expected)
  head = {path: x for path, x in adapter.leaves.items() if path.startswith('params/head/')}
  flat = tree.flatten({'params': base.params}) | head
  without = peer_files.plain(base.cfg)(tree.unflatten(flat), *batch)
  moves = np.abs(without - expected).max() > 1e-4
  assert moves or folder.name in ('lora_lora_bias', *UNSEEN)

  # What a run needs to hold it and to train on.
  tree.labels(restored(adapter, base), adapter.rules)
  resolved = config.resolve({'task': {'name': '-'}, 'method': adapter.method})['method']
  again = written(adapter._replace(method=resolved), base, tmp_path / 'again')
  back = peft_format.read(again, base)
  if folder.name == 'lora_pissa':
    close(logits(back, base, batch), expected)
    return
  assert back.method == adapter.method and back.rules == adapter.rules
  assert back.leaves.keys() == adapter.leaves.keys()
  for path, x in adapter.leaves.items():
    close(back.leaves[path], x, 1e-7)
  if folder.name not in OTHERWISE:
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
  else:
    names = {
      name
      for name in load_file(folder / WEIGHTS)
      if not re.search(r'original_module|modules_to_save', name)
    }
    assert load_file(again / WEIGHTS).keys() == names


def test_prefixes_of_roberta_are_read_and_not_written():
  """The library wrote the file, and cannot compute with it today."""
  base = encoder('roberta')
  adapter = peft_format.read(FOLDER / 'roberta' / 'prefix', base)
  assert adapter.method['prefix']['shift']
  with pytest.raises(InputError, match='a prefix for roberta, with which PEFT fails'):
    peft_format.write(adapter, base)


def test_a_config_names_the_modules_that_it_named():
  base = encoder('bert')
  for name in ('lora_default', 'ia3_default', 'lora_layer1only', 'ln_tuning', 'lora_pattern'):
    files = peft_format.write(peft_format.read(FOLDER / 'bert' / name, base), base)
    new, old = json.loads(files[CONFIG]), json.loads((FOLDER / 'bert' / name / CONFIG).read_text())
    where, names = 'x', peft_targets.names(base.cfg).modules
    keys = ('target_modules', 'layers_to_transform', 'layers_pattern')
    found = [
      peft_targets.selected(
        foreign.Keys({key: x.get(key) for key in keys}, where), names, ('classifier',)
      )
      for x in (new, old)
    ]
    assert found[0] == found[1]
    for key in ('r', 'lora_alpha', 'peft_type', 'modules_to_save', 'task_type', 'bias'):
      assert new.get(key) == old.get(key)
    assert sorted(new['target_modules']) == sorted(old['target_modules']) or 'layer1' in name


def copy(fixture, folder, tensors=None, **keys):
  """A fixture with tensors and keys of the config changed; None takes a tensor away."""
  shutil.copytree(FOLDER / fixture, folder)
  content = json.loads((folder / CONFIG).read_text())
  content = {key: x for key, x in {**content, **keys}.items() if x is not ...}
  (folder / CONFIG).write_text(json.dumps(content))
  changed = load_file(folder / WEIGHTS)
  changed |= tensors(changed) if callable(tensors) else tensors or {}
  save_file({name: x for name, x in changed.items() if x is not None}, folder / WEIGHTS)
  return folder


QUERY = 'base_model.model.bert.encoder.layer.0.attention.self.query'
ONE = np.zeros(1, np.float32)


@pytest.mark.parametrize(
  ('fixture', 'tensors', 'keys', 'message'),
  [
    ('lora_default', {f'{QUERY}.lora_C': ONE}, {}, 'query.lora_C, of which efft does not know'),
    ('lora_default', {}, {'velocity': 3}, 'velocity, of which efft does not know'),
    ('lora_default', {f'{QUERY}.lora_B.weight': None}, {}, 'attention/query/matmul_lora/b'),
    ('lora_default', {f'{QUERY}.lora_A.weight': ONE}, {}, 'query.lora_A.weight (1,)'),
    ('lora_default', {f'{QUERY}.lora_B.weight': ONE * np.nan}, {}, 'lora_B.weight'),
    ('lora_default', {}, {'r': 3}, 'query.lora_A.weight (32, 8)'),
    ('lora_default', {'base_model.model.classifier.bias': None}, {}, "task_type='SEQ_CLS'"),
    ('lora_default', {}, {'peft_type': 'XLORA'}, "peft_type='XLORA'"),
    ('lora_default', {}, {'peft_type': ...}, "peft_type='None'"),
    ('lora_default', {}, {'task_type': 'TOKEN_CLS'}, 'task_type="TOKEN_CLS"'),
    ('lora_default', {}, {'use_bdlora': {'nblocks': 2}}, 'use_bdlora='),
    ('lora_default', {}, {'init_lora_weights': 'loftq'}, "init_lora_weights='loftq'"),
    ('lora_default', {}, {'init_lora_weights': 'pissa_niter_4'}, 'path_initial_model'),
    ('lora_default', {}, {'bias': 'some'}, "bias='some'"),
    ('lora_default', {}, {'bias': 'lora_only'}, 'attention.self.query.bias'),
    ('lora_default', {}, {'target_modules': None}, 'target_modules=None'),
    ('lora_default', {}, {'target_modules': ['q_proj']}, "target_modules=['q_proj']"),
    ('lora_default', {}, {'target_modules': '(query'}, "'(query'"),
    ('lora_default', {}, {'target_modules': ['query', 'key']}, 'self.key.lora_A.weight'),
    ('lora_default', {}, {'target_modules': ['query']}, 'self.value.lora_A.weight'),
    ('lora_default', {}, {'modules_to_save': ['classifier', 'pooler']}, 'bert.pooler.dense.bias'),
    ('lora_default', {}, {'trainable_token_indices': [3]}, 'trainable_tokens_delta'),
    ('lora_token_indices', {}, {'trainable_token_indices': [7, 60]}, '[7, 60]'),
    ('lora_token_indices', {}, {'trainable_token_indices': {'lm_head': [7, 9]}}, 'lm_head'),
    ('lora_embedding', {}, {'use_dora': True}, 'word_embeddings as a target'),
    ('adalora', {}, {'rank_pattern': {f'{QUERY[17:]}.lora_E': [True] * 3}}, '3 ranks and 6'),
    ('adalora', {}, {'lora_alpha': 0}, 'lora_alpha=0'),
    ('ia3_default', {}, {'feedforward_modules': ['value']}, 'output.dense as a target of IA3'),
    ('vera', {}, {'save_projection': False}, 'vera_A, vera_B'),
    ('vera', {}, {'save_projection': False, 'projection_prng_key': -1}, 'a seed -1'),
    ('randlora', {}, {'save_projection': False}, 'save_projection=false'),
    ('randlora', {'base_model.randlora_A': np.ones((4, 1, 32), 'f4')}, {}, 'unlike the shared'),
    ('oft', {}, {'coft': True}, 'coft=true'),
    ('oft', {}, {'peft_version': '0.17.1'}, '0.17.1'),
    ('oft', {}, {'use_cayley_neumann': ...}, 'no use_cayley_neumann'),
    ('hra', {}, {'apply_GS': True}, 'apply_GS=true'),
    ('miss', {}, {'init_weights': 'bat'}, 'init_weights="bat"'),
    ('fourierft', {}, {'random_loc_seed': None}, 'random_loc_seed=null'),
    ('fourierft', {}, {'init_weights': 'ones'}, "init_weights='ones'"),
    ('road', {}, {'group_size': 7}, 'groups of 7'),
    ('shira', {f'{QUERY}.shira_indices': np.zeros((2, 256), 'i4')}, {}, 'shira_indices outside'),
    ('lora_token_indices', {}, {'trainable_token_indices': [7, 7]}, '[7, 7]'),
    ('lora_default', {}, {'r': 'x'}, "'x'"),
    ('lora_default', {}, {'lora_dropout': None}, 'values that do not go together'),
    ('lora_default', {}, {'rank_pattern': [3]}, 'values that do not go together'),
    ('prompt', {}, {'num_virtual_tokens': 4}, 'prompt_embeddings (5, 32)'),
    ('prompt', {}, {'token_dim': 64}, 'token_dim=64'),
    ('prefix', {'prompt_embeddings': np.zeros((5, 64), 'f4')}, {}, '128 columns'),
  ],
)
def test_what_cannot_be_read_whole_is_refused(fixture, tensors, keys, message, tmp_path):
  folder = copy(f'bert/{fixture}', tmp_path / 'x', tensors, **keys)
  with pytest.raises(InputError, match=re.escape(message)):
    peft_format.read(folder, encoder('bert'))


@pytest.mark.parametrize('name', HEADLESS)
def test_an_adapter_without_its_head_says_why(name):
  base = encoder('bert')
  for act in (peft_format.num_labels, lambda folder: peft_format.read(folder, base)):
    with pytest.raises(InputError, match="without its classification head|'TRAINABLE_TOKENS'"):
      act(FOLDER / 'bert' / name)
  with pytest.raises(InputError, match="task_type='SEQ_CLS'"):
    peft_format.num_labels(FOLDER / 'bert' / name)


def test_a_folder_without_weights_is_refused(tmp_path):
  with pytest.raises(InputError, match='no adapter_model.safetensors'):
    peft_format.num_labels(tmp_path)


@functools.cache
def distilbert():
  place = peer_files.FIXTURES / 'distilbert'
  return hub.load(str(place), num_labels=3, head='new', key=jax.random.key(0))


def test_distilbert_has_names_of_its_own(tmp_path):
  method = {
    'lora': {'fn': 'lora.lora', 'rank': 2, 'at': r'layer_\d+/(attention/key|mlp/up)/matmul'}
  }
  adapter = trained(method, distilbert())
  folder = written(adapter, distilbert(), tmp_path / 'x')
  names = {name.removeprefix('base_model.model.') for name in load_file(folder / WEIGHTS)}
  layers = {
    f'distilbert.transformer.layer.{i}.{module}.lora_{leaf}.weight'
    for i in range(distilbert().cfg.layers)
    for module in ('attention.k_lin', 'ffn.lin1')
    for leaf in 'AB'
  }
  head = {f'{m}.{leaf}' for m in ('classifier', 'pre_classifier') for leaf in ('weight', 'bias')}
  assert names == layers | head
  assert json.loads((folder / CONFIG).read_text())['target_modules'] == ['k_lin', 'lin1']
  back = peft_format.read(folder, distilbert())
  assert back.leaves.keys() == adapter.leaves.keys()
  assert all(np.array_equal(x, adapter.leaves[path]) for path, x in back.leaves.items())


def test_prefixes_for_distilbert_are_refused(tmp_path):
  head = {f'base_model.{m}.{leaf}': ONE for m in ('classifier', 'pre_classifier')
          for leaf in ('weight', 'bias')}  # fmt: skip
  with pytest.raises(InputError, match='a prefix for distilbert'):
    peft_format.read(copy('bert/prefix', tmp_path / 'x', head), distilbert())


def test_old_spellings_are_read(tmp_path):
  def renamed(tensors):
    new = {}
    for name, x in tensors.items():
      old = name.replace('classifier.', 'classifier.modules_to_save.default.')
      new[name] = None
      new[old.replace('lora_A.', 'lora_A.default.')] = x
      if 'classifier' in name:
        new[name.replace('classifier.', 'classifier.original_module.')] = x + 1
    return new

  drop = ('lora_bias', 'use_dora', 'use_rslora', 'peft_version', 'rank_pattern', 'task_type')
  keys = dict.fromkeys(drop, ...) | {'enable_lora': None, 'merge_weights': False}
  old = peft_format.read(
    copy('bert/lora_default', tmp_path / 'x', renamed, **keys), encoder('bert')
  )
  new = peft_format.read(FOLDER / 'bert' / 'lora_default', encoder('bert'))
  assert old.method == new.method and old.leaves.keys() == new.leaves.keys()
  assert all(np.array_equal(x, new.leaves[path]) for path, x in old.leaves.items())


def test_projections_that_a_file_leaves_out_are_drawn_again(tmp_path):
  """To the bit, as those in the file are torch's."""
  gone = dict.fromkeys(('base_model.vera_A', 'base_model.vera_B'))
  folder = copy('bert/vera', tmp_path / 'x', gone, save_projection=False, projection_prng_key=0)
  found = peft_format.read(folder, encoder('bert')).leaves
  for path, x in peft_format.read(FOLDER / 'bert' / 'vera', encoder('bert')).leaves.items():
    np.testing.assert_array_equal(found[path], x)


def test_keys_of_later_versions_may_be_unset(tmp_path):
  keys = {'tomorrow_config': None, 'tomorrow_pattern': {}, 'use_tomorrow': False}
  folder = copy('bert/lora_default', tmp_path / 'x', **keys)
  assert peft_format.read(folder, encoder('bert')).method['lora']['rank'] == 8


def test_what_acts_in_training_alone_is_noted(tmp_path):
  folder = copy('bert/loha', tmp_path / 'x', module_dropout=0.2, rank_dropout=0.0)
  (note,) = peft_format.read(folder, encoder('bert')).notes
  assert note.startswith('module_dropout=0.2 acts in training alone')


def trained(method, base, frozen=(), seed=0, **params):
  """An adapter of efft's own, moved from its start, with parameters in place of the base's."""
  deltas = peft.build(method)
  model = Encoder(base.cfg, Hooks(tap=peft.attach(deltas)))
  rng = np.random.default_rng(seed)
  leaves = tree.flatten({'params': {'head': base.params['head']}})
  if deltas:
    leaves |= tree.flatten({'delta': peft.init(model, deltas, base.params, jax.random.key(seed))})
  flat = tree.flatten({'params': base.params})
  leaves |= {path: flat[path] for path in flat if re.fullmatch(params.get('also', ''), path)}
  for path, x in leaves.items():
    if np.issubdtype(x.dtype, np.floating) and path.rpartition('/')[2] not in frozen:
      leaves[path] = np.array(x + 0.1 * rng.standard_normal(x.shape), np.float32)
  return foreign.Adapter(method, {path: np.asarray(x) for path, x in leaves.items()}, ())


LORA = {'lora': {'fn': 'lora.lora', 'rank': 4}}
LOW = r'layer_\d+/(attention/(query|out)|mlp/up)/matmul'


# (peft_type, config.method, which parameters of the base train too, leaves that do not)
NATIVE = [
  ('LORA', LORA, r'params/.*norm/(scale|bias)', ()),
  ('LORA', LORA, r'params/.*/bias', ()),
  ('LORA', LORA, r'params/layer_1/attention/(query|value)/bias', ()),
  ('LORA', {**LORA, 'words': {'fn': 'lora.embedding', 'rank': 2, 'alpha': 3.0}}, '', ()),
  ('LORA', {'a': {'fn': 'lora.dylora', 'rank': 4, 'eval_rank': 3}}, '', ()),
  ('LORA', {'a': {'fn': 'spectral_init.olora', 'rank': 4, 'at': LOW}}, '', ('a0', 'b0')),
  (
    'LORA',
    {
      'a': {
        'fn': 'lora.lora',
        'rank': 4,
        'rank_pattern': [('layer_0/.*', 2)],
        'alpha_pattern': {r'.*/value/.*': 4.0},
      }
    },
    '',
    (),
  ),
  ('ADALORA', {'a': {'fn': 'lora.adalora', 'rank': 4}}, '', ()),
  ('IA3', {'x': {'fn': 'scale.ia3', 'layers': 'layer_1'}}, '', ()),
  (
    'LOHA',
    {'a': {'fn': 'kron.loha', 'at': r'.*/up/matmul'}, 'b': {'fn': 'kron.loha', 'rank': 3}},
    '',
    (),
  ),
  ('LN_TUNING', {}, r'params/.*norm/bias', ()),
  ('BEFT', {}, r'params/layer_0/(attention/.*|mlp/up)/bias', ()),
  ('PROMPT_TUNING', {'p': {'fn': 'prompt.ptuning', 'length': 3, 'pooled': 'first'}}, '', ()),
  (
    'PREFIX_TUNING',
    {'p': {'fn': 'prefix.prefix', 'length': 3, 'hidden': 5, 'shift': True}},
    '',
    (),
  ),
]


def native(kind, method, base, also, frozen):
  adapter = trained(method, base, frozen, also=also)
  if kind == 'ADALORA':
    for leaf, axis in (('a', 1), ('e', 0), ('b', 0)):
      x = adapter.leaves[f'delta/layer_0/attention/query/matmul_a/{leaf}']
      np.moveaxis(x, axis, 0)[1:3] = 0
  return adapter


@pytest.mark.parametrize(('kind', 'method', 'also', 'frozen'), NATIVE)
def test_what_efft_trained_is_written_and_read_again(kind, method, also, frozen, tmp_path):
  base = encoder('bert')
  adapter = native(kind, method, base, also, frozen)
  folder = written(adapter, base, tmp_path / 'x')
  assert json.loads((folder / CONFIG).read_text())['peft_type'] == kind
  back = peft_format.read(folder, base)
  batch, _ = batch_of(FOLDER / 'bert' / 'lora_default', base.cfg)
  expected = logits(adapter, base, batch)
  close(logits(back, base, batch), expected, 3e-6)
  assert np.abs(peer_files.plain(base.cfg)({'params': base.params}, *batch) - expected).max() > 1e-3
  tree.labels(restored(back, base), back.rules)


@pytest.mark.parametrize(
  ('method', 'also', 'message'),
  [
    ({'x': {'fn': 'adapter.pfeiffer'}}, '', 'adapter.pfeiffer.*--format=adapterhub'),
    ({'x': {'fn': 'spectral_init.loftq', 'rank': 2}}, '', 'spectral_init.loftq'),
    ({**LORA, 'x': {'fn': 'scale.ia3'}}, '', 'lora.lora beside scale.ia3.*--format=auto'),
    ({'x': {'fn': 'prompt.prompt', 'length': 2}}, '', "pooled='cls'"),
    ({'x': {'fn': 'prefix.prefix', 'length': 2}}, '', 'shift=False.*--format=adapterhub'),
    ({'x': {'fn': 'orthogonal.road', 'group_size': 8}}, '', 'not turned with its outputs'),
    (LORA, r'params/layer_0/attention/query/kernel', 'query.weight beside the LORA'),
    ({'x': {'fn': 'scale.ia3'}}, r'params/layer_0/attention/key/bias', 'key.bias beside the IA3'),
    ({'x': {'fn': 'lora.lora', 'rank': 2, 'at': 'head/out/matmul'}}, '', 'PEFT saves whole'),
    ({**LORA, 'x': {'fn': 'lora.lora', 'rank': 2}}, '', 'several deltas at'),
    ({**LORA, 'x': {'fn': 'lora.dora', 'rank': 2, 'at': LOW}}, '', 'several deltas|use_dora'),
    ({}, r'params/.*', 'no delta'),
    ({}, '', 'no delta'),
  ],
)  # fmt: skip
def test_what_peft_does_not_compute_is_not_written(method, also, message):
  base = encoder('bert')
  with pytest.raises(InputError, match=message):
    peft_format.write(trained(method, base, also=also), base)


def test_a_mean_of_tokens_is_not_written():
  base = dataclasses.replace(encoder('bert'))
  adapter = trained(LORA, base)
  base = dataclasses.replace(base, cfg=dataclasses.replace(base.cfg, pooling='mean'))
  with pytest.raises(InputError, match='a head over the mean'):
    peft_format.write(adapter, base)


def test_regexes_match_their_paths_and_no_others():
  cfg = encoder('bert').cfg
  paths = list(tree.flatten(encoder('bert').params))
  rng = np.random.default_rng(0)
  for _ in range(20):
    some = [path for path in paths if rng.random() < 0.3]
    regex = peft_targets.regex(some, cfg.layers)
    assert [path for path in paths if re.fullmatch(regex, path)] == some
  rows = [f'layer_{i}/attention/{name}/matmul' for i in range(2) for name in ('query', 'value')]
  assert peft_targets.regex(rows, 2) == r'layer_\d+/attention/(query|value)/matmul'
