"""Every config that comes with efft resolves, and builds the model it speaks of."""

import ast
import dataclasses
import functools
import importlib
from pathlib import Path

import jax
import pytest

from efft import assemble, catalogue, config, functions
from efft.models.encoder import init_params
from efft.peft import base, transform

FILES = sorted((Path(config.__file__).parents[1] / 'configs').glob('*.py'))


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_resolves(file):
  resolved = config.resolve(config.load(f'{file}:task=rotten_tomatoes'))
  assert resolved['task']['name'] == 'rotten_tomatoes'
  for stage in resolved['stages'].values():
    config.tuned(resolved, {} if 'fn' in stage else stage)
  groups = [group for _, group in resolved['rules']]
  assert groups[0] == 'head', 'first, so that no other rule takes a bias or norm of the head'
  assert ('delta' in groups) == bool(resolved['method'])


# What closes masks, gates or ranks as the run goes on.
CLOSING = {
  'movement.movement', 'movement.soft', 'movement.block', 'gates.l0', 'gates.l0_weights',
  'gates.cofi', 'lora.adalora', 'diff.diff',
}  # fmt: skip
SCHEDULES = {'movement.schedule', 'budget.adalora', 'diff.fixed'}


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_its_command_fits_the_model_that_it_names(file):
  """What the docstring says to run is run with the default encoder: six layers of 384."""
  resolved = config.resolve(config.load(f'{file}:task=sst2'))
  assert resolved['model']['name'] == 'all-MiniLM-L6-v2'
  cfg = dataclasses.replace(
    catalogue.BERT_BASE, hidden=384, embed_dim=384, heads=(12,) * 6, head_dim=32, mlp=(1536,) * 6,
  )  # fmt: skip
  key = jax.random.key(0)
  params = jax.eval_shape(lambda key: init_params(cfg, key), key)
  methods = [resolved['method'], *(s.get('method', {}) for s in resolved['stages'].values())]
  for method in filter(None, methods):
    net = assemble.network(cfg, method, 'float32')
    init = functools.partial(base.init, net.model, net.deltas)
    assert jax.tree.leaves(jax.eval_shape(init, params, key))


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_what_closes_as_it_trains_is_handed_on_at_its_end(file):
  resolved = config.resolve(config.load(f'{file}:task=sst2'))
  parts = [stage for stage in resolved['stages'].values() if 'fn' not in stage] or [{}]
  for one in (config.tuned(resolved, part) for part in parts):
    changes = [fields.get('transform', {}) for fields in one['optim']['groups'].values()]
    scheduled = [change['fn'] for change in changes if change.get('fn') in SCHEDULES]
    built = transform.build(one['optim']).values()
    assert len(scheduled) == sum(change.scheduled for change in built)
    if scheduled or CLOSING & {spec['fn'] for spec in one['method'].values()}:
      assert (one['train']['save'], one['train']['patience']) == ('last', None)


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_is_short_and_documented(file):
  text = file.read_text(encoding='utf-8')
  assert 10 <= len(text.splitlines()) <= 25
  doc = ast.get_docstring(ast.parse(text))
  assert len(doc.splitlines()[0]) <= 88, '`efft methods` shows it beside the name'
  assert f'efft train --config=configs/{file.name}:task=' in doc


@pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)
def test_options_are_those_of_the_function(file):
  """What `signature` reads from the source is what Python sees, and the function takes it."""
  import inspect

  for spec in config.resolve(config.load(f'{file}:task=sst2'))['method'].values():
    module, _, name = spec['fn'].partition('.')
    fn = getattr(importlib.import_module(f'efft.peft.{module}'), name)
    seen = {
      p.name: functions.REQUIRED if p.default is p.empty else p.default
      for p in inspect.signature(fn).parameters.values()
    }
    assert functions.signature(spec['fn']) == seen
    fn(**{key: value for key, value in spec.items() if key != 'fn'})
