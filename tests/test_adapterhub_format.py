"""Adapters of AdapterHub: read, compared with its logits, written again, and refused."""

import dataclasses
import functools
import itertools
import json
import shutil

import jax
import numpy as np
import peer_files
import pytest
from safetensors.numpy import load_file, save_file

from efft import transfer, tree
from efft.errors import InputError
from efft.interop import adapterhub_format, adapterhub_parts, adapterhub_union, torch_file
from efft.interop.foreign import Adapter, Keys
from efft.models import hub
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base as peft

FOLDER = peer_files.FIXTURES / 'adapters'
FIXTURES = [
  f'{path.parent.parent.name}/{path.parent.name}'
  for path in sorted(FOLDER.glob('*/*/expected.npz'))
  if path.parent.name != 'fusion'  # the one that '_fusion' is, in one file
]
both = pytest.mark.parametrize('architecture', ('bert', 'roberta'))
# Where the library lets a text see the padding of others: the one without any.
UNPADDED = ('prompt_tuning', 'unipelt_small')


@functools.cache
def base_with(architecture, labels):
  place = peer_files.FIXTURES / 'base' / architecture
  return hub.load(str(place), num_labels=labels, head='new', key=jax.random.key(0))


def base_of(folder):
  return base_with(folder.parent.name, adapterhub_format.num_labels(folder))


def batch_of(folder, base):
  with np.load(folder / 'expected.npz') as expected:
    ids, mask = expected['input_ids'].astype(np.int32), expected['attention_mask'].astype(bool)
    types = expected['token_type_ids'].astype(np.int32) if base.cfg.token_types > 1 else ids * 0
    rows = mask.all(1) if folder.name in UNPADDED else slice(None)
    found = tuple(x[rows] for x in (ids, mask, types))
    return found, expected['logits'][rows]


def logits(adapter, base, batch):
  deltas = peft.build(adapter.method)
  values = transfer.restored(deltas, adapter.leaves, base.params)
  delta = peft.expand(deltas, values.get('delta', {}))
  model = Encoder(base.cfg, Hooks(tap=peft.attach(deltas)))
  return jax.jit(model.apply)({'params': values['params'], 'delta': delta}, *batch)


def shapes_of(method, base):
  """{path: shape and type} of a new delta of a method."""
  deltas = peft.build(method)
  model = Encoder(base.cfg, Hooks(tap=peft.attach(deltas)))
  start = functools.partial(peft.init, model, deltas, base.params)
  return tree.flatten({'delta': jax.eval_shape(start, jax.random.key(0))})


def trained(method, base, **fields):
  """An adapter of efft's own, with numbers and a head by chance."""
  rng, leaves = np.random.default_rng(0), {}
  shapes = tree.flatten({'params': base.params}) | shapes_of(method, base)
  for path, x in shapes.items():
    if path.startswith('delta/') and x.dtype != np.float32:
      leaves[path] = np.ones(x.shape, x.dtype)
    elif path.startswith(('delta/', 'params/head/')):
      leaves[path] = rng.normal(0, 0.3, x.shape).astype(np.float32)
  return Adapter(method, leaves, (), **fields)


def written(adapter, base, folder, **options):
  for name, content in adapterhub_format.write(adapter, base, **options).items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
  return folder


def changed(source, folder, config=None, top=None, head=None):
  """A copy of an adapter with other keys in its config, around it, or in its head's; ...: none."""
  shutil.copytree(source, folder)

  def rewrite(file, *layers):
    content = json.loads((folder / file).read_text())
    for own, more in layers:
      inner = content[own] if own else content
      inner.update(more or {})
      for key in [key for key, x in inner.items() if x is ...]:
        del inner[key]
    (folder / file).write_text(json.dumps(content))

  rewrite('adapter_config.json', ('', top), ('config', config))
  rewrite('head_config.json', ('', head))
  return folder


def read(folder):
  return adapterhub_format.read(folder, base_of(folder))


@pytest.fixture
def place(tmp_path):
  """Where a copy of an adapter of BERT goes: its parent says what it is an adapter of."""
  (tmp_path / 'bert').mkdir()
  return tmp_path / 'bert' / 'copy'


