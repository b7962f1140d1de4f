"""The real command line on a tiny encoder: train, evaluate, predict, kill, resume, refuse."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from efft import config, files, finetune, main, run
from efft.classifier import Classifier, chunks
from efft.errors import InputError

BERT = Path(__file__).parent / 'fixtures' / 'bert'
GOOD, BAD = ('a gorgeous witty movie', 'a wonderful cast'), ('a waste of time', 'boring and long')
# Two devices, so that batches are cut; few enough to compile quickly.
SMALL = (
  '--config.model.max_length=24',
  '--config.train.batch_size=8',
  '--config.mesh.devices=2',
  '--config.optim.lr=1e-2',
)


def write_csv(path: Path, header, rows) -> Path:
  with open(path, 'w', newline='', encoding='utf-8') as file:
    csv.writer(file).writerows([header, *rows])
  return path


def reviews(path: Path, n: int = 96) -> Path:
  draw = random.Random(0)
  rows = []
  for i in range(n):
    liked = i % 2 == 0
    rows.append([f'{draw.choice(GOOD if liked else BAD)} {i}', 'liked' if liked else 'hated'])
  return write_csv(path, ['review', 'verdict'], rows)


def command(data, workdir, *extra) -> list[str]:
  arg = f'configs/lora.py:task={data},model={BERT},text=review,label=verdict'
  return ['train', f'--config={arg}', f'--workdir={workdir}', *SMALL, *extra]


def efft(*args, **options):
  return subprocess.run(
    [sys.executable, '-m', 'efft', *map(str, args)], capture_output=True, text=True, **options
  )


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('data')
  os.environ['EFFT_CACHE'] = str(folder / 'cache')
  return reviews(folder / 'reviews.csv')


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
  """A run folder made by the command line in a process of its own."""
  workdir = tmp_path_factory.mktemp('runs') / 'lora'
  done = efft(*command(data, workdir, '--config.train.epochs=4'))
  assert done.returncode == 0, done.stderr
  return workdir


def refuse(capsys, *args) -> str:
  """Runs a command that must be refused cleanly; gives its one line."""
  assert main.main([*map(str, args)]) == 2
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if line.startswith('efft: error:')]
  assert out == '' and len(lines) == 1 and 'Traceback' not in err, err
  return lines[0]


def test_run_folder_holds_what_the_readme_says(trained):
  names = {path.name for path in trained.iterdir()}
  assert names >= {
    'config.json', 'environment.json', 'data.json', 'base.json', 'metrics.jsonl', 'train.log',
    'checkpoints', 'results.json', 'README.md', 'bundle',
  }  # fmt: skip
  results = files.read_json(trained / 'results.json')
  records = files.read_jsonl(trained / 'metrics.jsonl')
  steps = [r['step'] for r in records if r['event'] == 'train']
  assert steps == list(range(1, results['steps'] + 1))
  evaluations = [r for r in records if r['event'] == 'eval']
  best = max(evaluations, key=lambda r: r['accuracy'])
  assert results['metrics']['accuracy'] == best['accuracy'] >= 0.9
  assert results['trainable'] == 2 * 2 * 8 * (32 + 32) + 2 * 33  # 2 layers, q and v; head
  assert 'trainable params: 2,114' in (trained / 'train.log').read_text()
  assert '| 0 | hated |' in (trained / 'README.md').read_text()


def test_evaluate_gives_what_training_reported(trained, capsys):
  scores = run.evaluate(trained)
  reported = files.read_json(trained / 'results.json')['metrics']
  assert scores['accuracy'] == reported['accuracy']
  np.testing.assert_allclose(scores['loss'], reported['loss'], rtol=1e-5)
  assert main.main(['evaluate', f'--run={trained}', '--split=test']) == 0
  assert 'accuracy' in capsys.readouterr().out


def test_predict_by_file_by_pipe_and_by_function_agree(trained, tmp_path):
  texts = [*GOOD, *BAD, '']
  write_csv(tmp_path / 'new.csv', ['review'], [[t] for t in texts[:-1]])
  output = tmp_path / 'out.jsonl'
  done = efft('predict', f'--run={trained}', f'--input={tmp_path}/new.csv', f'--output={output}')
  assert done.returncode == 0 and done.stdout == '', done.stderr
  by_file = [json.loads(line) for line in output.read_text().splitlines()]
  piped = efft('predict', f'--run={trained}', input='\n'.join(texts[:-1]) + '\n')
  assert [json.loads(line) for line in piped.stdout.splitlines()] == by_file
  records = list(run.predict(trained, texts))
  for a, b in zip(records[:-1], by_file, strict=True):
    assert a['label'] == b['label']
    np.testing.assert_allclose(list(a['scores'].values()), list(b['scores'].values()), atol=2e-6)
  assert [r['label'] for r in by_file] == ['liked', 'liked', 'hated', 'hated']
  assert set(records[-1]['scores']) == {'liked', 'hated'}
  np.testing.assert_allclose(sum(records[-1]['scores'].values()), 1, atol=1e-5)


def test_a_run_starts_where_another_ended(trained, data, tmp_path, capsys):
  arg = f'task={data},model={BERT},text=review,label=verdict,init_from={trained}'
  still = [*SMALL[:-1], '--config.optim.lr=1e-30', '--config.train.steps=1']
  arguments = [f'--config=configs/lora.py:{arg}', f'--workdir={tmp_path}/next', *still]
  assert main.main(['train', *arguments, '--config.model.head=keep']) == 0
  for a, b in zip(
    run.predict(trained, [*GOOD, *BAD]), run.predict(tmp_path / 'next', [*GOOD, *BAD]), strict=True
  ):
    assert a['label'] == b['label']
    np.testing.assert_allclose(list(a['scores'].values()), list(b['scores'].values()), atol=2e-6)
  capsys.readouterr()
  arguments[0] = arguments[0].replace('lora.py', 'ia3.py')
  line = refuse(capsys, 'train', *arguments[:1], f'--workdir={tmp_path}/other', *still)
  assert 'has no place here' in line and 'use its method (lora)' in line
  assert not (tmp_path / 'other').exists()


def test_same_command_again_trains_nothing(trained, data):
  before = (trained / 'metrics.jsonl').read_bytes()
  results = run.train(files.read_json(trained / 'config.json'), trained)
  assert results == files.read_json(trained / 'results.json')
  assert (trained / 'metrics.jsonl').read_bytes() == before


def _records(workdir):
  """The records without what a clock wrote."""
  return [
    {k: v for k, v in r.items() if k != 'time'} for r in files.read_jsonl(workdir / 'metrics.jsonl')
  ]


def test_killed_runs_end_in_the_same_bits(data, tmp_path):
  """SIGKILL once, SIGTERM once, then to the end: weights and records of an uninterrupted run."""
  many = (
    '--config.train.steps=150', '--config.train.eval_steps=50', '--config.train.log_every=5',
    '--config.train.checkpoint_every=10', '--config.optim.ema=0.9', '--config.train.accumulate=2',
  )  # fmt: skip
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  done = efft(*command(data, whole, *many))
  assert done.returncode == 0, done.stderr

  def interrupt(how, after):
    process = subprocess.Popen(
      [sys.executable, '-m', 'efft', *command(data, broken, *many)],
      stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log, deadline = broken / 'metrics.jsonl', time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
      if log.exists() and log.read_bytes().count(b'\n') >= after:
        process.send_signal(how)
        break
      time.sleep(0.005)
    stderr = process.communicate(timeout=120)[1]
    return process.returncode, stderr

  assert interrupt(signal.SIGKILL, 25)[0] == -signal.SIGKILL
  code, stderr = interrupt(signal.SIGTERM, 70)
  assert code == 75 and 'run the same command again' in stderr, stderr
  assert not (broken / 'bundle').exists()
  done = efft(*command(data, broken, *many, '--resume=must'))
  assert done.returncode == 0 and 'resuming from step' in done.stderr, done.stderr
  name = Path('bundle') / 'weights.safetensors'
  assert (whole / name).read_bytes() == (broken / name).read_bytes()
  assert _records(whole) == _records(broken)


def test_other_kinds_of_problem(tmp_path, data):
  """Pairs with numbers; several labels at once; each trained, scored and predicted."""
  draw = random.Random(1)
  pairs = [
    [f'{draw.choice(GOOD)} {i}', draw.choice(BAD), f'{draw.random() * 5:.2f}'] for i in range(40)
  ]
  several = [[f'{draw.choice(GOOD)} {i}', i % 2, int(i % 3 == 0)] for i in range(40)]
  first = write_csv(tmp_path / 'pairs.csv', ['left', 'right', 'score'], pairs)
  second = write_csv(tmp_path / 'several.csv', ['text', 'funny', 'long'], several)
  common = f'model={BERT}'
  for arg, texts, check in (
    (f'task={first},text=left,pair=right,label=score', [('a', 'b')], 'score'),
    (f'task={second},text=text,label=funny+long', ['a'], 'labels'),
  ):
    cfg = config.load(f'configs/bitfit.py:{arg},{common}')
    cfg.train.steps, cfg.model.max_length, cfg.mesh.devices = 2, 24, 1
    workdir = tmp_path / f'run-{check}'
    results = run.train(cfg, workdir)
    assert np.isfinite(results['metrics']['loss'])
    np.testing.assert_allclose(run.evaluate(workdir)['loss'], results['metrics']['loss'], rtol=1e-5)
    (record,) = run.predict(workdir, texts)
    assert check in record
    with pytest.raises(InputError, match='text 1.*--input' if 'pair' in arg else 'text 1'):
      list(run.predict(workdir, [3]))


def test_full_fine_tuning_stands_alone_and_lora_needs_its_base(tmp_path, data, capsys):
  base = tmp_path / 'base'
  shutil.copytree(BERT, base)
  for name in ('full', 'lora'):
    cfg = config.load(f'configs/{name}.py:task={data},model={base},text=review,label=verdict')
    cfg.train.steps, cfg.model.max_length, cfg.mesh.devices = 2, 24, 1
    run.train(cfg, tmp_path / name)
  before = {name: list(run.predict(tmp_path / name, GOOD)) for name in ('full', 'lora')}
  # Another weight, the same shapes.
  weights = base / 'model.safetensors'
  content = bytearray(weights.read_bytes())
  content[-2] ^= 1
  weights.write_bytes(content)
  assert list(run.predict(tmp_path / 'full', GOOD)) == before['full']
  error = refuse(capsys, 'evaluate', f'--run={tmp_path / "lora"}')
  assert 'sha256' in error and 'trained' in error


@pytest.mark.parametrize(
  'change, expected',
  [
    ('text=revue', "no column 'revue'"),
    ('label=stars', "no column 'stars'"),
    ('task=reviewz.csv', 'reviewz.csv'),
    ('model=nowhere/at all', 'nowhere'),
    ('labels=liked|hatedd', 'hated'),
  ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
  data, tmp_path, capsys, change, expected
):
  given = dict(task=data, model=BERT, text='review', label='verdict')
  given.update([change.split('=', 1)])
  arg = ','.join(f'{k}={v}' for k, v in given.items())
  workdir = tmp_path / 'run'
  error = refuse(capsys, 'train', f'--config=configs/lora.py:{arg}', f'--workdir={workdir}', *SMALL)
  assert expected in error and not workdir.exists()


def test_bad_data_is_refused_with_file_and_row(tmp_path, capsys, data):
  rows = [['a good film', 'liked'], ['', 'hated']] * 20
  bad = write_csv(tmp_path / 'holes.csv', ['review', 'verdict'], rows)
  error = refuse(capsys, *command(bad, tmp_path / 'run'))
  assert 'holes.csv' in error and '3' in error and not (tmp_path / 'run').exists()


def test_other_refusals(trained, data, tmp_path, capsys):
  other = refuse(capsys, *command(data, trained, '--config.seed=1', '--config.train.epochs=4'))
  assert 'seed 0 -> 1' in other
  again = refuse(capsys, *command(data, trained, '--config.train.epochs=4', '--resume=never'))
  assert '--resume' in again
  assert 'no run' in refuse(capsys, *command(data, tmp_path / 'new', '--resume=must'))
  assert 'tests' in refuse(capsys, 'evaluate', f'--run={trained}', '--split=tests')
  assert 'bundle' in refuse(capsys, 'predict', f'--run={tmp_path}', f'--input={data}')
  with files.RunLock(tmp_path / 'busy'):
    busy = refuse(capsys, *command(data, tmp_path / 'busy'))
  assert 'pid' in busy
  long = refuse(capsys, *command(data, tmp_path / 'new', '--config.model.max_length=4000'))
  assert '128' in long and not (tmp_path / 'new').exists()


def test_data_that_has_grown_is_refused(data, tmp_path, capsys):
  """An own file is carved anew: what was trained on would be among what is scored."""
  own = tmp_path / 'own.csv'
  shutil.copy(data, own)
  workdir = tmp_path / 'run'
  once = command(own, workdir, '--config.train.steps=1')
  assert main.main([*map(str, once)]) == 0
  with open(own, 'a') as file:
    file.write('One more of them.,liked\n')
  capsys.readouterr()
  assert 'train data' in refuse(capsys, 'evaluate', f'--run={workdir}', '--split=test')
  (workdir / 'results.json').unlink()  # as if it had been killed
  assert 'train data' in refuse(capsys, *once)
  shutil.copy(data, own)
  assert main.main(['evaluate', f'--run={workdir}', '--split=test']) == 0


def test_a_base_that_has_changed_is_refused(data, tmp_path, capsys):
  """What has been trained beside other weights does not go on beside these."""
  once = command(data, tmp_path / 'run', '--config.train.steps=1')
  base = shutil.copytree(BERT, tmp_path / 'bert')
  once[1] = once[1].replace(f'model={BERT}', f'model={base}')
  assert main.main([*map(str, once)]) == 0
  (tmp_path / 'run' / 'results.json').unlink()  # as if it had been killed
  config_file = base / 'config.json'
  config_file.write_text(config_file.read_text().replace('{', '{"remark": 1, ', 1))
  capsys.readouterr()
  assert 'as when the run began' in refuse(capsys, *once)
  shutil.copy(BERT / 'config.json', config_file)
  assert main.main([*map(str, once)]) == 0


def test_evaluations_that_do_not_fit_are_cut(data, tmp_path, capfd, monkeypatch):
  """And nothing is trained again; the scores are the same."""
  predict, seen = finetune.scoring.predict, []

  def small(apply, variables, batches, devices):
    batches = list(batches)
    seen.append(len(batches[0]['input_ids']))
    if seen[-1] > 2:
      raise RuntimeError('RESOURCE_EXHAUSTED: 9 GB')
    return predict(apply, variables, batches, devices)

  found = []
  for name in ('whole', 'cut'):
    once = command(data, tmp_path / name, '--config.train.steps=2')
    assert main.main([*map(str, once)]) == 0
    found.append(files.read_json(tmp_path / name / 'results.json')['metrics'])
    monkeypatch.setattr(finetune.scoring, 'predict', small)
  assert seen[-1] == 2 < seen[0] and 'evaluations of 2 examples' in capfd.readouterr().err
  assert found[0] == pytest.approx(found[1], abs=1e-6)
  whole, cut = (len(files.read_jsonl(tmp_path / n / 'metrics.jsonl')) for n in ('whole', 'cut'))
  assert whole == cut


def test_a_task_that_there_is_not(capsys):
  assert 'see `efft tasks`' in refuse(capsys, 'fetch', '--task=foo')


def test_output_is_looked_at_before_there_is_work(tmp_path, capsys):
  for output in (tmp_path, tmp_path / 'no' / 'out.jsonl'):
    line = refuse(capsys, 'predict', '--run=/no/such', f'--input={__file__}', f'--output={output}')
    assert '--output' in line


def test_damaged_bundle_is_refused(trained, tmp_path, capsys):
  copy = tmp_path / 'copy'
  shutil.copytree(trained / 'bundle', copy)
  assert Classifier.load(copy)(['fine'])[0]['label'] in ('liked', 'hated')
  weights = copy / 'weights.safetensors'
  content = bytearray(weights.read_bytes())
  content[len(content) // 2] ^= 1
  weights.write_bytes(content)
  assert 'damaged' in refuse(capsys, 'predict', f'--run={copy}', f'--input={__file__}')


def test_chunks_answer_what_has_arrived():
  """A slow source is handed on line by line; a fast one in full lists; errors come last."""
  assert list(chunks([1, 2, 3, 4, 5], 2)) == [[1, 2], [3, 4], [5]]
  seen = []

  def slow():
    for i in range(3):
      yield i
      deadline = time.monotonic() + 20
      while i not in seen and time.monotonic() < deadline:
        time.sleep(0.001)
    raise ValueError('the end')

  with pytest.raises(ValueError, match='the end'):
    for chunk in chunks(slow(), 10):
      seen.extend(chunk)
  assert seen == [0, 1, 2]


def test_running_out_of_memory_cuts_the_batch_and_keeps_the_step(data, tmp_path, monkeypatch):
  """The device gives up on whole batches; the run ends where an accumulating one does."""

  def trained(name, accumulate):
    cfg = config.load(f'configs/bitfit.py:task={data},model={BERT},text=review,label=verdict')
    cfg.train.steps, cfg.model.max_length, cfg.mesh.devices = 3, 24, 1
    cfg.train.batch_size, cfg.train.accumulate = 8, accumulate
    run.train(cfg, tmp_path / name)
    return files.read_json(tmp_path / name / 'results.json'), (
      tmp_path / name / 'bundle' / 'weights.safetensors'
    ).read_bytes()

  _, asked = trained('asked', 2)
  make = finetune.step.make_step

  def small_device(*args, **options):
    if options['accumulate'] == 1:
      raise RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.')
    return make(*args, **options)

  monkeypatch.setattr(finetune.step, 'make_step', small_device)
  results, found = trained('found', 1)
  assert results['accumulate'] == 2 and found == asked
