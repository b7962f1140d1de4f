"""Runs combined into runs: every kind of leaf against its definition, refusals, and end to end."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import test_end_to_end as runs
from moved import base, trained

from efft import (
  arithmetic,
  assemble,
  bundle,
  compact,
  config,
  files,
  main,
  quantize,
  run,
  transfer,
  tree,
)
from efft.arithmetic import Mix
from efft.combining import combine
from efft.errors import EnvironmentProblem, InputError
from efft.peft import base as peft

BERT = Path(__file__).parent / 'fixtures' / 'bert'


def read(folder) -> bundle.Bundle:
  return bundle.load(Path(folder) / 'bundle')


def variables(folder) -> dict:
  """{path: array} of the whole model of a run."""
  content = read(folder)
  values = transfer.restored(peft.build(content.method), content.leaves, base().params)
  return {path: np.asarray(x) for path, x in tree.flatten(values).items()}


def merged(folder) -> dict:
  """{path: array} of the encoder with the run's deltas folded in, the head left out."""
  content, values = read(folder), tree.unflatten(variables(folder))
  params = peft.merge(peft.build(content.method), values['params'], values.get('delta', {}))
  flat = {path: np.float64(x) for path, x in tree.flatten(params).items()}
  return {path: x for path, x in flat.items() if not path.startswith('head/')}


PRETRAINED = functools.cache(lambda: tree.flatten({'params': base().params}))


def alike(found, expected, **options):
  assert found.keys() == expected.keys()
  for path, x in found.items():
    np.testing.assert_allclose(x, expected[path], err_msg=path, **options)


def summed(folders, weights) -> dict:
  """base + the sum of w (merged - base)."""
  first = tree.flatten(base().params)
  changes = [merged(folder) for folder in folders]
  shares = list(zip(weights, changes, strict=True))
  return {
    p: x + sum(w * (c[p] - x) for w, c in shares) for p, x in first.items() if p in changes[0]
  }


LORAS = (
  {'rank': 2, 'alpha': 3.0},
  {'rank': 4, 'use_rslora': True, 'lora_bias': True, 'at': r'layer_\d+/mlp/(up|down)/matmul'},
  {
    'at': r'layer_\d+/(attention/query|mlp/up)/matmul',
    'rank_pattern': [['layer_0/.*', 1]], 'alpha_pattern': [['layer_1/.*', 5.0]],
  },
)  # fmt: skip


def test_quantised_runs_are_refused(tmp_path):
  folders = [trained(tmp_path / str(i), 'lora', i) for i in range(2)]
  content = read(folders[1])
  form = dataclasses.replace(content, quantize=(('params/layer_.*/kernel', 'int8'),))
  held = quantize.quantized(tree.unflatten(variables(folders[1])), form.quantize)
  whole = dataclasses.replace(content, leaves=content.leaves | tree.flatten(held))
  for changed, says in ((form, 'quantize'), (whole, 'held in int8.*then quantise')):
    place = Path(folders[1]) / 'bundle'
    shutil.rmtree(place)
    bundle.save(place, changed)
    with pytest.raises(InputError, match=says):
      combine(folders, tmp_path / 'out')


@pytest.fixture(scope='module')
def loras(tmp_path_factory):
  folder = tmp_path_factory.mktemp('loras')
  return [trained(folder / str(i), 'lora', i, options) for i, options in enumerate(LORAS)]


def test_cat_of_unlike_loras_is_the_sum_of_their_updates(loras, tmp_path):
  weights = (0.5, -1.0, 2.0)
  combine(loras, tmp_path / 'cat', 'cat', weights=weights)
  alike(merged(tmp_path / 'cat'), summed(loras, weights), atol=2e-6)
  spec = read(tmp_path / 'cat').method['lora']
  assert spec['rank'] == spec['alpha'] == 12  # rank 4 and 8 meet at layer_1/mlp/up
  assert spec['lora_bias'] and not spec['use_rslora'] and spec['alpha_pattern'] is None
  # Whoever trains on gets an error from neither the method nor the rules.
  net, params = assemble.network(base().cfg, {'lora': spec}, 'float32'), base().params
  values = assemble.variables(net, params, jax.random.key(0))
  assert not tree.diff(values['delta'], tree.unflatten(variables(tmp_path / 'cat'))['delta'])
  assemble.partition(values, read(tmp_path / 'cat').rules)