def close(a, b, tolerance=1e-5):
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize('fixture', FIXTURES)
def test_gives_the_librarys_logits_and_is_written_again(fixture, tmp_path):
  folder = FOLDER / fixture
  if folder.name == 'direft':
    folder = changed(
      folder, tmp_path / folder.parent.name / 'direft', {'subtract_projection': False}
    )
  base = base_of(folder)
  adapter = adapterhub_format.read(folder, base)
  batch, expected = batch_of(folder, base)
  close(logits(adapter, base, batch), expected)
  fresh, own = shapes_of(adapter.method, base), {}
  for path, x in adapter.leaves.items():
    own |= {path: x.shape} if path.startswith('delta/') else {}
  # What AdapterHub's (IA)3 scales there is in the kernels.
  assert own == {path: x.shape for path, x in fresh.items() if not path.endswith('mlp/act_ia3/ff')}
  values = {'params': base.params, **tree.unflatten(adapter.leaves)}
  tree.labels({'params': base.params, 'delta': values['delta']}, adapter.rules)
  head = {path: x for path, x in adapter.leaves.items() if path.startswith('params/head/')}
  values = transfer.restored({}, head, base.params)
  apart = np.abs(peer_files.plain(base.cfg)(values, *batch) - expected).max()
  # LoReFT's is an edit that AdapterHub has rounded to nothing.
  assert apart < 1e-6 if folder.name == 'loreft' else apart > 1e-3
  for layout in ('safetensors', 'bin'):
    again = written(adapter, base, tmp_path / layout, layout=layout)
    back = adapterhub_format.read(again, base)
    if folder.name == 'direft':
      # As the NoReFT that it is, for the library loads no other.
      assert back.method['reft']['fn'] == 'intervene.noreft'
      close(logits(back, base, batch), expected)
      continue
    assert back.method == adapter.method and back.rules == adapter.rules
    assert back.leaves.keys() == adapter.leaves.keys()
    for path, x in adapter.leaves.items():
      np.testing.assert_array_equal(back.leaves[path], x, err_msg=path)


SAME = [f for f in FIXTURES if f.split('/')[1] not in ('vera', 'loreft', '_fusion')]


@pytest.mark.parametrize('fixture', SAME)
def test_the_same_tensors_and_config_are_written(fixture, tmp_path):
  """All but a ReFT's second unit, which has no positions to act at."""
  folder = FOLDER / fixture
  base = base_of(folder)
  again = written(adapterhub_format.read(folder, base), base, tmp_path / 'again', name='mytask')
  for file in ('adapter.safetensors', 'model_head.safetensors'):
    old, new = load_file(folder / file), load_file(again / file)
    kept = {name for name in old if '.units.1.' not in name}
    assert new.keys() == kept
    for name in kept:
      np.testing.assert_array_equal(new[name], old[name], err_msg=name)
  for file in ('adapter_config.json', 'head_config.json'):
    old, new = (json.loads((place / file).read_text()) for place in (folder, again))
    del old['model_name'], new['model_name']
    if 'reft' in fixture and file == 'adapter_config.json':
      assert new['config'].pop('subtract_projection') is True and new['config']['tied_weights']
      old['config'].pop('tied_weights', None), new['config'].pop('tied_weights', None)
    if file == 'adapter_config.json' and 'prefix_tuning' in fixture:
      assert new['config'].pop('leave_out') == old['config'].pop('leave_out') == []
    assert new == old


def test_copies_of_prefixes_are_written_for_torch_and_agree(place):
  source = FOLDER / 'bert' / 'prefix_tuning'
  base = base_of(source)
  written(adapterhub_format.read(source, base), base, place, layout='bin', name='mytask')
  file = place / 'pytorch_adapter.bin'
  found = torch_file.read(file)
  theirs = torch_file.read(peer_files.FIXTURES / 'torch' / 'prefix.bin')
  assert found.keys() == theirs.keys() and file.stat().st_size < 20_000, 'one storage for all'
  for name, x in theirs.items():
    np.testing.assert_array_equal(found[name], x)
  name = next(name for name in found if '.pool.' in name)
  file.write_bytes(torch_file.write({**found, name: found[name] + 1}))
  with pytest.raises(InputError, match='a copy that differs'):
    read(place)


