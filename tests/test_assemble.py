"""What a run starts from, before its first step."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from efft import assemble, config, finetune, starting, tree
from efft.errors import InputError
from efft.models import hub

BERT = Path(__file__).parent / 'fixtures' / 'bert'
STARS = 1.0, 2.5, 4.0, 4.5


@pytest.fixture
def stars(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFT_CACHE', str(tmp_path / 'cache'))
  file = tmp_path / 'stars.csv'
  rows = [[f'text {i}', STARS[i % 4] if i else 3.75] for i in range(40)]
  with open(file, 'w', newline='') as sheet:
    csv.writer(sheet).writerows([['text', 'label'], *rows])
  return file


def job(file, kind, **model):
  given = config.default(f'task={file},kind={kind},model={BERT}')
  given.model.update(model)
  return assemble.prepare(given)


def test_a_head_for_numbers_starts_at_their_mean(stars):
  found = job(stars, 'regression')
  flat = tree.flatten(found.variables)
  labels = found.data.splits['train'].labels
  # By hand: it is the constant with the least squared error.
  grid = np.linspace(0, 5, 5001)
  least = grid[np.argmin([np.mean((labels - x) ** 2) for x in grid])]
  assert flat['params/head/out/bias'].shape == (1,)
  assert abs(float(flat['params/head/out/bias'][0]) - least) < 1e-3
  others = [x for path, x in flat.items() if path.startswith('params/head/') and 'bias' in path]
  assert sum(np.count_nonzero(x) for x in others) == 1


def test_steps_before_the_run_have_its_average_too(stars, tmp_path):
  given = config.load(f'configs/lt_sft.py:task={stars},kind=regression,model={BERT}')
  given.model.max_length, given.optim.ema, given.mesh.devices = 8, 0.9, 1
  given.train.steps, given.train.batch_size = 4, 4
  assert finetune.train(given, tmp_path / 'run')['steps'] == 4


@pytest.mark.parametrize('name', ['sparse_adapter', 'adalora', 'movement'])
def test_no_average_keeps_what_is_taken_away(name, tmp_path):
  given = config.load(f'configs/{name}.py:task=x.csv,model={BERT}')
  assemble.check_end(config.resolve(given))
  given.optim.ema = 0.99
  with pytest.raises(InputError, match='optim.ema.*takes numbers away'):
    assemble.prepare(given)


def test_a_kept_head_has_its_classes_in_the_order_of_the_task(tmp_path):
  model = tmp_path / 'bert'
  shutil.copytree(BERT, model)
  about = json.loads((model / 'config.json').read_text())
  about['id2label'] = {'0': 'Contradiction', '1': 'neutral', '2': 'entailment'}
  (model / 'config.json').write_text(json.dumps(about))
  own = hub.load(str(model), num_labels=3, head='keep', key=jax.random.key(0)).params['head']['out']
  labels = ('entailment', 'neutral', 'contradiction')
  options = {'num_labels': 3, 'head': 'keep', 'key': jax.random.key(0)}
  base = starting.start(str(model), labels=labels, **options).base
  out = base.params['head']['out']
  for leaf in ('kernel', 'bias'):
    for i, name in enumerate(('contradiction', 'neutral', 'entailment')):
      np.testing.assert_array_equal(out[leaf][..., labels.index(name)], own[leaf][..., i])
  base = starting.start(str(model), labels=('a', 'b', 'c'), **options).base
  np.testing.assert_array_equal(base.params['head']['out']['kernel'], own['kernel'])


def test_a_head_for_classes_starts_at_zero(stars):
  flat = tree.flatten(job(stars, 'single').variables)
  assert not np.any(flat['params/head/out/bias'])


@pytest.mark.parametrize('fields', [{'save': 'best'}, {'patience': 2}], ids=['save', 'patience'])
def test_a_schedule_has_to_come_to_its_end(stars, fields):
  given = config.load(f'configs/movement.py:task={stars},kind=single,model={BERT}')
  given.train.update(fields)
  with pytest.raises(InputError, match=f'config.train.{[*fields][0]}.*group schedule'):
    assemble.prepare(given)
