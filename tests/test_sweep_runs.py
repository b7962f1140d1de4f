"""A sweep with real training on a tiny encoder, killed twice on its way."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from test_end_to_end import BERT, efft, reviews

from efft import files, pipeline
from efft.bench import record
from efft.sweep import study

STUDY = """
from efft.sweep import Run, chain, grid, product, seeds

LATENCY = [(1, 16, 'f32')]
SPLITS = ('validation', 'report')
POPULATIONS = {populations}
SMALL = grid({{
  'model.max_length': [24], 'train.batch_size': [8], 'train.steps': [6], 'train.eval_steps': [3],
  'train.checkpoint_every': [2], 'mesh.devices': [1],
}})

def runs():
  for arm in ('head', 'bitfit'):
    for overrides in product(SMALL, seeds(2)):
      yield Run(arm, f'configs/{{arm}}.py:task={data},model={bert},text=review,label=verdict',
                overrides)
  yield Run('wrong', 'configs/head.py:task={data},model={bert},text=review,label=stars')
"""


def write(file, folder, populations):
  data = reviews(folder / 'reviews.csv')
  file.write_text(STUDY.format(data=data, bert=BERT, populations=populations))


@pytest.fixture(scope='module')
def swept(tmp_path_factory):
  """(study file, folder, what the last of three sittings said)."""
  folder = tmp_path_factory.mktemp('sweep')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  file, out = folder / 'small.py', folder / 'out'
  write(file, folder, populations=False)
  arguments = 'sweep', f'--study={file}', f'--workdir={out}'

  def training(records):
    """Whether a run is in its steps, and so many are recorded."""
    path = out / 'records.jsonl'
    done = len(files.read_jsonl(path)) if path.exists() else 0
    return done >= records and any(path.stat().st_size for path in out.glob('runs/*/metrics.jsonl'))

  for records in (0, 1):
    process = subprocess.Popen(
      [sys.executable, '-m', 'efft', *arguments], stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not training(records):
      assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
      time.sleep(0.01)
    process.kill()
    process.communicate()
  return file, out, efft(*arguments, timeout=400)


def test_each_run_is_recorded_once(swept):
  file, out, done = swept
  asked = study.load(file)
  records = files.read_jsonl(out / 'records.jsonl')
  keys = sorted((r['arm'], r['config_hash']) for r in records)
  assert keys == sorted(run.key for run in asked.runs)
  assert list((out / 'runs').iterdir()) == []
  for found in records:
    assert (found['study'], found['run']) == ('small', '')
    if found['arm'] == 'wrong':
      assert found['status'] == 'failed' and "no column 'stars'" in found['error']
      continue
    assert found['status'] == 'ok' and set(found['metrics']) == {'validation', 'report'}
    assert found['overrides']['seed'] == found['seed'] and found['config']['task']['halves']
    assert [(r['batch'], r['length'], r['precision']) for r in found['latency']] == [(1, 16, 'f32')]


def test_the_failure_is_told(swept):
  _, out, done = swept
  assert done.returncode == 1 and '1 of 5 runs failed' in done.stderr, done.stderr
  lines = done.stdout.splitlines()
  for arm in ('head', 'bitfit'):
    values = [
      r['metrics']['report']['accuracy']
      for r in files.read_jsonl(out / 'records.jsonl')
      if r['arm'] == arm
    ]
    (line,) = [line for line in lines if f' {arm} ' in line]
    cells = ['reviews.csv', arm, '2', '0', f'{np.mean(values):.4f}', 'accuracy,', 'report']
    assert line.split() == cells
  assert any(line.startswith('wrong: failed: ') and 'stars' in line for line in lines)


def test_a_killed_sweep_ends_where_training_by_hand_does(swept, tmp_path):
  file, out, _ = swept
  first = study.load(file).runs[0]  # the one that was killed in its steps
  pipeline.train(first.config, tmp_path / 'run')
  expected = record.measure(tmp_path / 'run', splits=('validation', 'report'))
  (found,) = [
    r for r in files.read_jsonl(out / 'records.jsonl') if (r['arm'], r['config_hash']) == first.key
  ]
  for split, scores in expected['metrics'].items():
    assert found['metrics'][split] == pytest.approx(scores, rel=1e-6)
  assert found['data'] == expected['data'] and found['model'] == expected['model']


def test_runs_that_differ_in_numbers_train_together(swept):
  """What is recorded of them is what was recorded of the same runs one by one."""
  file, out, _ = swept
  apart = {(r['arm'], r['seed']): r for r in files.read_jsonl(out / 'records.jsonl')}
  write(file, file.parent, populations=True)
  done = efft('sweep', f'--study={file}', f'--workdir={out.parent / "together"}', timeout=400)
  records = files.read_jsonl(out.parent / 'together' / 'records.jsonl')
  assert done.returncode == 1 and len(records) == len(apart) == 5, done.stderr
  for found in records:
    expected = apart[found['arm'], found['seed']]
    for same in ('config_hash', 'data', 'model', 'status', 'error', 'parameters', 'flops'):
      assert found.get(same) == expected.get(same), same
    if found['status'] == 'failed':
      continue
    assert found['train']['population'] == 2 and 'population' not in expected['train']
    assert found['train']['steps'] == expected['train']['steps']
    assert found['memory_mb']['peak'] is None and found['train']['examples_per_second'] > 0
    for split, scores in expected['metrics'].items():
      assert found['metrics'][split] == pytest.approx(scores, rel=1e-4)