def test_fusion_is_written_as_folders(tmp_path):
  folder = FOLDER / 'bert' / '_fusion'
  base = base_of(folder)
  adapter = adapterhub_format.read(folder, base)
  assert adapter.rules[1] == ('delta/.*_fusion/(down|up).*', 'frozen')
  tree.labels({'params': base.params, **tree.unflatten(adapter.leaves)}, adapter.rules[1:])
  files = adapterhub_format.write(adapter, base, layout='bin', name='x')
  about = json.loads(files['adapter_fusion_config.json'])
  theirs = json.loads((folder / 'adapter_fusion_config.json').read_text())
  assert about['adapter_names'] == ['x_0', 'x_1'] and about['config'] == theirs['config']
  for file, own in {'pytorch_adapter.bin': 'x_0', 'pytorch_model_head.bin': 'x_1'}.items():
    old = 'a' if own == 'x_0' else 'b'
    found = torch_file.loads(files[f'{own}/{file}'])
    expected = torch_file.read(folder / old / file)
    renamed = {name.replace(f'.{old}.', f'.{own}.'): x for name, x in expected.items()}
    assert found.keys() == renamed.keys()
    for name, x in renamed.items():
      np.testing.assert_array_equal(found[name], x)


def test_heads_of_fused_adapters_must_be_one(tmp_path):
  folder = tmp_path / 'bert' / '_fusion'
  shutil.copytree(FOLDER / 'bert' / '_fusion', folder)
  head = folder / 'b' / 'pytorch_model_head.bin'
  head.write_bytes(torch_file.write({n: x + 1 for n, x in torch_file.read(head).items()}))
  with pytest.raises(InputError, match='another head than in a'):
    read(folder)
  shutil.rmtree(folder / 'b')
  with pytest.raises(InputError, match='no folder b'):
    read(folder)


# Old spellings and versions.


def test_faulty_scale_of_old_loras(place):
  """Before 1.1.0 the library did not apply alpha / r; with r = alpha it makes no difference."""
  source = FOLDER / 'bert' / 'lora'
  alphas = {'adapters.1.3.0': 16, 'adapters.1.1.0': 16, 'adapters.1.0.1': 4, 'adapters.0.2.2': 4}
  alphas |= {'adapters.1.1.0.dev0': 4, '3.2.1': 16}
  for version, alpha in alphas.items():
    adapter = read(changed(source, place, top={'version': version}))
    assert adapter.method['lora']['alpha'] == alpha, version
    shutil.rmtree(place)
  with pytest.raises(InputError, match='did not apply the scale'):
    changed(FOLDER / 'bert' / 'union_lora_seqbn', place, top={'version': 'adapters.1.0.0'})
    read(place)


def test_names_of_adapter_transformers(place):
  """Activations, tensors and keys as they were called in 2020."""
  source = FOLDER / 'bert' / 'seq_bn_inv'
  old = {
    'inv_adapter': ..., 'inv_adapter_reduction_factor': ..., 'non_linearity': 'gelu',
    'invertible_adapter': {'block_type': 'nice', 'non_linearity': 'gelu', 'reduction_factor': 2},
    'attention_type': 'sentence-level', 'new_attention_norm': False,
  }  # fmt: skip
  changed(
    source, place, old, {'version': ..., 'type': 'text_lang', 'config_id': '9076f36a74755ac4'}
  )
  content = json.loads((place / 'adapter_config.json').read_text())
  tensors = {}
  for name, x in load_file(place / 'adapter.safetensors').items():
    name = name.replace('invertible_adapters', 'invertible_lang_adapters')
    tensors[name.replace('output.adapters', 'output.layer_text_lang_adapters')] = x
  save_file(tensors, place / 'adapter.safetensors')
  adapter, today = read(place), read(source)
  assert adapter.leaves.keys() == today.leaves.keys()
  assert adapter.method['pfeiffer']['activation'] == 'gelu_new'
  assert adapter.method['invertible'] == {
    'fn': 'adapter.invertible', 'reduction': 2, 'activation': 'gelu_new'
  }  # fmt: skip
  # An adapter of a task said that it had an invertible one, and had none.
  kept = {name: x for name, x in tensors.items() if 'invertible' not in name}
  save_file(kept, place / 'adapter.safetensors')
  with pytest.raises(InputError, match='no invertible_adapters'):
    read(place)
  content['type'] = 'text_task'
  (place / 'adapter_config.json').write_text(json.dumps(content))
  assert set(read(place).method) == {'pfeiffer'}


