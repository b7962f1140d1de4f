"""Hugging Face checkpoints become the same function: torch's logits, names, heads, config.json."""

import functools
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from efft import tree
from efft.errors import InputError
from efft.models import convert
from efft.models.encoder import Encoder
from efft.models.layers import ACTIVATIONS

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
ARCHITECTURES = tuple(convert.NAMES)
KEY = jax.random.key(0)


@functools.cache
def fixture(name):
  """(config.json, tensors, expected.npz); not to be changed in place."""
  folder = FIXTURES / name
  config = json.loads((folder / 'config.json').read_text())
  with np.load(folder / 'expected.npz') as file:
    expected = dict(file)
  return config, load_file(folder / 'model.safetensors'), expected


def configure(name, pooling='cls', num_labels=3, **changes):
  return convert.config_from_hf(fixture(name)[0] | changes, num_labels=num_labels, pooling=pooling)


def converted(name, tensors=None, pooling='cls', head='keep', **changes):
  tensors = fixture(name)[1] if tensors is None else tensors
  cfg = configure(name, pooling, **changes)
  return cfg, convert.from_hf(tensors, cfg, head=head, key=KEY)


def logits(cfg, params, arrays):
  inputs = arrays['input_ids'], arrays['attention_mask'] > 0, arrays.get('token_type_ids')
  return np.asarray(jax.jit(Encoder(cfg).apply)({'params': params}, *inputs))


def same(a, b):
  a, b = tree.flatten(a), tree.flatten(b)
  return a.keys() == b.keys() and all(np.array_equal(a[p], b[p]) for p in a)


def with_tensors(name, **changes):
  """The fixture's tensors with some replaced, added or (None) removed; '__' stands for '.'."""
  tensors = fixture(name)[1] | {k.replace('__', '.'): v for k, v in changes.items()}
  return {k: v for k, v in tensors.items() if v is not None}


def refusal(*args, **kwargs):
  with pytest.raises(InputError) as caught:
    converted(*args, **kwargs)
  return str(caught.value)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_stored_logits(name):
  expected = fixture(name)[2]
  np.testing.assert_allclose(
    logits(*converted(name), expected), expected['logits'], rtol=0, atol=1e-5
  )


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_stored_logits_of_the_mean(name):
  expected = fixture(name)[2]
  cfg, params = converted(name, pooling='mean', head='new')
  params['head'] = {'out': {'kernel': expected['mean_kernel'], 'bias': expected['mean_bias']}}
  np.testing.assert_allclose(
    logits(cfg, params, expected), expected['mean_logits'], rtol=0, atol=1e-5
  )


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_more_padding_changes_nothing(name):
  expected = fixture(name)[2]
  cfg, params = converted(name)
  fill = {'input_ids': cfg.pad_id}
  wide = {
    k: np.pad(expected[k], ((0, 0), (0, 5)), constant_values=fill.get(k, 0))
    for k in ('input_ids', 'attention_mask', 'token_type_ids')
    if k in expected
  }
  np.testing.assert_allclose(logits(cfg, params, wide), expected['logits'], rtol=0, atol=1e-5)


def test_token_types_matter_to_bert_and_not_to_roberta():
  for name, matters in (('bert', True), ('electra', True), ('distilbert', False)):
    expected = dict(fixture(name)[2])
    expected['token_type_ids'] = np.zeros_like(expected['input_ids'])
    moved = np.abs(logits(*converted(name), expected) - expected['logits']).max() > 1e-3
    assert moved == matters, name


def test_roberta_counts_positions_of_real_tokens_from_pad_id():
  cfg, params = converted('roberta')
  assert cfg.positions_from_pad and cfg.pad_id == 1
  expected = fixture('roberta')[2]
  table = np.array(params['embed']['position']['embedding'])
  used = slice(2, 2 + expected['input_ids'].shape[1])
  table[used.stop :] = table[0] = 7.0  # rows that no position of this batch reads
  params['embed']['position']['embedding'] = table
  np.testing.assert_allclose(logits(cfg, params, expected), expected['logits'], rtol=0, atol=1e-5)


def test_rows_of_left_padding_have_roberta_positions_of_their_own_tokens():
  cfg, params = converted('roberta')
  expected = fixture('roberta')[2]
  shifted = {k: np.roll(expected[k][2:3], 7, axis=1) for k in ('input_ids', 'attention_mask')}
  assert shifted['attention_mask'].tolist() == [[0] * 7 + [1] * 5]
  mean, one = converted('roberta', pooling='mean', head='new')
  one['head']['out'] = {'kernel': expected['mean_kernel'], 'bias': expected['mean_bias']}
  np.testing.assert_allclose(
    logits(mean, one, shifted), expected['mean_logits'][2:3], rtol=0, atol=1e-5
  )


CLASSES = {'bert': 'Bert', 'roberta': 'Roberta', 'xlm-roberta': 'XLMRoberta',
           'camembert': 'Camembert', 'distilbert': 'DistilBert', 'electra': 'Electra'}  # fmt: skip


