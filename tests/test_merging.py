"""Runs merged into whole models: what is proved, what is refused, what is left behind."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from moved import FIXTURES, trained

from efft import bundle, merging, starting, tree
from efft.classifier import Classifier
from efft.errors import InputError
from efft.models.encoder import Encoder, EncoderConfig
from efft.peft import base as peft

TEXTS = ['a gorgeous, witty movie', 'a waste of time', 'boring', 'the plot was bad, i loved it']


@pytest.mark.parametrize('architecture', ['bert', 'roberta', 'distilbert'])
@pytest.mark.parametrize('method', ['lora', 'ia3'])
def test_a_merged_run_stands_alone_and_says_the_same(architecture, method, tmp_path):
  run = trained(tmp_path / 'run', method, 1, architecture=architecture)
  done = merging.merge(run, tmp_path / 'merged')
  content = bundle.load(tmp_path / 'merged')
  assert content.method == {} and not content.needs_base
  assert all(path.startswith('params/') for path in content.leaves)
  # Beside neither deltas nor the classes that made the proof.
  cfg = EncoderConfig.from_dict(content.encoder)
  model = Classifier.load(run)
  rows = np.random.default_rng(0).integers(1, cfg.vocab_size, (4, 9)).astype(np.int32)
  args = rows, rows > 0, np.zeros_like(rows)
  before = model.apply(
    model.variables, dict(zip(('input_ids', 'mask', 'token_types'), args, strict=True))
  )
  plain = jax.jit(Encoder(cfg).apply)
  after = plain({'params': tree.unflatten(content.leaves)['params']}, *args)
  np.testing.assert_allclose(after, before, rtol=0, atol=2e-5)
  untrained = starting.base(bundle.load(run)).params
  assert np.abs(plain({'params': untrained}, *args) - before).max() > 1e-2
  said = done['merged']
  assert said['on'] == 'made-up texts' and said['difference'] < 1e-4 and said['flips'] == 0


def test_the_proof_measures_what_differs(tmp_path):
  run = trained(tmp_path / 'run', 'lora', 1)
  content = bundle.load(run)
  whole = merging.merged(content)
  path = 'params/head/out/bias'
  moved = {**whole.leaves, path: whole.leaves[path] + np.float32([0.5, 0, 0])}
  said = merging.proof(tmp_path / 'run', content, dataclasses.replace(whole, leaves=moved), '-')
  assert said['difference'] == pytest.approx(0.5, abs=1e-4)
  before = Classifier.of(content, 'run').logits(merging.made_up(content)[0])
  after = before + np.float32([0.5, 0, 0])
  assert said['flips'] == np.sum(before.argmax(-1) != after.argmax(-1)) > 0
  with pytest.raises(InputError, match='differ by up to 0.5, and .* predictions of 256'):
    merging.check(said, 1e-3)


@pytest.mark.parametrize('labels', [1, 3, 60, 1100])
def test_flips_are_examples_of_which_some_label_differs(labels):
  draw = np.random.default_rng(0)
  old = draw.normal(size=(40, labels))
  new = 2 * old
  for row in range(0, 40, 3):
    new[row, draw.integers(labels, size=2)] *= -1
  new[1, -1] *= -1
  pairs = [list(zip(*rows, strict=True)) for rows in zip(old, new, strict=True)]
  by_hand = sum(any((a > 0) != (b > 0) for a, b in pair) for pair in pairs)
  assert merging.flips(old, new, 'multi') == by_hand >= 2
  largest = [[max(range(labels), key=row.__getitem__) for row in x] for x in (old, new)]
  by_hand = sum(a != b for a, b in zip(*largest, strict=True))
  assert merging.flips(old, new, 'single') == by_hand
  assert merging.flips(old, new, 'regression') == 0


def test_what_does_not_merge_is_refused_and_nothing_is_written(tmp_path):
  run = trained(tmp_path / 'run', 'pfeiffer', 1)
  with pytest.raises(InputError, match='pfeiffer, which cannot be folded into the weights'):
    merging.merge(run, tmp_path / 'merged')
  run = trained(tmp_path / 'lora', 'lora', 1)
  with pytest.raises(InputError, match='--tolerance: found logits that differ'):
    merging.merge(run, tmp_path / 'merged', tolerance=0.0)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['lora', 'run']
  with pytest.raises(InputError, match='which exists'):
    merging.merge(run, tmp_path / 'run')


def test_a_merged_run_keeps_its_task_and_trains_whole(tmp_path):
  rows = ''.join(f'{text},{("no", "maybe", "yes")[i % 3]}\n' for i, text in enumerate('abcdefghi'))
  (tmp_path / 'data.csv').write_text('text,label\n' + rows)
  run = tmp_path / 'run'
  trained(run, 'lora', 1)
  from efft import config

  task = config.load(f'configs/lora.py:task={tmp_path / "data.csv"},model={FIXTURES / "bert"}')
  task.task.labels = ('no', 'maybe', 'yes')
  (run / 'config.json').write_text(json.dumps(config.resolve(task)))
  done = merging.merge(run, tmp_path / 'merged')
  assert done['merged']['on'] == 'validation' and 'accuracy' in done['metrics']
  left = config.resolve(config.load(str(tmp_path / 'merged' / 'config.json')))
  assert left['method'] == {} and left['optim']['lr'] == 5e-5
  assert left['task'] == config.resolve(task)['task']
  assert peft.build(left['method']) == {}