def test_labels(place):
  source = FOLDER / 'bert' / 'lora'
  assert read(source).labels is None, 'LABEL_0 is no name'
  changed(source, place, head={'label2id': {'b': 1, 'c': 2, 'a': '0'}})
  adapter = read(place)
  assert adapter.labels == ('a', 'b', 'c')
  base = base_of(place)
  files = adapterhub_format.write(adapter, base)
  assert json.loads(files['head_config.json'])['label2id'] == {'a': 0, 'b': 1, 'c': 2}
  shutil.rmtree(place)
  changed(source, place, head={'label2id': {'a': 0, 'b': 1}})
  with pytest.raises(InputError, match='label2id of 2 labels'):
    read(place)


# Flexible heads.


def flexible(source, place, shapes, kind='classification', **more):
  """A copy of an adapter with a flexible head of these layers, {index: (out, in)}."""
  rng = np.random.default_rng(0)
  config = {
    'head_type': kind, 'layers': len(shapes), 'activation_function': 'tanh', 'use_pooler': False,
    'bias': True, 'dropout_prob': None, 'num_labels': 2, 'label2id': {'no': 0, 'yes': 1}, **more,
  }  # fmt: skip
  head = {'config': config, 'name': 'top', 'num_labels': ..., 'label2id': ...}
  changed(source, place, head=head)
  tensors = {}
  for index, shape in shapes.items():
    tensors[f'heads.top.{index}.weight'] = rng.normal(size=shape).astype(np.float32)
    tensors[f'heads.top.{index}.bias'] = rng.normal(size=shape[0]).astype(np.float32)
  save_file(tensors, place / 'model_head.safetensors')
  return tensors


@both
def test_flexible_head_of_two_layers(architecture, tmp_path):
  """RoBERTa's own head, and in BERT a dense layer in place of the pooler."""
  place = tmp_path / architecture / 'copy'
  place.parent.mkdir()
  tensors = flexible(FOLDER / architecture / 'lora', place, {1: (32, 32), 4: (2, 32)})
  base = base_of(place)
  adapter = adapterhub_format.read(place, base)
  dense = 'pooler' if architecture == 'bert' else 'head/dense'
  for path, name in ((dense, '1'), ('head/out', '4')):
    np.testing.assert_array_equal(
      adapter.leaves[f'params/{path}/kernel'], tensors[f'heads.top.{name}.weight'].T
    )
  assert adapter.labels == ('no', 'yes') and base.cfg.num_labels == 2
  again = written(adapter, base, tmp_path / 'again', name='top')
  if architecture == 'bert':
    assert adapter.rules[0] == ('params/(head|pooler)/.*', 'head')
    back = load_file(again / 'model_head.safetensors')
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], x) for name, x in tensors.items())
  back = adapterhub_format.read(again, base)
  assert all(np.array_equal(back.leaves[path], x) for path, x in adapter.leaves.items())


def test_flexible_head_over_the_pooler(place):
  """What BERT's own head is; without a bias it is one of zeros."""
  tensors = flexible(FOLDER / 'bert' / 'lora', place, {1: (2, 32)}, use_pooler=True, bias=False)
  del tensors['heads.top.1.bias']
  save_file(tensors, place / 'model_head.safetensors')
  leaves = read(place).leaves
  assert {path for path in leaves if 'params' in path} == {
    'params/head/out/kernel', 'params/head/out/bias'
  }  # fmt: skip
  assert not leaves['params/head/out/bias'].any()


def test_kinds_of_heads(place, tmp_path):
  flexible(FOLDER / 'bert' / 'lora', place, {1: (32, 32), 4: (2, 32)}, 'multilabel_classification')
  adapter, base = read(place), base_of(place)
  assert adapter.kind == 'multi'
  again = written(adapter, base, tmp_path / 'bert' / 'again')
  assert read(again).kind == 'multi'


