"""ZipLM on a tiny encoder with a made-up latency table."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny

from efft import assemble, cpu, tree
from efft.compress import allocate, base, latency, obs, prune, slicing, ziplm
from efft.compress.latency import Table
from efft.errors import InputError
from efft.training import losses

TABLE = Table(
  {n: 1.0 + n for n in range(5)},
  {n: 1.0 + n / 8 for n in (48, 40, 31, 22, 13, 6, 3, 0)},
  2.0, 8, 12, 'cpu', 'float32', tiny.CFG.hidden, tiny.CFG.head_dim,
)  # fmt: skip
PRUNED = dataclasses.replace(tiny.CFG, heads=(0, 3), mlp=(40, 0))


@functools.cache
def network(cfg):
  return assemble.network(cfg, {}, 'float32')


def subject(cfg=tiny.CFG, seed=5):
  net = network(cfg)
  batches = [tiny.batch(seed=i, cfg=cfg) for i in range(3)]
  batches[2]['weights'][5:] = 0
  return base.Subject(net, {'params': tiny.params(cfg)}, losses.single(), batches, seed)


def smaller(cfg, keep):
  """The config of what stays."""
  heads, mlp = tuple(map(len, keep.heads)), tuple(map(len, keep.units))
  return dataclasses.replace(cfg, heads=heads, mlp=mlp)


def gates(cfg, keep):
  """1 for what stays, 0 for what goes."""

  def of(sizes, kept):
    pairs = zip(sizes, kept, strict=True)
    return tuple(np.isin(np.arange(n), k).astype(np.float32) for n, k in pairs)

  return {'heads': of(cfg.heads, keep.heads), 'units': of(cfg.mlp, keep.units)}


@functools.cache
def logits(cfg):
  """(variables, batch, gates) -> [B, C], compiled once for each encoder."""
  here = base.Subject(network(cfg), {}, None, [])
  return jax.jit(lambda variables, batch, g: here.logits(variables, batch, base.gated(g)))


def mean_loss(here, variables):
  """Over all examples of weight 1, batch by batch."""
  values = []
  for batch in here.batches:
    scores = logits(here.cfg)(variables, batch, base.ones(here.cfg))
    loss = here.loss(scores, batch['labels'])
    values += np.asarray(loss, np.float64)[batch['weights'] > 0].tolist()
  return np.mean(values)


@pytest.fixture(scope='module', params=[tiny.CFG, PRUNED], ids=['dense', 'pruned'])
def case(request):
  here = subject(request.param)
  return here, ziplm.family(here, [1.2, 1.6], TABLE, evaluations=25)


def test_targets_are_met(case):
  here, found = case
  for speedup, (keep, _) in found.items():
    seconds = TABLE.predict(smaller(here.cfg, keep))
    assert TABLE.predict(here.cfg) / seconds >= speedup
    for kept, sizes in ((keep.heads, here.cfg.heads), (keep.units, here.cfg.mlp)):
      for k, n in zip(kept, sizes, strict=True):
        assert sorted(set(k)) == list(k) and set(k) <= set(range(n))


def test_what_goes_is_not_read_any_more(case):
  """So that slicing is exact: gates that are 0 for it change nothing."""
  here, found = case
  batch, run, ones = here.batches[0], logits(here.cfg), base.ones(here.cfg)
  for keep, variables in found.values():
    plain = run(variables, batch, ones)
    gated = run(variables, batch, ones._replace(**gates(here.cfg, keep)))
    np.testing.assert_array_equal(plain, gated)
    assert np.abs(np.asarray(plain - run(here.variables, batch, ones))).max() > 1e-3


def test_only_kernels_that_lose_rows_change_and_rows_that_stay_are_least_squares(case):
  here, found = case
  before = tree.flatten(here.variables['params'])
  hessians = obs.hessians(here)
  for keep, variables in found.values():
    after = tree.flatten(variables['params'])
    kept = {f'layer_{i}/attention/out/kernel': k for i, k in enumerate(keep.heads)}
    kept |= {f'layer_{i}/mlp/down/kernel': k for i, k in enumerate(keep.units)}
    for path, x in before.items():
      place = path.removesuffix('/kernel')
      if place not in hessians:
        assert after[path] is x
        continue
      size = here.cfg.head_dim if 'attention' in path else 1
      rows = np.repeat(np.isin(np.arange(len(x) // size), kept[path]), size)
      assert not np.asarray(after[path])[~rows].any()
      # Least squares by its normal equations, damped towards the weights as they were.
      h = hessians[place] + 0.01 * np.mean(np.diag(hessians[place])) * np.eye(len(x))
      expected = np.linalg.solve(h[rows][:, rows], h[rows] @ np.asarray(x, np.float64))
      np.testing.assert_allclose(np.asarray(after[path])[rows], expected, rtol=1e-3, atol=1e-4)


def test_search_scores_the_loss_of_what_it_returns():
  here = subject()
  found = ziplm.database(here, TABLE)
  budget = allocate.budget(1.6, TABLE.predict(here.cfg), found.fixed, found.seconds)
  score = ziplm.scorer(here, found)
  seen = {}

  def scored(options):
    seen[options] = score(options)
    return seen[options]

  best = allocate.search(found.seconds, found.priors, budget, scored, evaluations=25, seed=5)
  keep, variables = ziplm.ziplm(here, 1.6, TABLE, evaluations=25)
  assert keep == ziplm.keep(here.cfg, found, best.options)
  assert best.loss == pytest.approx(mean_loss(here, variables), rel=1e-5) == min(seen.values())
  # Scores do not depend on what was scored before.
  for options, loss in seen.items():
    assert score(options) == pytest.approx(loss, rel=1e-6)
  plain = allocate.choose(found.seconds, found.priors, budget)
  assert len(seen) > 1 and best.loss <= seen[plain]
  equal = jax.tree.map(np.array_equal, variables, ziplm.stitch(here.variables, found, best.options))
  assert all(jax.tree.leaves(equal))


def test_nothing_goes_where_nothing_has_to():
  """Gradual pruning: speed-ups are relative to the encoder before any."""
  here = subject(PRUNED)
  dense = TABLE.predict(tiny.CFG)
  reached = dense / TABLE.predict(PRUNED)
  assert reached > 1.2
  for keep, variables in (
    ziplm.ziplm(here, 1.2, TABLE, dense=dense, evaluations=3),
    ziplm.ziplm(here, 1.0, TABLE, evaluations=3),
  ):
    assert smaller(PRUNED, keep) == PRUNED
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, variables, here.variables)))
  keep, _ = ziplm.ziplm(here, 1.3 * reached, TABLE, dense=dense, evaluations=3)
  assert 1.3 * reached <= dense / TABLE.predict(smaller(PRUNED, keep)) < 1.6 * reached


def test_widths_are_the_table_s_and_the_block_s_own():
  cfg = dataclasses.replace(tiny.SHORT, heads=(3,), mlp=(37,))
  attention, mlp = ziplm.database(subject(cfg), TABLE).modules
  assert [len(level.kept) for level in attention.levels] == [3, 2, 1, 0]
  assert [len(level.kept) for level in mlp.levels] == [37, 31, 22, 13, 6, 3, 0]
  assert mlp.seconds[:2] == (1 + 37 / 8, 1 + 31 / 8)
  for module in (attention, mlp):
    errors = [level.error for level in module.levels]
    assert errors == sorted(errors) and errors[0] == 0 and errors[-1] == pytest.approx(1)


def test_what_cannot_be_is_refused_before_anything_is_computed(monkeypatch):
  here = subject()
  monkeypatch.setattr(obs, 'hessians', lambda subject: pytest.fail('computed'))
  largest = TABLE.predict(tiny.CFG) / (TABLE.rest + 4)
  with pytest.raises(InputError, match=rf'at most {int(largest * 1000) / 1000:g}'):
    ziplm.ziplm(here, 30.0, TABLE)
  with pytest.raises(InputError, match='hidden 64'):
    ziplm.ziplm(here, 2.0, TABLE._replace(hidden=64))
  resolved = tiny.settings('lora')
  lora = dataclasses.replace(here, net=assemble.network(tiny.CFG, resolved['method'], 'float32'))
  with pytest.raises(ValueError, match='merge first'):
    ziplm.ziplm(lora, 2.0, TABLE)


def test_fastest_encoder_has_no_blocks_left():
  """And slicing it, which is then nothing but biases and norms, changes nothing."""
  here = subject(tiny.SHORT)
  dense = TABLE.predict(tiny.SHORT)
  keep, variables = ziplm.ziplm(here, dense / (TABLE.rest + 2), TABLE, evaluations=2)
  assert keep == base.Keep(heads=((),), units=((),))
  cfg, cut = slicing.cut(here.cfg, variables, keep)
  assert cfg == smaller(here.cfg, keep)
  batch = here.batches[0]
  expected = logits(cfg)(cut, batch, base.ones(cfg))
  found = logits(here.cfg)(variables, batch, base.ones(here.cfg))
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture
def measured(tmp_path, monkeypatch):
  """Configs that a made-up measurement was asked for; the wider, the slower."""
  seen = []

  def measure(cfg, batch, length, dtype):
    seen.append(cfg)
    made = {
      block: {n: s * cfg.hidden / tiny.CFG.hidden for n, s in getattr(TABLE, block).items()}
      for block in latency.BLOCKS
    }
    return TABLE._replace(**made, hidden=cfg.hidden, head_dim=cfg.head_dim)

  monkeypatch.setenv('EFFT_CACHE', str(tmp_path))
  monkeypatch.setattr(latency, 'measure', measure)
  return seen


def test_an_encoder_with_fewer_dimensions_has_a_table_of_its_own(measured):
  """Of the dense one is the time that speed-ups are relative to."""
  narrow = dataclasses.replace(tiny.CFG, hidden=24, embed_dim=24)
  here = dataclasses.replace(subject(narrow), dense=tiny.CFG)
  stage = prune.ziplm(speedup=2.0, batch=8, length=12, evaluations=3)
  found = smaller(narrow, stage.act(here).keep)
  own = latency.measure(narrow, 8, 12, 'float32')
  assert measured[:2] == [tiny.CFG, narrow]
  assert 2.0 <= TABLE.predict(tiny.CFG) / own.predict(found) < 2.6
  assert found.heads != narrow.heads or found.mlp != narrow.mlp


def test_a_table_is_measured_once_for_each_shape_and_processor(measured, monkeypatch):
  def table(**fields):
    latency.known(dataclasses.replace(tiny.CFG, **fields), 8, 12, 'float32')
    return len(measured)

  assert [table(), table()] == [1, 1]
  assert [table(activation='relu'), table(architecture='roberta'), table(hidden=24)] == [2, 3, 4]
  monkeypatch.setattr(cpu, 'name', lambda: 'another')
  assert [table(), table()] == [5, 5]
  monkeypatch.setattr(cpu, 'cores', lambda: 77)
  assert [table(), table()] == [6, 6]