def live(name, **changes):
  """(cfg, params, torch's logits) of a new random model of the fixture's shape."""
  reason = 'NO LIVE CHECK against transformers: torch is not installed'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  config, _, arrays = fixture(name)
  hf_config = getattr(transformers, CLASSES[name] + 'Config')(**(config | changes))
  torch.manual_seed(1)
  model = getattr(transformers, CLASSES[name] + 'ForSequenceClassification')(hf_config).eval()
  for p in model.parameters():
    p.data += 0.2 * torch.randn_like(p)
  tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  keys = ('input_ids', 'attention_mask', 'token_type_ids')
  feed = {k: torch.from_numpy(arrays[k]).long() for k in keys if k in arrays}
  with torch.no_grad():
    answer = model(**feed).logits.numpy()
  return *converted(name, tensors, **changes), answer


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_live_logits(name):
  cfg, params, answer = live(name)
  np.testing.assert_allclose(logits(cfg, params, fixture(name)[2]), answer, rtol=0, atol=1e-5)


@pytest.mark.parametrize('activation', sorted(ACTIVATIONS))
def test_live_activation(activation):
  cfg, params, answer = live('bert', hidden_act=activation)
  np.testing.assert_allclose(logits(cfg, params, fixture('bert')[2]), answer, rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_round_trip(name):
  cfg, params = converted(name)
  tensors = convert.to_hf(params, cfg)
  original = fixture(name)[1]
  assert tensors.keys() == original.keys()
  assert all(np.array_equal(tensors[k], original[k]) for k in original)
  assert same(convert.from_hf(tensors, cfg, head='keep', key=KEY), params)


def test_to_hf_refuses_a_tree_of_another_config():
  _, params = converted('bert')
  with pytest.raises(InputError, match=r'- head/dense/bias'):
    convert.to_hf(params, configure('roberta'))


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_without_prefix(name):
  prefix = convert.NAMES[name][0]
  tensors = {k.removeprefix(prefix): v for k, v in fixture(name)[1].items()}
  assert same(converted(name, tensors)[1], converted(name)[1])


def test_legacy_names():
  def old(key):
    return key.replace('LayerNorm.weight', 'LayerNorm.gamma').replace(
      'LayerNorm.bias', 'LayerNorm.beta'
    )

  tensors = {old(k): v for k, v in fixture('bert')[1].items()}
  assert tensors.keys() != fixture('bert')[1].keys()
  assert same(converted('bert', tensors)[1], converted('bert')[1])


@pytest.mark.parametrize(
  'name, extra',
  [
    ('bert', 'bert.embeddings.position_ids'),
    ('bert', 'cls.predictions.decoder.weight'),
    ('bert', 'cls.seq_relationship.bias'),
    ('roberta', 'roberta.embeddings.token_type_ids'),
    ('roberta', 'lm_head.layer_norm.weight'),
    ('roberta', 'roberta.pooler.dense.weight'),
    ('xlm-roberta', 'lm_head.decoder.weight'),
    ('distilbert', 'vocab_projector.weight'),
    ('distilbert', 'vocab_layer_norm.bias'),
    ('electra', 'discriminator_predictions.dense.weight'),
    ('electra', 'generator_lm_head.weight'),
    ('electra', 'generator_predictions.LayerNorm.weight'),
  ],
)
def test_buffers_and_pretraining_heads_are_dropped_unread(name, extra):
  class Unreadable(dict):
    def __getitem__(self, key):
      assert key != extra
      return super().__getitem__(key)

  tensors = Unreadable(fixture(name)[1] | {extra: None})
  assert same(converted(name, tensors)[1], converted(name)[1])


def test_mean_pooling_needs_no_pooler():
  tensors = with_tensors('bert', bert__pooler__dense__weight=None, bert__pooler__dense__bias=None)
  text = refusal('bert', tensors)
  assert '- pooler.dense.weight [32, 32]' in text and 'set model.pooling=mean' in text
  assert 'pooler' not in converted('bert', tensors, pooling='mean')[1]


def test_diff_names_every_difference():
  text = refusal(
    'bert',
    with_tensors(
      'bert',
      bert__encoder__layer__1__output__dense__weight=None,
      bert__extra__weight=np.zeros((3, 4), np.float32),
      bert__embeddings__word_embeddings__weight=np.zeros((7, 32), np.float32),
    ),
  )
  assert '\n- encoder.layer.1.output.dense.weight [32, 64]\n' in text
  assert '\n+ extra.weight [3, 4]\n' in text
  assert '\n! embeddings.word_embeddings.weight [7, 32], expected [150, 32]\n' in text
  assert 'check that the weights and config.json belong together' in text


def test_a_long_diff_is_cut():
  text = refusal('bert', {})
  assert text.startswith('checkpoint: found tensors') and text.count('\n') < 45
  assert '... and' in text


def test_the_same_tensor_twice_is_refused():
  twice = {'classifier.bias': np.zeros(3, np.float32), 'bert.classifier.bias': np.zeros(3)}
  assert "'bert.classifier.bias'" in refusal('bert', fixture('bert')[1] | twice)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype):
  half = {k: v.astype(dtype) for k, v in fixture('bert')[1].items()}
  _, params = converted('bert', half)
  back = {k: v.astype(np.float32) for k, v in half.items()}
  assert same(params, converted('bert', back)[1])
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize('dtype', [np.int32, np.float64, np.uint8])
def test_other_dtypes_are_refused(dtype):
  bias = fixture('bert')[1]['classifier.bias'].astype(dtype)
  text = refusal('bert', with_tensors('bert', classifier__bias=bias))
  assert 'classifier.bias' in text and str(bias.dtype) in text


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value):
  bias = np.array([0, value, 1], np.float32)
  text = refusal('bert', with_tensors('bert', classifier__bias=bias))
  assert 'classifier.bias: found 1 of 3 values NaN or infinite' in text