@pytest.mark.parametrize(
  ('shapes', 'more', 'message'),
  [
    ({1: (2, 32)}, {}, '1 layers.*2 layers, tanh'),
    ({1: (32, 32), 4: (2, 32)}, {'activation_function': 'relu'}, "'relu'"),
    ({1: (32, 32), 4: (2, 32)}, {'kind': 'tagging'}, 'tagging'),
    ({1: (32, 32), 4: (2, 32)}, {'kind': ['classification']}, 'head_type'),
    ({1: (32, 32), 4: (3, 32)}, {}, r'params/head/out/kernel \(32, 3\)'),
    ({1: (32, 32), 4: (2, 32), 7: (1, 1)}, {'layers': 2}, r'heads.top.7.bias'),
    ({1: (32, 32), 4: (2, 32)}, {'layer_norm': True}, 'layer_norm'),
  ],
)
def test_other_heads_are_refused(shapes, more, message, place):
  flexible(FOLDER / 'bert' / 'lora', place, shapes, **more)
  with pytest.raises(InputError, match=message):
    read(place)


# What efft has no equal for, and what is damaged.


@pytest.mark.parametrize(
  ('method', 'config', 'message'),
  [
    ('seq_bn', {'ln_after': True}, 'ln_after=true'),
    ('seq_bn', {'ln_before': True}, 'ln_before=true'),
    ('seq_bn', {'residual_before_ln': False}, 'residual_before_ln=False'),
    ('seq_bn', {'residual_before_ln': 'post_add'}, 'post_add'),
    ('seq_bn', {'original_ln_after': False}, 'original_ln_after=False'),
    ('seq_bn', {'scaling': 2.0}, 'scaling=2.0'),
    ('seq_bn', {'scaling': 'learned'}, "scaling='learned'"),
    ('seq_bn', {'non_linearity': 'leakyrelu'}, 'leakyrelu'),
    ('seq_bn', {'use_gating': True}, r'no .*gate\.weight'),
    ('seq_bn', {'output_adapter': False}, 'no place'),
    ('seq_bn', {'reduction_factor': 8}, r'shape \[2, 32\]'),
    ('seq_bn', {'reduction_factor': {'1': 16}}, 'for every layer'),
    ('seq_bn', {'leave_out': [0, 1]}, 'a layer to act in'),
    ('seq_bn', {'leave_out': [1]}, r'encoder\.layer\.1\..*of which efft does not know'),
    ('seq_bn', {'leave_out': '1'}, 'a list of layers'),
    ('seq_bn', {'mh_adapter': True}, 'no encoder.layer.0.attention.output.adapters'),
    ('seq_bn', {'mh_adapter': 1}, 'mh_adapter=1.*true or false'),
    ('seq_bn', {'new_option': 3}, 'new_option, of which efft does not know'),
    ('seq_bn', {'architecture': 'mtl_lora'}, 'mtl_lora'),
    ('seq_bn', {'architecture': ['lora']}, 'architecture='),
    ('seq_bn_inv', {'inv_adapter': 'glow'}, 'glow'),
    ('seq_bn_inv', {'inv_adapter_reduction_factor': 4}, r'shape \[8, 16\]'),
    ('compacter_rf2', {'shared_W_phm': True}, 'shared_W_phm=true'),
    ('compacter_rf2', {'factorized_phm_rule': True}, 'factorized_phm_rule=true'),
    ('compacter_rf2', {'phm_dim': 3}, 'phm_dim=3'),
    ('par_bn', {'scaling': 'channel'}, "scaling='channel'"),
    ('lora', {'attn_matrices': ['q', 'o']}, 'attn_matrices'),
    ('lora', {'selfattn_lora': False}, 'a LoRA of nothing'),
    ('lora', {'r': 3}, r'shape \[4, 32\]'),
    ('lora', {'r': 'four'}, "r='four'"),
    ('lora', {'alpha': float('inf')}, 'alpha=inf'),
    ('lora', {'dtype': 'bfloat16'}, 'dtype="bfloat16"'),
    ('lora', {'use_gating': True}, r'no .*gate\.weight'),
    ('lora', {'composition_mode': 'scale'}, 'r=4'),
    ('lora', {'composition_mode': 'other'}, 'other'),
    ('ia3', {'attn_matrices': ['q', 'k', 'v']}, 'query'),
    ('ia3', {'alpha': 2}, 'alpha=2'),
    ('prefix_tuning', {'non_linearity': 'relu'}, 'relu'),
    ('prefix_tuning', {'prefix_length': 5}, r'shape \[4, 32\]'),
    ('prefix_tuning', {'flat': True}, 'no prefix_tuning.*control_trans'),
    ('prompt_tuning', {'combine': 'prefix_after_bos'}, 'prefix_after_bos'),
    ('noreft', {'suffix_positions': 2}, 'tied_weights'),
    ('noreft', {'prefix_positions': 0}, '0 positions'),
    ('noreft', {'non_linearity': 'relu'}, 'non_linearity'),
    ('noreft', {'layers': [0]}, r'layer\.1'),
    ('noreft', {'layers': [9]}, 'no layers'),
    ('union_lora_seqbn', {'configs': []}, 'a list of configs'),
    ('union_lora_seqbn', {'extra': 1}, 'extra'),
  ],
)  # fmt: skip
def test_configs_without_an_equal_are_refused(method, config, message, place):
  changed(FOLDER / 'bert' / method, place, config)
  with pytest.raises(InputError, match=message):
    read(place)