def test_svd_at_full_rank_is_cat_and_below_it_truncated(loras, tmp_path):
  combine(loras, tmp_path / 'full', 'svd', rank=32)
  expected = summed(loras, (1 / 3,) * 3)
  alike(merged(tmp_path / 'full'), expected, atol=2e-6)
  done = combine(loras, tmp_path / 'low', 'svd', rank=3)
  assert done['rank'] == {'lora': 3}
  found, first = merged(tmp_path / 'low'), tree.flatten(base().params)
  for path, x in found.items():
    if path.endswith('kernel'):
      values = np.linalg.svd(expected[path] - first[path], compute_uv=False)
      error = np.linalg.norm(x - expected[path])
      np.testing.assert_allclose(error, np.linalg.norm(values[3:]), atol=1e-5)
  assert combine(loras, tmp_path / 'own', 'svd')['rank'] == {'lora': 8}, 'the largest of the runs'


def test_ties_svd_mixes_the_updates(loras, tmp_path):
  combine(loras[:2], tmp_path / 'ties', 'ties_svd', density=0.3, rank=32)
  first = tree.flatten(base().params)
  one, two = (merged(folder) for folder in loras[:2])
  found, mix = merged(tmp_path / 'ties'), Mix('ties', 0.3)
  for path, x in found.items():
    moved = [own[path] - first[path] for own in (one, two) if (own[path] != first[path]).any()]
    change = mix(moved, [1.0] * len(moved), path) if moved else 0
    np.testing.assert_allclose(x, first[path] + change, atol=3e-6, err_msg=path)


def test_linear_on_lora_is_that_of_peft_and_gives_one_run_back(tmp_path):
  options = [{'rank': 4}, {'rank': 4, 'alpha': 3.0}]
  pair = [trained(tmp_path / str(i), 'lora', i, o) for i, o in enumerate(options)]
  combine(pair, tmp_path / 'mean', weights=(0.3, -0.7))
  factors = [variables(folder) for folder in pair]
  signs, scales = ((1, 1), (-1, 1)), (16 / 4, 3 / 4)
  for path, x in variables(tmp_path / 'mean').items():
    if path.startswith('delta/'):
      shares = [
        signs[i][path.endswith('/b')] * (w * scales[i]) ** 0.5 for i, w in enumerate((0.3, 0.7))
      ]
      expected = sum(s * own[path] for s, own in zip(shares, factors, strict=True))
      np.testing.assert_allclose(x, expected, atol=1e-6)
  combine(pair, tmp_path / 'one', weights=(0, 1))
  alike(merged(tmp_path / 'one'), merged(pair[1]), atol=1e-6)


def test_lora_fa_with_one_a_is_summed_and_with_two_is_refused(tmp_path):
  pair = [trained(tmp_path / str(i), 'lora_fa', i) for i in range(2)]
  combine(pair, tmp_path / 'sum', weights=(0.5, -2.0))
  alike(merged(tmp_path / 'sum'), summed(pair, (0.5, -2.0)), atol=2e-6)
  content = read(pair[1])
  leaves = {p: 2 * x if p.endswith('/a') else x for p, x in content.leaves.items()}
  bundle.save(tmp_path / '1' / 'bundle', dataclasses.replace(content, leaves=leaves))
  with pytest.raises(InputError, match=r'/a, which does not train and differs .* --how=cat'):
    combine(pair, tmp_path / 'no')
  combine(pair, tmp_path / 'cat', 'cat')
  alike(merged(tmp_path / 'cat'), summed(pair, (0.5, 0.5)), atol=2e-6)


def test_embeddings_are_factors_too(tmp_path):
  pair = [trained(tmp_path / str(i), 'lora_embedding', i) for i in range(2)]
  done = combine(pair, tmp_path / 'cat', 'cat', weights=(1, -1))
  assert done['rank'] == {'lora': 16, 'words': 16}
  alike(merged(tmp_path / 'cat'), summed(pair, (1, -1)), atol=5e-6)


@pytest.mark.parametrize('how', ['linear', 'ties', 'magnitude_prune'])
def test_adapter_soups(how, tmp_path):
  """AdapterSoup is the mean of the adapters; the others prune around zero."""
  three = [trained(tmp_path / str(i), 'pfeiffer', i) for i in range(3)]
  own = [variables(folder) for folder in three]
  done = combine(three, tmp_path / 'soup', how)
  found, mix = variables(tmp_path / 'soup'), Mix(how, 0.5)
  assert done['weights'] == ([1.0] * 3 if how == 'ties' else [1 / 3] * 3)
  for path, x in found.items():
    if path.startswith('delta/'):
      expected = mix([leaves[path] for leaves in own], done['weights'], path)
      np.testing.assert_allclose(x, expected, atol=1e-6)
    else:
      np.testing.assert_array_equal(x, own[0][path])
  combine(three, tmp_path / 'third', weights=(0, 0, 1))
  alike(variables(tmp_path / 'third') | _head(own[0]), own[2] | _head(own[0]), rtol=0)


def _head(values):
  return {path: x for path, x in values.items() if path.startswith('params/head/')}


