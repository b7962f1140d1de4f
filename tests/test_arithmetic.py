"""Task arithmetic, TIES, DARE, factors and heads against loops, HF PEFT and direct computation."""

import importlib
import itertools
import math
import zlib

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as arrays

from efft import arithmetic, main
from efft.arithmetic import Factors, Mix

PATH = 'delta/layer_0/attention/query/matmul_lora/a'


def draw(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kept(how, x, number, density, seed):
  """{index: value} of what pruning leaves, by a sort or DARE's draws, one number at a time."""
  flat = [float(v) for v in x.ravel()]
  if how.startswith('dare'):
    rng = np.random.default_rng([seed, number, zlib.crc32(PATH.encode())])
    draws = rng.random(x.shape).ravel()
    return {i: v / density for i, v in enumerate(flat) if draws[i] < density}
  order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
  return {i: flat[i] for i in order[: int(density * len(flat))]}


def by_loops(how, tensors, weights, density, majority, seed):
  """Algorithm 1 of TIES and equation 3 of DARE, for each number alone."""
  everything = [dict(enumerate(map(float, x.ravel()))) for x in tensors]
  if how != 'linear':
    everything = [kept(how, x, i, density, seed) for i, x in enumerate(tensors)]
  out = []
  for index in range(tensors[0].size):
    values = [own.get(index, 0.0) for own in everything]
    if how.endswith('ties'):
      votes = values if majority == 'total' else [np.sign(v) for v in values]
      sign = 1 if sum(votes) >= 0 else -1
      chosen = [(w, v) for w, v in zip(weights, values, strict=True) if v * sign > 0]
      out.append(sum(w * v for w, v in chosen) / max(len(chosen), 1))
    else:
      out.append(sum(w * v for w, v in zip(weights, values, strict=True)))
  return np.reshape(out, tensors[0].shape)


@pytest.mark.parametrize('majority', arithmetic.MAJORITIES)
@pytest.mark.parametrize('how', arithmetic.PLAIN)
def test_mixtures_are_what_the_papers_say(how, majority):
  for seed, density in enumerate((0.2, 0.5, 0.9, 1.0)):
    tensors = [draw(10 * seed + i, 7, 5) for i in range(3)]
    weights = (0.7, -0.2, 1.5)
    found = Mix(how, density, majority, seed)(tensors, weights, PATH)
    np.testing.assert_allclose(
      found, by_loops(how, tensors, weights, density, majority, seed), atol=1e-12
    )


def peers():
  """HF PEFT's own functions, or a skip that says what goes unchecked."""
  try:
    return importlib.import_module('peft.utils.merge_utils'), importlib.import_module('torch')
  except ImportError as error:
    pytest.skip(f'NOT COMPARED WITH HF PEFT: {error}; pip install peft torch')


@pytest.mark.parametrize('majority', arithmetic.MAJORITIES)
@pytest.mark.parametrize('how', ['linear', 'ties', 'magnitude_prune', 'dare_linear', 'dare_ties'])
def test_mixtures_agree_with_peft(how, majority, monkeypatch):
  merge, torch = peers()
  tensors, weights = [draw(i, 9, 6) for i in range(3)], [0.7, -0.2, 1.5]
  if how.startswith('dare'):
    draws = iter([
      np.random.default_rng([4, i, zlib.crc32(PATH.encode())]).random((9, 6)) for i in range(3)
    ])  # fmt: skip
    # The same draws for both: what they are does not matter, what becomes of them does.
    monkeypatch.setattr(torch, 'bernoulli', lambda input: torch.from_numpy(next(draws)) < input)
  given_ = [torch.from_numpy(x) for x in tensors], torch.tensor(weights)
  options = {'density': 0.4} if how != 'linear' else {}
  options |= {'majority_sign_method': majority} if how.endswith('ties') else {}
  name = {'linear': 'task_arithmetic'}.get(how, how)
  expected = getattr(merge, name)(*given_, **options).numpy()
  found = Mix(how, 0.4, majority, 4)(tensors, weights, PATH)
  np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize('how', ['linear', 'ties', 'magnitude_prune', 'cat', 'svd', 'ties_svd'])
def test_updates_agree_with_those_of_peft(how):
  """A linear layer with three LoRAs, combined by PEFT's add_weighted_adapter itself."""
  peers()
  import peft
  import torch

  ranks = (2, 3, 4) if how in ('cat', 'svd', 'ties_svd') else (3, 3, 3)
  parts = [p._replace(bias=None) for p in updates(ranks=ranks)]
  model = torch.nn.Sequential(torch.nn.Linear(8, 6))
  for i, part in enumerate(parts):
    config = peft.LoraConfig(r=part.rank, lora_alpha=part.scale * part.rank, target_modules=['0'])
    if i:
      model.add_adapter(str(i), config)
    else:
      model = peft.get_peft_model(model, config, adapter_name='0')
    layer = model.base_model.model[0]
    layer.lora_A[str(i)].weight.data = torch.from_numpy(part.a.T.copy())
    layer.lora_B[str(i)].weight.data = torch.from_numpy(part.b.T.copy())
  pruning = {'density': 0.5} if how.startswith(('ties', 'magnitude')) else {}
  rank = {'svd_rank': 2} if how.endswith('svd') else {}
  model.add_weighted_adapter(['0', '1', '2'], list(WEIGHTS), 'all', how, **rank, **pruning)
  expected = layer.get_delta_weight('all').detach().numpy().T
  mix = Mix(how.removesuffix('_svd'), 0.5)
  if how in arithmetic.PLAIN:
    found = arithmetic.factorwise(parts, WEIGHTS, mix, PATH)
  elif how == 'ties_svd':
    found = arithmetic.approximated(parts, WEIGHTS, mix, PATH, 2)
  else:
    found = arithmetic.concatenated(parts, WEIGHTS, PATH)
    found = found if how == 'cat' else arithmetic.truncated(found, 2)
  np.testing.assert_allclose(found.update, expected, atol=2e-5)


@pytest.mark.parametrize('density', [0.0, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_as_many_stay_as_asked_for_and_of_equals_the_first(density):
  x = np.array([[3.0, -3, 1], [3, 0, -1]])
  found = arithmetic.largest(x, density)
  order = sorted(range(6), key=lambda i: (-abs(x.flat[i]), i))[: int(density * 6)]
  expected = np.zeros(6)
  expected[order] = x.flat[order]
  np.testing.assert_array_equal(found.ravel(), expected)


def test_dare_keeps_the_mean_and_its_masks_follow_from_the_arguments():
  x = [draw(i, 4, 3) for i in range(2)]
  found = [Mix('dare_linear', 0.3, seed=s)(x, (1, 1), PATH) for s in range(3000)]
  deviation = np.sqrt((x[0] ** 2 + x[1] ** 2) * 0.7 / 0.3 / 3000)
  assert (np.abs(np.mean(found, 0) - x[0] - x[1]) < 5 * deviation).all()
  again = Mix('dare_linear', 0.3, seed=0)
  np.testing.assert_array_equal(again(x, (1, 1), PATH), found[0])
  same = draw(9, 50, 4)
  first, second = (again([same, same], w, PATH) != 0 for w in ((1, 0), (0, 1)))
  other = again([same, same], (1, 0), f'{PATH}x') != 0
  # Each run and each path has a mask of its own.
  assert len({m.tobytes() for m in (first, second, other)}) == 3


# Sums of these are exact in any order: rounding cannot elect another sign.
NUMBERS = st.integers(-256, 256).map(lambda i: i / 64)
RUNS = st.integers(2, 4).flatmap(
  lambda n: st.tuples(
    arrays.arrays(np.float32, st.tuples(st.just(n), st.integers(1, 6)), elements=NUMBERS),
    st.lists(st.floats(-2, 2), min_size=n, max_size=n),
    st.permutations(range(n)),
  )
)
FIXED = ('linear', 'ties', 'magnitude_prune')  # what does not draw masks


@given(RUNS, st.sampled_from(FIXED), st.sampled_from(arithmetic.MAJORITIES), st.floats(0.05, 1))
@settings(deadline=None)
def test_the_order_of_runs_does_not_matter(runs, how, majority, density):
  x, weights, order = runs
  mix = Mix(how, density, majority)
  turned = mix([x[i] for i in order], [weights[i] for i in order], PATH)
  np.testing.assert_allclose(turned, mix(list(x), weights, PATH), atol=1e-9)


@given(RUNS, NUMBERS)
@settings(deadline=None)
def test_all_weight_on_one_run_gives_it_back(runs, start):
  x, _, order = runs
  leaves = [{PATH: own} for own in x]
  only = [float(i == order[0]) for i in range(len(x))]
  for starts in {}, {PATH: np.full_like(x[0], start)}:
    found = arithmetic.around(leaves, starts, only, Mix())
    np.testing.assert_array_equal(found[PATH], x[order[0]])
    assert found[PATH].dtype == np.float32


def test_a_leaf_that_a_run_lacks_has_not_moved():
  start, x, y = (draw(i, 5) for i in range(3))
  found = arithmetic.around([{'p': x, 'q': x}, {'p': y}], {'p': start, 'q': start}, (2, 3), Mix())
  np.testing.assert_allclose(found['p'], start + 2 * (x - start) + 3 * (y - start), rtol=1e-5)
  np.testing.assert_allclose(found['q'], start + 2 * (x - start), rtol=1e-5)


def updates(count=3, ranks=(2, 3, 4)):
  return [
    Factors(draw(i, 8, r), draw(9 + i, r, 6), draw(20 + i, 6), 0.5 + i)
    for i, r in zip(range(count), ranks, strict=False)
  ]


WEIGHTS = (0.5, -1.5, 2.0)


def total(parts, weights):
  return sum(
    w * p.scale * (np.float64(p.a) @ np.float64(p.b)) for p, w in zip(parts, weights, strict=True)
  )


def test_cat_is_the_sum_of_the_updates():
  parts = updates()
  found = arithmetic.concatenated(parts, WEIGHTS, PATH)
  assert found.rank == 9 and found.scale == 1
  np.testing.assert_allclose(found.update, total(parts, WEIGHTS), atol=1e-12)
  bias = sum(w * p.scale * p.bias for p, w in zip(parts, WEIGHTS, strict=True))
  np.testing.assert_allclose(found.bias, bias, rtol=1e-6)


@pytest.mark.parametrize('rank', [1, 3, 6, 20])
def test_svd_is_as_near_as_a_rank_can_be(rank):
  """Eckart and Young: the error is what the discarded singular values weigh."""
  parts = updates()
  whole = total(parts, WEIGHTS)
  values = np.linalg.svd(whole, compute_uv=False)
  cat = arithmetic.concatenated(parts, WEIGHTS, PATH)
  by_factors = arithmetic.truncated(cat, rank)
  by_kernel = arithmetic.approximated(parts, WEIGHTS, Mix(), PATH, rank)
  for found in by_factors, by_kernel:
    assert found.rank == min(rank, 6)
    error = np.linalg.norm(whole - found.update)
    np.testing.assert_allclose(error, np.linalg.norm(values[rank:]), atol=1e-10)
    np.testing.assert_allclose(found.a.T @ found.a, np.eye(found.rank), atol=1e-10)
    np.testing.assert_allclose(found.bias, cat.bias)


def test_pruned_updates_are_pruned_before_they_are_approximated():
  parts, mix = updates(), Mix('ties', 0.3)
  found = arithmetic.approximated(parts, WEIGHTS, mix, PATH, 6)
  expected = by_loops('ties', [p.update for p in parts], WEIGHTS, 0.3, 'total', 0)
  np.testing.assert_allclose(found.update, expected, atol=1e-10)


@pytest.mark.parametrize('how', arithmetic.PLAIN)
def test_factors_are_mixed_as_in_peft(how):
  """Roots of weight x scale on both sides, the sign on a's; see LoraModel of PEFT."""
  parts, mix = updates(ranks=(3, 3, 3)), Mix(how, 0.6, seed=2)
  found = arithmetic.factorwise(parts, WEIGHTS, mix, 'site')
  whole = [w * p.scale for w, p in zip(WEIGHTS, parts, strict=True)]
  signed = [math.copysign(math.sqrt(abs(v)), v) for v in whole]
  roots = [math.sqrt(abs(v)) for v in whole]
  np.testing.assert_allclose(found.a, mix([p.a for p in parts], signed, 'site/a'))
  np.testing.assert_allclose(found.b, mix([p.b for p in parts], roots, 'site/b'))
  np.testing.assert_allclose(found.bias, mix([p.bias for p in parts], whole, 'site/bias'))
  assert np.abs(found.update - total(parts, WEIGHTS)).max() > 0.1, 'what crosses between the runs'


def test_with_one_a_linear_is_the_sum():
  parts = [p._replace(a=updates()[0].a, b=draw(i, 2, 6)) for i, p in enumerate(updates())]
  found = arithmetic.factorwise(parts, WEIGHTS, Mix(), 'site', same_a=True)
  np.testing.assert_array_equal(found.a, parts[0].a)
  np.testing.assert_allclose(found.update, total(parts, WEIGHTS), atol=1e-6)


def test_one_rank_for_all_changes_no_update():
  parts = dict(zip('xyz', updates(), strict=True))
  parts['y'] = parts['y']._replace(bias=None)
  found = arithmetic.alike({name: p._replace(scale=1.0) for name, p in parts.items()})
  for name, p in found.items():
    assert p.a.shape == (8, 4) and p.b.shape == (4, 6) and p.a.dtype == np.float32
    np.testing.assert_allclose(p.update, parts[name].update / parts[name].scale, rtol=1e-5)
  assert not found['y'].bias.any() and found['y'].bias.shape == (6,)


LABELS = (('no', 'maybe', 'yes'), ('yes', 'no', 'maybe'), ('no', 'never'))
X = draw(0, 11, 4)


def heads(dense=True):
  made = []
  for i, names in enumerate(LABELS):
    shapes = {'out/kernel': (4, len(names)), 'out/bias': (len(names),)}
    shapes |= {'dense/kernel': (4, 4), 'dense/bias': (4,)} if dense else {}
    made.append({f'params/head/{n}': draw(40 + i + len(n), *s) for n, s in shapes.items()})
  return made


def scores(head, names):
  """{label: logits} of a head over the features `X`."""
  x = X
  if 'params/head/dense/kernel' in head:
    x = np.tanh(x @ head['params/head/dense/kernel'] + head['params/head/dense/bias'])
  y = x @ head['params/head/out/kernel'] + head['params/head/out/bias']
  return dict(zip(names, y.T, strict=True))


def close(found, expected):
  assert found.keys() == expected.keys()
  for name, y in found.items():
    np.testing.assert_allclose(y, expected[name], atol=1e-5)


def test_keep_is_the_first_head():
  found, names = arithmetic.head('keep', heads(), LABELS, (0.1, 0.2, 0.7))
  assert names == LABELS[0]
  close(scores(found, names), scores(heads()[0], LABELS[0]))


@pytest.mark.parametrize('weights', [(0.25, 0.75), (1, 3)])
def test_average_goes_by_label(weights):
  """Without a hidden layer the mean head gives the mean of the logits, columns by name."""
  made = heads(dense=False)[:2]
  found, names = arithmetic.head('average', made, LABELS[:2], weights)
  assert names == LABELS[0]
  first, second = (scores(own, own_names) for own, own_names in zip(made, LABELS, strict=False))
  close(scores(found, names), {name: 0.25 * first[name] + 0.75 * second[name] for name in names})


def test_heads_of_a_number_are_averaged():
  leaves = [{p: x[..., :1] if '/out/' in p else x for p, x in own.items()} for own in heads()[:2]]
  found, names = arithmetic.head('average', leaves, ((), ()), (0.25, 0.75))
  assert names == () and found.keys() == leaves[0].keys()
  for path, x in found.items():
    expected = 0.25 * leaves[0][path] + 0.75 * leaves[1][path]
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def test_one_head_twice_in_another_order_is_that_head():
  one = heads()[0]
  turned = {p: x[..., [2, 0, 1]] if '/out/' in p else x for p, x in one.items()}
  found, names = arithmetic.head('average', [one, turned], LABELS[:2], (0.5, 0.5))
  close(scores(found, names), scores(one, LABELS[0]))


def test_union_has_a_column_for_each_label():
  weights, made = (0.2, 0.3, 0.5), heads(dense=False)
  found, names = arithmetic.head('union', made, LABELS, weights)
  assert names == ('no', 'maybe', 'yes', 'never')
  expected = {}
  for name in names:
    owners = [i for i in range(3) if name in LABELS[i]]
    share = sum(weights[i] for i in owners)
    expected[name] = sum(weights[i] / share * scores(made[i], LABELS[i])[name] for i in owners)
  close(scores(found, names), expected)
  found, _ = arithmetic.head('union', heads(), LABELS, weights)
  for leaf in 'kernel', 'bias':
    hidden = [own[f'params/head/dense/{leaf}'] for own in heads()]
    mean = sum(w * x for w, x in zip(weights, hidden, strict=True))
    np.testing.assert_allclose(found[f'params/head/dense/{leaf}'], mean, rtol=1e-5, atol=1e-6)


def test_a_label_of_a_run_without_weight_keeps_its_column():
  made = heads(dense=False)
  found, names = arithmetic.head('union', made, LABELS, (1, 0, 0))
  own = scores(made[2], LABELS[2])['never']
  close(scores(found, names), scores(made[0], LABELS[0]) | {'never': own})


def test_the_command_line_knows_the_same_names():
  (flags,) = ({f.name: f for f in v.flags} for n, v in main.VERBS.items() if n == 'combine')
  assert set(flags['how'].choices) == set(arithmetic.HOWS)
  assert flags['head'].choices == arithmetic.HEADS
  svd = {f'{how}_svd' for how in arithmetic.PLAIN} - {'linear_svd'}
  assert set(arithmetic.HOWS) == set(itertools.chain(arithmetic.PLAIN, ('cat', 'svd'), svd))