ODD = (
  None,
  True,
  0,
  -1,
  2.5,
  7,
  1e400,
  '',
  'learned',
  [],
  [0],
  [[1]],
  {},
  {'default': 2},
  {'x': []},
)


@pytest.mark.parametrize('method', sorted({fixture.split('/')[1] for fixture in SAME}))
def test_no_value_of_a_config_is_a_surprise(method):
  """Each key with each odd value: read, or refused in words."""
  folder = FOLDER / 'bert' / method
  base, about = base_of(folder), json.loads((folder / 'adapter_config.json').read_text())
  found = load_file(folder / 'adapter.safetensors')
  tensors = {name.removeprefix('bert.'): x for name, x in found.items()}
  refused = 0
  for key, odd in itertools.product((*about['config'], 'new'), ODD):
    source = adapterhub_parts.Source(Keys(tensors, 'tensors'), base, 'mytask')
    try:
      adapterhub_union.read(source, Keys({**about['config'], key: odd}, 'config'))
    except InputError:
      refused += 1
  assert refused >= len(ODD), 'at least the new key'


@pytest.mark.parametrize(
  ('top', 'message'),
  [
    ({'model_type': 'roberta'}, "model_type='roberta'"),
    ({'hidden_size': 768}, 'hidden_size=768'),
    ({'name': '../up'}, "name '../up'"),
    ({'name': 'other'}, 'no encoder.layer.0.output.adapters.other'),
    ({'more': 1}, 'more, of which efft'),
  ],
)
def test_containers_that_do_not_fit_are_refused(top, message, place):
  changed(FOLDER / 'bert' / 'seq_bn', place, top=top)
  with pytest.raises(InputError, match=message):
    read(place)


def test_incomplete_folders_are_refused(place):
  source = FOLDER / 'bert' / 'seq_bn'
  for file, message in {
    'model_head.safetensors': 'no model_head.safetensors',
    'head_config.json': 'head_config.json',
    'adapter.safetensors': 'no adapter.safetensors',
    'adapter_config.json': 'adapter_config.json',
  }.items():
    shutil.copytree(source, place)
    (place / file).unlink()
    with pytest.raises(InputError, match=message):
      adapterhub_format.read(place, base_of(source))
    shutil.rmtree(place)


def test_head_of_another_size_is_refused(place):
  changed(FOLDER / 'bert' / 'seq_bn', place, head={'num_labels': 2, 'label2id': None})
  with pytest.raises(InputError, match=r'params/head/out/bias \(3,\), expected \(2,\)'):
    read(place)


@pytest.mark.parametrize('file', ['adapter.safetensors', 'model_head.safetensors'])
def test_every_tensor_is_accounted_for(file, place):
  changed(FOLDER / 'bert' / 'seq_bn', place)
  tensors = load_file(place / file)
  save_file({**tensors, 'pooler.extra': np.ones(2, np.float32)}, place / file)
  with pytest.raises(InputError, match='pooler.extra, of which efft'):
    read(place)
  lost = sorted(tensors)[0]
  save_file({name: x for name, x in tensors.items() if name != lost}, place / file)
  with pytest.raises(InputError, match=f'no {lost.removeprefix("bert.")}'):
    read(place)


# What efft trained.