def test_new_head(caplog):
  caplog.set_level('INFO', logger='efft')
  cfg, params = converted('roberta', head='new', num_labels=5, initializer_range=0.5)
  assert params['head']['out']['kernel'].shape == (32, 5)
  assert 0.4 < params['head']['dense']['kernel'].std() < 0.6
  assert not params['head']['dense']['bias'].any() and not params['head']['out']['bias'].any()
  assert 'classifier.out_proj.weight' in caplog.text
  kept = converted('roberta')[1]
  assert same({**params, 'head': {}}, {**kept, 'head': {}})
  again = convert.from_hf(fixture('roberta')[1], cfg, head='new', key=KEY)
  other = convert.from_hf(fixture('roberta')[1], cfg, head='new', key=jax.random.key(1))
  assert same(params, again) and not same(params, other)


def test_keeping_a_head_needs_one_that_fits():
  text = refusal('bert', num_labels=5)
  assert '! classifier.weight [3, 32], expected [5, 32]' in text and 'model.head=new' in text
  bare = with_tensors('bert', classifier__weight=None, classifier__bias=None)
  assert 'model.head=new' in refusal('bert', bare)
  assert 'model.pooling=cls' in refusal('roberta', pooling='mean')
  with pytest.raises(InputError, match="'kepp'"):
    converted('bert', head='kepp')


def test_config_reads_every_shape():
  cfg = configure('electra')
  assert (cfg.embed_dim, cfg.hidden, cfg.heads, cfg.head_dim, cfg.mlp) == (
    16, 32, (4, 4), 8, (64, 64))  # fmt: skip
  cfg = configure('distilbert')
  assert (cfg.token_types, cfg.head_dropout, cfg.eps, cfg.layers) == (0, 0.2, 1e-12, 2)
  cfg = configure('roberta', classifier_dropout=0.3)
  assert (cfg.eps, cfg.head_dropout, cfg.max_length) == (1e-5, 0.3, 128)
  assert convert.EncoderConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


def test_config_ignores_what_does_not_shape_the_model():
  noise = {'auto_map': {'AutoModel': 'evil.Model'}, 'torch_dtype': 'float16', 'x': [1]}
  assert configure('bert', **noise) == configure('bert')


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2', expected one of bert, roberta, xlm-roberta"),
    ({'model_type': None}, 'model_type None'),
    ({'model_type': ['bert']}, 'model_type'),
    ({'position_embedding_type': 'relative_key'}, "'relative_key'"),
    ({'is_decoder': True}, 'is_decoder True'),
    ({'pruned_heads': {'0': [1]}}, 'pruned_heads'),
    ({'hidden_act': 'quick_gelu'}, "'quick_gelu', expected one of gelu"),
    ({'hidden_act': None}, 'activation None'),
    ({'hidden_size': 33}, 'hidden size 33 and 4 heads'),
    ({'hidden_size': '32'}, "hidden_size '32', expected a whole number from 1"),
    ({'hidden_size': True}, 'hidden_size True'),
    ({'hidden_size': None}, 'no hidden_size'),
    ({'num_hidden_layers': 10**9}, 'num_hidden_layers'),
    ({'num_attention_heads': 0}, 'num_attention_heads 0'),
    ({'vocab_size': -1}, 'vocab_size -1'),
    ({'vocab_size': 2.5}, 'vocab_size 2.5'),
    ({'pad_token_id': 150}, 'pad_token_id 150'),
    ({'hidden_dropout_prob': float('nan')}, 'hidden_dropout_prob nan'),
    ({'layer_norm_eps': float('inf')}, 'layer_norm_eps inf'),
    ({'hidden_dropout_prob': 1}, 'hidden_dropout_prob 1'),
    ({'vocab_size': 'x' * 10_000}, "vocab_size 'x"),
  ],
)
def test_config_refusals(changes, words):
  with pytest.raises(InputError) as caught:
    configure('bert', **changes)
  assert words in str(caught.value) and len(str(caught.value)) < 300
