"""Whole models as transformers reads them: config.json both ways, padding, files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from moved import FIXTURES, LABELS, trained

from efft import bundle, exchange
from efft.classifier import Classifier
from efft.errors import InputError
from efft.interop import hf_format
from efft.models import convert, hub, weights
from efft.models.encoder import Encoder

ARCHITECTURES = tuple(hf_format.CLASSES)


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


@settings(deadline=None, max_examples=8)
@given(
  heads=st.tuples(st.integers(1, 4), st.integers(1, 4)),
  mlp=st.tuples(st.integers(1, 48), st.integers(1, 48)),
)
def test_padding_changes_no_logit(heads, mlp):
  cfg = dataclasses.replace(tiny.CFG, heads=heads, mlp=mlp)
  params = tiny.params(cfg)
  batch = tiny.batch(cfg=cfg)
  args = batch['input_ids'], batch['mask'], batch['token_types']
  whole, padded, notes = hf_format.padded(cfg, params)
  assert set(whole.heads) == {4} and set(whole.mlp) == {max(mlp)}
  assert bool(notes) == (set(heads) != {4} or len(set(mlp)) > 1)
  expected = Encoder(cfg).apply({'params': params}, *args)
  np.testing.assert_allclose(
    Encoder(whole).apply({'params': padded}, *args), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize('architecture', ['bert', 'roberta', 'distilbert'])
def test_an_exported_run_is_a_checkpoint_of_its_own(architecture, tmp_path):
  run = trained(tmp_path / 'run', 'lora', 1, architecture=architecture)
  said = exchange.export(run, tmp_path / 'hf', 'hf')
  assert said['difference'] < 1e-4 and said['notes'] == []
  made = tmp_path / 'hf'
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
  assert card.startswith('---\nlibrary_name: transformers\n') and '| 2 | yes |' in card


def test_what_transformers_cannot_hold_is_refused(tmp_path):
  mean = trained(tmp_path / 'mean', 'lora', 1, pooling='mean')
  with pytest.raises(InputError, match='--format=hf: found a head over the mean of all tokens'):
    exchange.export(mean, tmp_path / 'out', 'hf')
  adapter = trained(tmp_path / 'adapter', 'pfeiffer', 1)
  with pytest.raises(InputError, match='cannot be folded.*use --format=adapterhub'):
    exchange.export(adapter, tmp_path / 'out', 'hf')
  with pytest.raises(InputError, match="--format: found 'onnx'"):
    exchange.export(adapter, tmp_path / 'out', 'onnx')
  assert not (tmp_path / 'out').exists()