OWN = {
  'houlsby': {'fn': 'adapter.houlsby', 'size': 5, 'activation': 'gelu_new'},
  'houlsby mlp': {'fn': 'adapter.houlsby', 'size': 7, 'at': r'layer_1/mlp_out'},
  'pfeiffer': {'fn': 'adapter.pfeiffer', 'reduction': 5},
  'adapterdrop': {'fn': 'wrap.adapterdrop', 'reduction': 8},
  'parallel': {'fn': 'adapter.parallel', 'size': 5, 'at': r'layer_\d+/(attention|mlp)_out'},
  'scaled parallel': {'fn': 'adapter.parallel', 'size': 6, 'learn_scale': True},
  'adapter_plus': {'fn': 'adapter.adapter_plus', 'reduction': 8, 'depth_dropout': 0.0},
  'compacter': {'fn': 'phm.compacter', 'reduction': 2, 'rank': 2},
  'compacter_plus': {'fn': 'phm.compacter_plus', 'reduction': 4, 'n': 2},
  'lora': {'fn': 'lora.lora', 'rank': 3, 'alpha': 7.0, 'at': r'layer_\d+/mlp/(up|down)/matmul'},
  'rslora': {'fn': 'lora.lora', 'rank': 3, 'alpha': 7.0, 'use_rslora': True},
  'dylora': {'fn': 'lora.dylora', 'rank': 3},
  'vera': {'fn': 'shared_lowrank.vera', 'rank': 5},
  'prefix': {'fn': 'prefix.prefix', 'length': 3, 'layers': 'layer_1'},
  'prefix network': {'fn': 'prefix.prefix', 'length': 3, 'hidden': 5},
  'prompt': {
    'fn': 'prompt.prompt', 'init': 'random', 'length': 3, 'at': 'embed', 'pooled': 'first',
  },
  'loreft': {'fn': 'intervene.loreft', 'rank': 3, 'first': 2, 'last': 1},
  'noreft': {'fn': 'intervene.noreft', 'rank': 2, 'tied': False},
  'direft': {'fn': 'intervene.direft', 'rank': 2, 'at': 'layer_0/output'},
  'mam': {'fn': 'hybrid.mam', 'length': 3, 'hidden': 5, 'size': 6},
  'unipelt': {'fn': 'hybrid.unipelt', 'length': 3, 'hidden': 5, 'reduction': 8, 'alpha': 24.0},
}  # fmt: skip
TOGETHER = {
  'invertible': {
    'i': {'fn': 'adapter.invertible'}, 'p': {'fn': 'adapter.pfeiffer', 'reduction': 4},
  },
  'four': {
    'lora': {'fn': 'lora.lora', 'rank': 2}, 'prefix': {'fn': 'prefix.prefix', 'length': 2},
    'reft': {'fn': 'intervene.direft'}, 'parallel': {'fn': 'adapter.parallel', 'size': 4},
  },
  'two sizes': {
    'a': {'fn': 'adapter.pfeiffer', 'reduction': 4, 'at': 'layer_0/mlp_out'},
    'b': {'fn': 'adapter.pfeiffer', 'reduction': 8, 'at': 'layer_1/mlp_out'},
  },
}  # fmt: skip
METHODS = {name: {'m': spec} for name, spec in OWN.items()} | TOGETHER
# Those that no file of the library in the fixtures has; all are in the tests beside the library.
SOME = ('adapterdrop', 'adapter_plus', 'rslora', 'vera', 'prefix', 'loreft', 'unipelt', 'two sizes')


@pytest.mark.parametrize('name', SOME)
def test_what_efft_trained_is_written_and_read(name, tmp_path):
  base = base_with('roberta', 3)
  adapter = trained(METHODS[name], base, labels=('a', 'b', 'c'))
  back = adapterhub_format.read(written(adapter, base, tmp_path / 'out'), base)
  assert back.labels == ('a', 'b', 'c')
  ids = np.random.default_rng(0).integers(5, 40, (2, 6)).astype(np.int32)
  data = ids, np.array([[1] * 6, [1] * 4 + [0] * 2], bool), ids * 0
  close(logits(back, base, data), logits(adapter, base, data))