def test_scales_are_pruned_towards_one_and_move_from_one(tmp_path):
  pair = [trained(tmp_path / str(i), 'ia3', i) for i in range(2)]
  own = [variables(folder) for folder in pair]
  combine(pair, tmp_path / 'pruned', 'magnitude_prune', density=0.25, weights=(1, 0))
  combine(pair, tmp_path / 'both', weights=(1, 1))
  pruned, both = variables(tmp_path / 'pruned'), variables(tmp_path / 'both')
  scales = [path for path in pruned if path.startswith('delta/')]
  for path in scales:
    np.testing.assert_allclose(both[path], own[0][path] + own[1][path] - 1, rtol=1e-5)
    change = arithmetic.largest(own[0][path] - 1, 0.25)
    assert (pruned[path] == 1).mean() == 0.75
    np.testing.assert_allclose(pruned[path], 1 + change, rtol=1e-5)
  assert len(scales) == 6


def test_what_starts_by_chance_or_from_the_weights(tmp_path):
  """DoRA's norms start at the kernel's, its factors at nothing in particular and at zero."""
  pair = [trained(tmp_path / str(i), 'dora', i) for i in range(2)]
  own = [variables(folder) for folder in pair]
  combine(pair, tmp_path / 'both', weights=(1, 1))
  for path, x in variables(tmp_path / 'both').items():
    if path.startswith('delta/'):
      norm = 0.0
      if path.endswith('/m'):
        kernel = path.replace('delta/', 'params/').replace('matmul_dora/m', 'kernel')
        norm = np.linalg.norm(PRETRAINED()[kernel], axis=0)
      np.testing.assert_allclose(x, own[0][path] + own[1][path] - norm, atol=1e-5)


def test_biases_add_up_beside_the_pretrained_ones(tmp_path):
  one = trained(tmp_path / 'one', 'bitfit', 1)
  two = trained(tmp_path / 'two', 'bitfit', 2)
  content = read(two)
  dropped = 'params/layer_0/mlp/up/bias'
  leaves = {path: x for path, x in content.leaves.items() if path != dropped}
  bundle.save(Path(two) / 'bundle', dataclasses.replace(content, leaves=leaves))
  own = [variables(folder) for folder in (one, two)]
  combine([one, two], tmp_path / 'sum', weights=(2, -1))
  found = variables(tmp_path / 'sum')
  for path, x in found.items():
    if not path.startswith('params/head/'):
      first = PRETRAINED()[path]
      expected = first + 2 * (own[0][path] - first) - (own[1][path] - first)
      np.testing.assert_allclose(x, expected, atol=1e-5, err_msg=path)
  combine([one, two], tmp_path / 'ties', 'ties', density=0.5)
  assert dropped in read(tmp_path / 'ties').leaves
  # A bias of which pruning leaves half is stored as that half, and the base model.
  combine([one], tmp_path / 'half', 'magnitude_prune', density=0.3)
  content = read(tmp_path / 'half')
  assert isinstance(content.leaves[dropped], compact.Sparse) and content.needs_base
  expected = PRETRAINED()[dropped] + arithmetic.largest(
    own[0][dropped] - PRETRAINED()[dropped], 0.3
  )
  np.testing.assert_allclose(variables(tmp_path / 'half')[dropped], expected, atol=1e-6)


def test_whole_models_are_souped_without_their_base(tmp_path):
  """And with it, where the weights do not sum to one."""
  gone = {'base': {'name': 'gone', 'path': str(tmp_path / 'gone'), 'sha256': base().sha256}}
  pair = [trained(tmp_path / str(i), 'full', i, about=gone) for i in range(2)]
  own = [read(folder).leaves for folder in pair]
  combine(pair, tmp_path / 'soup', weights=(0.25, 0.75), head='average')
  content = read(tmp_path / 'soup')
  assert not content.needs_base and content.leaves.keys() == own[0].keys()
  for path, x in content.leaves.items():
    np.testing.assert_allclose(x, 0.25 * own[0][path] + 0.75 * own[1][path], atol=1e-6)
  with pytest.raises(EnvironmentProblem, match='gone'):
    combine(pair, tmp_path / 'sum', weights=(1, 1))
  assert not (tmp_path / 'sum').exists()


