"""The protocol with made-up clocks, and what is measured in each precision, on a tiny bundle."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from efft import bundle, config, cpu, qtensor, tree
from efft.bench import latency
from efft.classifier import Classifier
from efft.errors import InputError
from efft.models import quantized
from efft.qtensor import QTensor

TOKENIZER = (tiny.__file__).replace('tiny.py', 'fixtures/bert/tokenizer.json')
KERNEL = 'params/layer_0/mlp/up/kernel'


@pytest.fixture(scope='module')
def lora():
  return made('lora')


def made(name: str) -> bundle.Bundle:
  """A bundle that stands alone, its deltas away from their start."""
  cfg = dataclasses.replace(tiny.SHORT, vocab_size=150)
  resolved = config.resolve(config.load(f'configs/{name}.py:task=sst2'))
  here = tiny.world(resolved, cfg)
  moved = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), here.variables['delta'])
  leaves = tree.flatten({'params': jax.device_get(here.variables['params']), 'delta': moved})
  return bundle.Bundle(
    leaves={path: np.asarray(x) for path, x in leaves.items()}, tokenizer=open(TOKENIZER).read(),
    encoder=cfg.to_dict(), method=resolved['method'], rules=(), labels=('a', 'b', 'c'),
    kind='single', max_length=24, dtype='float32', pooling='cls', columns={'text': 'text'},
    base={'name': 'made up', 'path': '', 'sha256': ''}, needs_base=False, metrics={}, versions={},
  )  # fmt: skip


def timed(costs, seconds):
  """What `timed` gives where call i costs costs[i], the last for ever; and the number of calls."""
  now, calls = [0.0], [0]

  def fn():
    now[0] += costs[min(calls[0], len(costs) - 1)]
    calls[0] += 1
    return np.zeros(())

  return latency.timed(fn, seconds, lambda: now[0]), calls[0]


def test_calls_count_once_they_get_no_faster():
  # Medians of three: 8 to 3, 7 to 3, then 3 to 3.
  taken, calls = timed([9, 8, 7, 3, 3, 3, 3, 3, 2], 100)
  assert set(taken) == {2} and calls - len(taken) == 8
  assert sum(taken) == 100


def test_long_calls_are_few():
  taken, calls = timed([100, 50, 40], 10)
  assert (len(taken), calls) == (latency.LEAST, latency.LEAST + 1)
  taken, calls = timed([4, 3, 2, 1.75, 1.5, 1.25, 1.0], 10)
  assert calls - len(taken) == 4, 'warming up ends when its time does'
  assert taken == [1.5, 1.25] + [1.0] * (len(taken) - 2) and 10 <= sum(taken) < 11


@given(st.lists(st.floats(1e-4, 1e3), min_size=1), st.integers(1, 64))
def test_summary_is_numpy_s(taken, batch):
  found = latency.summary(taken, batch)
  shown = [found[name] for name in ('p50_ms', 'p95_ms', 'p99_ms')]
  np.testing.assert_allclose(shown, 1e3 * np.percentile(taken, [50, 95, 99]), rtol=6e-4)
  np.testing.assert_allclose(found['examples_per_second'], batch / np.mean(taken), rtol=6e-4)
  assert found['repeats'] == len(taken)


def test_rows_of_all_precisions(lora, monkeypatch):
  monkeypatch.setattr(cpu, 'multiplies_bfloat16', lambda: False)
  monkeypatch.setattr(quantized, 'integers', lambda: False)
  asked = latency.cells(lora, (1, 3), (5,), ('f32', 'bf16', 'int8'))
  told = []
  rows = list(latency.measure(lora, 'here', asked, seconds=1e-3, announce=told.append))
  assert told == [6]
  cells = [(row['batch'], row['length'], row['precision']) for row in rows]
  assert cells == asked == [(b, 5, p) for p in ('f32', 'bf16', 'int8') for b in (1, 3)]
  for row in rows:
    assert 0 < row['p50_ms'] <= row['p95_ms'] <= row['p99_ms'] and row['compile_seconds'] > 0
    assert row['examples_per_second'] > 0 and row['repeats'] >= latency.LEAST
    assert 'merged' not in row
  notes = {row['precision']: row.get('note') for row in rows}
  assert notes['f32'] is None and 'bfloat16' in notes['bf16'] and 'int8' in notes['int8']
  sizes = {row['precision']: row['memory_mb'] for row in rows if row['batch'] == 1}
  weights = sum(x.nbytes for x in lora.leaves.values()) / 1e6
  assert sizes['f32'] > weights > sizes['bf16']


def test_int8_is_the_merged_model_rounded(lora):
  """Kernels are codes of weight + update, computed here as two matrices."""
  form, _ = latency._form(lora, 'int8', False)
  assert form.method == {} and not any(path.startswith('delta/') for path in form.leaves)
  path = 'params/layer_0/attention/query/kernel'
  delta = {n: lora.leaves[f'delta/layer_0/attention/query/matmul_lora/{n}'] for n in 'ab'}
  (method,) = lora.method.values()
  summed = lora.leaves[path] + method['alpha'] / method['rank'] * delta['a'] @ delta['b']
  expected, found = qtensor.quantize(summed), form.leaves[path]
  assert isinstance(found, QTensor) and (found.codes, found.inputs) == ('int8', 'token')
  np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-5)
  assert np.abs(found.value.astype(int) - expected.value).max() <= 1
  held = [path for path, x in form.leaves.items() if isinstance(x, QTensor)]
  assert len(held) == 6 + 2  # six kernels a layer, words and positions
  texts = ['a gorgeous film', 'a waste of time']
  exact, rounded = (Classifier.of(x, 'here', devices=1).logits(texts) for x in (lora, form))
  assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


def test_what_does_not_merge_stays_float_beside_int8():
  content = made('houlsby')
  form, note = latency._form(content, 'int8', False)
  assert form.method == content.method and 'does not merge' in note
  assert isinstance(form.leaves[KERNEL], QTensor)
  for path, x in content.leaves.items():
    if path.startswith('delta/'):
      np.testing.assert_array_equal(form.leaves[path], x)
  with pytest.raises(InputError, match='cannot be folded'):
    list(latency.measure(content, 'here', [(1, 4, 'f32')], merged=True))


def test_a_bundle_in_int8_stays_what_it_is(lora):
  form, _ = latency._form(lora, 'int8', False)
  assert latency._held(form) == 'int8' and latency._held(lora) == ''
  told, asked = [], latency.cells(form, (2,), (4,), ('f32', 'bf16', 'int8'))
  (row,) = latency.measure(form, 'here', asked, seconds=1e-3, announce=told.append)
  assert told == [1] and row['precision'] == 'int8' and 'as it is' in row['note']


def test_integers_that_are_multiplied_as_floats_are_announced(lora, monkeypatch, caplog, tmp_path):
  monkeypatch.setenv('EFFT_INT8', 'never')
  form, _ = latency._form(lora, 'int8', False)
  assert form.leaves[KERNEL].inputs == 'token'
  # Its products are of floats anywhere.
  plain = {
    path: dataclasses.replace(x, inputs='float') if isinstance(x, QTensor) else x
    for path, x in form.leaves.items()
  }
  for content, slowed in ((form, True), (dataclasses.replace(form, leaves=plain), False)):
    (row,) = latency.measure(content, 'here', [(1, 4, 'int8')], seconds=1e-3)
    assert (quantized.NO_INTEGERS in row['note']) == slowed
    bundle.save(tmp_path / str(slowed), content)
    caplog.clear()
    Classifier.load(tmp_path / str(slowed))
    assert (quantized.NO_INTEGERS in caplog.text) == slowed


def test_merged_models_have_fewer_numbers(lora):
  (row,) = latency.measure(lora, 'here', [(1, 4, 'f32')], merged=True, seconds=1e-3)
  assert row['merged'] is True
  deltas = sum(x.nbytes for path, x in lora.leaves.items() if path.startswith('delta/'))
  (beside,) = latency.measure(lora, 'here', [(1, 4, 'f32')], seconds=1e-3)
  assert beside['memory_mb'] - row['memory_mb'] > 0.5 * deltas / 1e6


def test_lengths_that_are_not_given_fit(lora):
  assert {n for _, n, _ in latency.cells(lora, (1,), None, ('f32',))} == {24}
  longer = dataclasses.replace(lora, encoder={**lora.encoder, 'max_positions': 140})
  assert [n for _, n, _ in latency.cells(longer, (1,), None, ('f32',))] == [32, 128]
  # RoBERTa counts from the padding's number on.
  shifted = {**lora.encoder, 'max_positions': 130, 'positions_from_pad': True, 'pad_id': 1}
  roberta = dataclasses.replace(lora, encoder=shifted)
  assert [n for _, n, _ in latency.cells(roberta, (1,), None, ('f32',))] == [32, 128]
  with pytest.raises(InputError, match='--length: found 129, expected at most 128'):
    latency.cells(roberta, (1,), (129,), ('f32',))


def test_prompts_take_positions_too():
  with pytest.raises(InputError, match='--length: found 8 tokens and 20 .* at most 24 together'):
    list(latency.measure(made('prompt'), 'here', [(1, 4, 'f32'), (1, 8, 'f32')], seconds=1e-3))


def test_texts_are_random_tokens_without_padding():
  for pad in (0, 1, 149):
    cfg = dataclasses.replace(tiny.CFG, vocab_size=150, pad_id=pad)
    batch = latency.texts(cfg, 64, 24)
    assert batch['mask'].all() and batch['input_ids'].shape == (64, 24)
    assert set(np.unique(batch['input_ids'])) == set(range(150)) - {pad}