def refused(method, base=None, **leaves):
  base = base or base_with('bert', 3)
  adapter = trained(method, base)
  adapter.leaves.update({path.replace('.', '/'): x for path, x in leaves.items()})
  adapterhub_format.write(adapter, base)


@pytest.mark.parametrize(
  ('method', 'message'),
  [
    ({'m': {'fn': 'intervene.red'}}, r'method m: .*intervene.red.*one of adapter.houlsby'),
    ({'m': {'fn': 'lora.lora', 'lora_bias': True}}, 'lora_bias'),
    ({'m': {'fn': 'lora.lora', 'rank_pattern': {'layer_0.*': 2}}}, 'rank_pattern'),
    ({'m': {'fn': 'lora.lora', 'at': r'layer_\d+/attention/out/matmul'}}, 'attention/out'),
    ({'m': {'fn': 'lora.lora', 'at': r'layer_(0/mlp/up|1/mlp/down)/matmul'}}, 'different places'),
    ({'m': {'fn': 'lora.dylora', 'eval_rank': 2}}, 'eval_rank'),
    ({'m': {'fn': 'lora.dora'}}, 'a bias at layer_0/attention/query'),
    ({'m': {'fn': 'scale.ia3'}}, 'behind its activation'),
    ({'m': {'fn': 'scale.ia3', 'attention_out': True}}, 'FFN behind|attention/heads'),
    ({'m': {'fn': 'prefix.prefix', 'shift': True}}, 'shift=True'),
    ({'m': {'fn': 'prompt.prompt'}}, "at='embed/words'"),
    ({'m': {'fn': 'intervene.loreft', 'last': 2, 'tied': False}}, 'tied=True'),
    ({'m': {'fn': 'intervene.loreft', 'at': r'layer_\d+/mlp_out'}}, 'mlp_out'),
    ({'m': {'fn': 'adapter.invertible'}}, 'beside it'),
    ({'a': {'fn': 'lora.lora'}, 'b': {'fn': 'lora.lora'}}, 'two methods at one place'),
    ({'a': {'fn': 'intervene.loreft'}, 'b': OWN['prompt']}, 'each alone'),
    ({'a': {'fn': 'hybrid.fusion'}, 'b': OWN['lora']}, 'fusion alone'),
    ({}, 'no method'),
  ],
)  # fmt: skip
def test_what_the_library_cannot_compute_is_refused(method, message):
  with pytest.raises(InputError, match=message):
    refused(method)


def test_other_encoders_and_parameters_are_refused():
  base, method = base_with('bert', 3), {'m': OWN['lora']}
  norm = base.params['embed']['norm']['scale']
  refused(method, **{'params.embed.norm.scale': norm})  # as in the base
  with pytest.raises(InputError, match='params/embed/norm/scale, which was trained'):
    refused(method, **{'params.embed.norm.scale': norm + 1})
  with pytest.raises(InputError, match='delta/layer_0/mlp/other'):
    refused(method, **{'delta.layer_0.mlp.other.x': norm})
  place = peer_files.FIXTURES / 'camembert'
  other = hub.load(str(place), num_labels=3, head='new', key=jax.random.key(0))
  with pytest.raises(InputError, match='camembert'):
    refused(method, other)
  mean = hub.load(str(base.folder), num_labels=3, pooling='mean', key=jax.random.key(0))
  with pytest.raises(InputError, match='the mean'):
    refused(method, mean)
  adapter = trained(method, base)
  for options in ({'layout': 'pickle'}, {'name': 'a.b'}, {'name': '../a'}):
    with pytest.raises(InputError):
      adapterhub_format.write(adapter, base, **options)


def test_dora_without_a_bias_in_the_base_is_written(tmp_path):
  """The library scales the bias; one of zeros stays one."""
  base = base_with('roberta', 3)
  flat = tree.flatten(base.params)
  flat |= {path: x * 0 for path, x in flat.items() if 'attention' in path and 'bias' in path}
  base = dataclasses.replace(base, params=tree.unflatten(flat))
  adapter = trained({'m': {'fn': 'lora.dora', 'rank': 3, 'alpha': 5.0}}, base)
  back = adapterhub_format.read(written(adapter, base, tmp_path / 'out'), base)
  for path, x in adapter.leaves.items():
    close(back.leaves[path.replace('_m/', '_dora/')], x, 1e-6)
