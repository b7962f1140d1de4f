"""Whole models as transformers reads them: config.json both ways, padding, files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moved import FIXTURES, LABELS, base, tokenizer, trained

from efft import bundle, exchange
from efft.classifier import Classifier
from efft.data import vocabulary
from efft.errors import InputError
from efft.interop import hf_format
from efft.models import convert, hub, weights
from efft.models.encoder import Encoder

ARCHITECTURES = tuple(hf_format.CLASSES)
POOLERLESS = ('distilbert', 'electra')


@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_config_json_is_written_as_it_is_read(architecture):
  found = weights.read_json(FIXTURES / architecture / 'config.json')
  cfg = convert.config_from_hf(found, num_labels=3, pooling='cls')
  written = convert.config_to_hf(cfg)
  assert convert.config_from_hf(written, num_labels=3, pooling='cls') == cfg
  for key, value in written.items():
    if key in ('bos_token_id', 'eos_token_id'):  # the architecture's; the fixture has others
      continue
    assert found.get(key, value) == value or value is None or found[key] is None, key


def narrowed(heads, mlp):
  """(config, parameters) of the small world with layers of these sizes."""
  cfg = dataclasses.replace(tiny.CFG, heads=heads, mlp=mlp)
  return cfg, tiny.params(cfg)


# Few sizes: each new shape is compiled.
@settings(deadline=None, max_examples=6)
@given(
  sizes=st.lists(
    st.tuples(st.sampled_from([0, 1, 3, 4]), st.sampled_from([0, 7, 48])), min_size=1, max_size=3
  ),
)
@example(sizes=[(0, 0)])
@example(sizes=[(0, 7), (0, 0)])
@example(sizes=[(4, 0), (0, 48), (4, 48)])
def test_padding_changes_no_logit(sizes):
  """Layers of any sizes, without heads or units as well."""
  heads, mlp = zip(*sizes, strict=True)
  cfg, params = narrowed(heads, mlp)
  batch = tiny.batch(cfg=cfg)
  args = batch['input_ids'], batch['mask'], batch['token_types']
  hf_format.check(cfg)
  whole, padded, notes = hf_format.padded(cfg, params)
  assert set(whole.heads) == ({4} if any(heads) else {1}) and set(whole.mlp) == {max(1, *mlp)}
  assert whole.heads[0] * whole.head_dim == whole.hidden
  assert bool(notes) == (set(heads) != {4} or len(set(mlp)) > 1 or not mlp[0])
  convert.from_hf(convert.to_hf(padded, whole), whole, head='keep', key=None)  # all and no others
  read = convert.config_from_hf(convert.config_to_hf(whole), num_labels=3, pooling='cls')
  assert read == whole
  expected = Encoder(cfg).apply({'params': params}, *args)
  np.testing.assert_allclose(
    Encoder(whole).apply({'params': padded}, *args), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'hidden': 24}, 'up to 4 heads of 8 in a hidden size of 24, expected .* at most 3 heads'),
    ({'hidden': 28, 'heads': (1, 0)}, 'in a hidden size of 28, expected a multiple of 8'),
    ({'heads': (), 'mlp': ()}, 'no layers'),
    ({'pooling': 'mean'}, 'a head over the mean of all tokens'),
  ],
)
def test_shapes_that_no_config_of_transformers_has_are_refused(fields, message):
  with pytest.raises(InputError, match=f'--format=hf: found .*{message}'):
    hf_format.check(dataclasses.replace(tiny.CFG, **fields))


@pytest.mark.parametrize('sizes', [((0, 0), (48, 48)), ((2, 4), (48, 48)), ((4, 4), (0, 0))])
def test_config_json_is_of_padded_layers_only(sizes):
  cfg, _ = narrowed(*sizes)
  with pytest.raises(InputError, match='pad the layers first'):
    convert.config_to_hf(cfg)
  whole = dataclasses.replace(tiny.CFG, hidden=24, embed_dim=24)
  with pytest.raises(InputError, match='pad the layers first'):
    convert.config_to_hf(whole)


def test_layers_without_heads_or_units_are_written_and_read_by_name():
  cfg, params = narrowed((0, 3), (7, 0))
  tensors = convert.to_hf(params, cfg)
  names = {name for name in tensors if name.startswith('bert.encoder.layer.0.attention.')}
  assert {name.removeprefix('bert.encoder.layer.0.attention.') for name in names} == {
    'output.dense.bias', 'output.LayerNorm.weight', 'output.LayerNorm.bias',
  }  # fmt: skip
  again = convert.from_hf(tensors, cfg, head='keep', key=None)
  jax.tree.map(np.testing.assert_array_equal, again, params)


TEXTS = ['a gorgeous, witty movie', 'a waste of time', 'boring']
CLASSES = {'bert': 'BertTokenizer', 'roberta': 'RobertaTokenizer'}


def pruned(architecture, folder):
  """Writes an encoder with few words, without heads and units in a layer or in all.

  Its base's tokenizer has files that its own no longer agrees with.

  Returns (config, parameters, its arguments for TEXTS), all with the words that went.
  """
  heads, mlp = ((0, 2), (10, 0)) if architecture == 'bert' else ((0, 0), (0, 0))
  cfg = dataclasses.replace(base(architecture).cfg, heads=heads, mlp=mlp)
  params = tiny.params(cfg)
  whole = hub.tokenizer_from(tokenizer(architecture))
  small, kept = vocabulary.shrink(whole.to_str(), vocabulary.used(TEXTS, None, whole))
  assert len(kept) < cfg.vocab_size and kept.index(cfg.pad_id) == cfg.pad_id
  word = {'embedding': params['embed']['word']['embedding'][np.asarray(kept)]}

  old = folder / 'base'
  old.mkdir()
  (old / 'config.json').write_bytes((FIXTURES / architecture / 'config.json').read_bytes())
  (old / 'vocab.txt').write_text('\n'.join(sorted(whole.get_vocab(), key=whole.get_vocab().get)))
  (old / 'tokenizer_config.json').write_text(
    json.dumps(
      {
        'tokenizer_class': CLASSES[architecture],
        'added_tokens_decoder': {
          str(2 * i): {'content': token.content, 'special': True}
          for i, token in whole.get_added_tokens_decoder().items()
        },
      }
    )
  )
  contents, notes = hf_format.write(hf_format.Model(
    dataclasses.replace(cfg, vocab_size=len(kept)),
    params | {'embed': params['embed'] | {'word': word}},
    labels=LABELS, kind='single', tokenizer=small, max_length=24, base=old,
  ))  # fmt: skip
  assert len(notes) == 1
  (folder / 'hf').mkdir()
  for name, data in contents.items():
    (folder / 'hf' / name).write_bytes(data)
  return cfg, params, encoded(whole, cfg)


def encoded(tokenizer, cfg):
  """(ids, mask, token types) of TEXTS."""
  tokenizer.enable_padding(pad_id=cfg.pad_id)
  rows = tokenizer.encode_batch(TEXTS)
  fields = ('ids', 'attention_mask', 'type_ids')
  ids, mask, types = (np.int32([getattr(row, field) for row in rows]) for field in fields)
  return ids, mask > 0, types


@pytest.mark.parametrize('architecture', CLASSES)
def test_a_pruned_encoder_is_a_checkpoint_of_its_own(architecture, tmp_path):
  cfg, params, args = pruned(architecture, tmp_path)
  made = tmp_path / 'hf'
  assert not (made / 'vocab.txt').exists()
  small = hub.tokenizer(made)
  decoder = json.loads((made / 'tokenizer_config.json').read_text())['added_tokens_decoder']
  assert {i: token['content'] for i, token in decoder.items()} == {
    str(i): token.content for i, token in small.get_added_tokens_decoder().items()
  }
  found = hub.load(str(made), num_labels=3, head='keep', key=jax.random.key(0))
  assert found.cfg.vocab_size == small.get_vocab_size()
  expected = Encoder(cfg).apply({'params': params}, *args)
  logits = Encoder(found.cfg).apply({'params': found.params}, *encoded(small, found.cfg))
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('pooling', ['cls', 'mean'])
def test_an_exported_run_is_a_checkpoint_of_its_own(architecture, pooling, tmp_path):
  run = trained(tmp_path / 'run', 'lora', 1, architecture=architecture, pooling=pooling)
  made = tmp_path / 'made'
  said = exchange.export(run, made)
  form = 'sentence-transformers' if pooling == 'mean' else 'hf'
  assert said['format'] == form and said['difference'] < 1e-4
  assert bool(said['notes']) == (pooling == 'mean' and architecture not in POOLERLESS)
  found = hub.load(str(made), num_labels=3, head='keep', key=jax.random.key(0))
  assert found.labels == LABELS and found.problem == 'single'
  rows = np.random.default_rng(0).integers(1, 60, (4, 9)).astype(np.int32)
  args = rows, rows > 0, np.zeros_like(rows)
  model = Classifier.load(run)
  batch = dict(zip(('input_ids', 'mask', 'token_types'), args, strict=True))
  expected = model.apply(model.variables, batch)
  logits = jax.jit(Encoder(found.cfg).apply)({'params': found.params}, *args)
  np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
  assert hub.tokenizer(made).to_str() == hub.tokenizer_from(bundle.load(run).tokenizer).to_str()
  kept = json.loads((made / 'tokenizer_config.json').read_text())
  assert kept['model_max_length'] == 24
  card = (made / 'README.md').read_text()
  library = 'transformers' if form == 'hf' else form
  assert card.startswith(f'---\nlibrary_name: {library}\n') and '| 2 | yes |' in card
  assert found.cfg.pooling == pooling
  drawn = hub.load(str(made), num_labels=5, head='new', key=jax.random.key(0))
  assert drawn.sha256 == found.sha256 and drawn.params['head']['out']['bias'].shape == (5,)


def test_what_transformers_cannot_hold_is_refused(tmp_path):
  mean = trained(tmp_path / 'mean', 'lora', 1, pooling='mean')
  with pytest.raises(InputError, match='--format=hf: found a head over the mean of all tokens'):
    exchange.export(mean, tmp_path / 'out', 'hf')
  cls = trained(tmp_path / 'cls', 'lora', 1)
  with pytest.raises(InputError, match='sentence-transformers: found .*own head .*--format=hf'):
    exchange.export(cls, tmp_path / 'out', 'sentence-transformers')
  adapter = trained(tmp_path / 'adapter', 'pfeiffer', 1)
  with pytest.raises(InputError, match='cannot be folded.*use --format=adapterhub'):
    exchange.export(adapter, tmp_path / 'out', 'hf')
  with pytest.raises(InputError, match="--format: found 'onnx'"):
    exchange.export(adapter, tmp_path / 'out', 'onnx')
  assert not (tmp_path / 'out').exists()