@pytest.mark.parametrize('name', ['vera', 'pissa', 'propetl_adapter'])
def test_what_is_frozen_is_kept_or_refused(name, tmp_path):
  options = {'vera': {'rank': 8}, 'pissa': {'rank': 2}}.get(name)
  pair = [trained(tmp_path / str(i), name, i, options) for i in range(2)]
  contents = [read(folder) for folder in pair]
  frozen = {
    'vera': lambda path: 'shared_vera' in path,
    'pissa': lambda path: path.endswith(('/a0', '/b0')),
    'propetl_adapter': lambda path: path.endswith('_scores'),
  }[name]
  if name == 'propetl_adapter':  # two runs of one mask
    masks = {path: x for path, x in contents[0].leaves.items() if frozen(path)}
    assert {x.dtype for x in masks.values()} == {np.dtype(bool)}
    with pytest.raises(InputError, match='_scores, which does not train and differs'):
      combine(pair, tmp_path / 'no')
    contents[1] = dataclasses.replace(contents[1], leaves=contents[1].leaves | masks)
    bundle.save(tmp_path / '1' / 'bundle', contents[1])
  own = [variables(folder) for folder in pair]
  combine(pair, tmp_path / 'mean', head='average')
  stored, found = read(tmp_path / 'mean').leaves, variables(tmp_path / 'mean')
  kept = [path for path in found if path.startswith('delta/') and frozen(path)]
  assert kept
  for path, x in found.items():
    if path in kept:
      np.testing.assert_array_equal(x, own[0][path])
      assert stored[path].dtype == contents[0].leaves[path].dtype
    else:
      np.testing.assert_allclose(x, (own[0][path] + own[1][path]) / 2, atol=1e-6, err_msg=path)
  leaves = contents[1].leaves
  turned = {path: x[::-1] for path, x in leaves.items() if path in kept}
  bundle.save(tmp_path / '1' / 'bundle', dataclasses.replace(contents[1], leaves=leaves | turned))
  with pytest.raises(InputError, match='which does not train and differs from that of'):
    combine(pair, tmp_path / 'no')


def test_dare_follows_its_seed(tmp_path):
  pair = [trained(tmp_path / str(i), 'bitfit', i) for i in range(2)]
  for name, seed in (('a', 1), ('b', 1), ('c', 2)):
    combine(pair, tmp_path / name, 'dare_ties', seed=seed, density=0.4)
  a, b, c = (files.digests(tmp_path / name / 'bundle') for name in 'abc')
  assert a == b != c


def _run(data, folder) -> str:
  cfg = config.load(f'configs/lora.py:task={data},model={BERT},text=review,label=verdict')
  cfg.train.steps, cfg.model.max_length, cfg.mesh.devices = 2, 24, 1
  cfg.optim.lr = 1e-2
  run.train(cfg, folder)
  return str(folder)


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """Two runs of LoRA, on data that share a label."""
  folder = tmp_path_factory.mktemp('tasks')
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('EFFT_CACHE', str(folder / 'cache'))
    first = runs.reviews(folder / 'first.csv', 48)
    second = folder / 'second.csv'
    second.write_text(first.read_text().replace('hated', 'bored'), encoding='utf-8')
    yield [_run(data, folder / data.stem) for data in (first, second)]


def test_trained_runs_are_combined_and_predict(tasks, tmp_path, capsys):
  output = tmp_path / 'both'
  flags = [f'--runs={tasks[0]},{tasks[0]}', f'--output={output}', '--how=cat', '--head=average']
  assert main.main(['combine', *flags, '--weights=0.5,0.5']) == 0
  assert 'rank.lora  16' in capsys.readouterr().out
  texts = [*runs.GOOD, *runs.BAD]
  # A run combined with itself is that run.
  for found, expected in zip(run.predict(output, texts), run.predict(tasks[0], texts), strict=True):
    assert found['label'] == expected['label']
    np.testing.assert_allclose(found['score'], expected['score'], atol=1e-5)
  reported = files.read_json(Path(tasks[0]) / 'results.json')['metrics']['loss']
  np.testing.assert_allclose(run.evaluate(output)['loss'], reported, rtol=1e-5)
  content = read(output)
  assert content.metrics == {} and content.needs_base and content.rules == read(tasks[0]).rules
  again = files.read_json(output / 'config.json')
  assert again['method'] == content.method and again['method']['lora']['rank'] == 16
  assert config.resolve(again) == again
  done = files.read_json(output / 'results.json')
  assert done['combined']['runs'] == [tasks[0]] * 2 and done['combined']['how'] == 'cat'
  assert run.train(again, output) == done, 'a finished run'
  assert f'efft predict --run={output}' in (output / 'README.md').read_text()


def test_united_labels_are_predicted_and_not_evaluated(tasks, tmp_path):
  done = combine(tasks, tmp_path / 'union', head='union')
  assert done['labels'] == ['hated', 'liked', 'bored']
  (record,) = run.predict(tmp_path / 'union', ['a waste of time'])
  assert set(record['scores']) == {'hated', 'liked', 'bored'}
  with pytest.raises(InputError, match='the labels hated, liked in the data'):
    run.evaluate(tmp_path / 'union')
