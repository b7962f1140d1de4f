"""The command line: help, refusals and exit codes in real processes; dispatch with run replaced."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import efft
from efft import command, config
from efft.errors import Diverged, EnvironmentProblem, InputError, Preempted
from efft.main import VERBS, main

TRAIN = ['train', '--config=configs/lora.py:task=t', '--workdir=w']


def efft_process(*args, cwd=None, **kwargs):
  """Runs the command line as a user does."""
  return subprocess.run(
    [sys.executable, '-m', 'efft', *args], capture_output=True, text=True, cwd=cwd, **kwargs
  )


@pytest.fixture
def run(monkeypatch):
  """Takes the place of efft.run; `run.calls` lists what main asked of it."""
  module = types.ModuleType('efft.run')
  module.calls = []

  def record(name, result):
    def function(*args, **kwargs):
      module.calls.append((name, args, kwargs))
      return result(*args, **kwargs) if callable(result) else result

    setattr(module, name, function)

  module.record = record
  for name in ('train', 'evaluate', 'inspect', 'fetch'):
    record(name, {'accuracy': 0.5, 'rows': 1234})
  record('predict', lambda run, texts, **_: ({'text': t, 'label': 'good'} for t in texts or ['f']))
  monkeypatch.setitem(sys.modules, 'efft.run', module)
  monkeypatch.setattr(efft, 'run', module, raising=False)
  monkeypatch.setattr('efft.verbs.prepare', lambda: None)  # malloc settings would outlive the test
  return module


def test_train_gets_config_workdir_and_resume(run, capsys):
  assert main([*TRAIN, '--config.method.lora.rank', '4', '--config.optim.groups.head.lr=0.1']) == 0
  [(name, (config, workdir), options)] = run.calls
  assert (name, workdir, options) == ('train', 'w', {'resume': 'auto'})
  assert config.method.lora.rank == 4 and config.optim.groups.head.lr == 0.1
  assert config.is_locked
  assert capsys.readouterr().out == 'accuracy  0.5000\nrows      1,234\n'


def test_overrides_of_every_kind(run):
  overrides = {
    '--config.optim.clip=None': lambda c: c.optim.clip is None,
    '--config.model.remat': lambda c: c.model.remat is True,
    '--config.train.steps=10': lambda c: c.train.steps == 10,
    '--config.task.text=12': lambda c: c.task.text == '12',
    '--config.train.class_weights=[1, 2.5]': lambda c: list(c.train.class_weights) == [1, 2.5],
    '--config.trackers=wandb': lambda c: c.trackers == ('wandb',),
    "--config.rules=(('.*', 'all'),)": lambda c: c.rules == (('.*', 'all'),),
    '--config.method.lora.at=layer_0/.*': lambda c: c.method.lora.at == 'layer_0/.*',
  }
  assert main([*TRAIN, *overrides]) == 0
  [(_, (config, _), _)] = run.calls
  for override, holds in overrides.items():
    assert holds(config), override


def test_a_switch_is_turned_on_and_off_again(run):
  on, off = '--config.train.group_by_length', '--noconfig.train.group_by_length'
  for flags, expected in (([on], True), ([off], False), ([on, off], False), ([off, on], True)):
    assert main([*TRAIN, *flags]) == 0
    assert run.calls[-1][1][0].train.group_by_length is expected


def test_evaluate_inspect_fetch(run):
  assert main(['evaluate', '--run=r', '--split=test']) == 0
  assert main(['inspect', '--config=configs/head.py:task=t']) == 0
  assert main(['fetch', '--model=m']) == 0
  assert [(name, options) for name, _, options in run.calls] == [
    ('evaluate', {'split': 'test'}),
    ('inspect', {}),
    ('fetch', {}),
  ]
  assert run.calls[2][1] == (None, 'm')


def test_predict_reads_lines_and_writes_json(run, capsys, monkeypatch):
  stdin = types.SimpleNamespace(
    buffer=io.BytesIO('\ufefffein\r\n\nzw\u00f6lf'.encode()), isatty=lambda: False
  )
  monkeypatch.setattr(sys, 'stdin', stdin)
  assert main(['predict', '--run=r']) == 0
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line['text'] for line in lines] == ['fein', '', 'zw\u00f6lf']


def test_predict_refuses_bytes_that_are_not_text(run, capsys, monkeypatch):
  stdin = types.SimpleNamespace(buffer=io.BytesIO(b'a\n\xff\xfe\n'), isatty=lambda: False)
  monkeypatch.setattr(sys, 'stdin', stdin)
  assert main(['predict', '--run=r']) == 2
  assert 'standard input:2: found ' in capsys.readouterr().err


def test_predict_passes_files_on(run, capsys):
  assert main(['predict', '--run=r', '--input=a.csv', '--output=b', '--text_column=c']) == 0
  assert run.calls[0][2] == {'input': 'a.csv', 'output': 'b', 'text_column': 'c'}
  assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
  'error, code, text',
  [
    (InputError('a.csv:3', "'x'", 'a label', 'mend it'), 2, "a.csv:3: found 'x', expected a label"),
    (Diverged('loss is nan at step 7'), 3, 'step 7'),
    (EnvironmentProblem('disk full'), 4, 'disk full'),
    (Preempted('saved at step 7'), 75, 'saved'),
    (PermissionError(13, 'Permission denied', '/x'), 4, "'/x': Permission denied"),
    (MemoryError(), 4, 'config.train.batch_size'),
    (RuntimeError('RESOURCE_EXHAUSTED: 9 GB'), 4, 'out of memory'),
    (KeyError('oops'), 1, 'bug of efft'),
  ],
)
def test_exit_codes(run, capsys, error, code, text):
  def fails(*args, **kwargs):
    raise error

  run.record('evaluate', fails)
  assert main(['evaluate', '--run=r']) == code
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('efft: error: ') and err.count('\n') == 1 and text in err


def test_interrupt(run, capsys):
  def fails(*args, **kwargs):
    raise KeyboardInterrupt

  run.record('train', fails)
  assert main(TRAIN) == 130
  assert capsys.readouterr() == ('', 'efft: interrupted\n')


def test_traceback_on_demand(run, capsys, monkeypatch):
  monkeypatch.setenv('EFFT_TRACEBACK', '1')
  run.record('evaluate', lambda *a, **k: 1 / 0)
  assert main(['evaluate', '--run=r']) == 1
  err = capsys.readouterr().err
  assert 'Traceback' in err and err.splitlines()[-1].startswith('efft: error: ZeroDivisionError')


REFUSED = [
  (['trian'], "unknown verb 'trian'", 'did you mean train?'),
  (['train'], '--config: found nothing', 'configs/lora.py'),
  (['train', '--config=configs/lora.py:task=t'], '--workdir: found nothing', '--help'),
  (['train', '--config=configs/loraa.py'], 'configs/loraa.py', 'did you mean configs/lora.py?'),
  ([*TRAIN, '--wrokdir=x'], 'unknown flag --wrokdir', 'did you mean --workdir?'),
  ([*TRAIN, '--resume=mst'], "'mst', expected one of auto, never, must", 'did you mean must?'),
  ([*TRAIN, '--config.optim.lrr=1'], "unknown field 'optim.lrr'", 'did you mean optim.lr?'),
  ([*TRAIN, '--config.method.lora.rnk=1'], 'method.lora.rnk', 'did you mean method.lora.rank?'),
  ([*TRAIN, '--config.method.lora.rank=4.5'], 'config.method.lora.rank: found 4.5', '=...'),
  ([*TRAIN, '--config.optim.lr=fast'], "config.optim.lr: found 'fast'", 'peak learning rate'),
  ([*TRAIN, '--config.seed'], '--config.seed: found nothing', 'a value'),
  ([*TRAIN, '--config.optim=3'], 'config.optim=3', 'not a dict'),
  ([*TRAIN, 'surplus'], "found 'surplus'", 'flags only'),
  (['train', '--config=configs/lora.py:task=t', '--workdir'], 'Missing value', '--workdir'),
  (['train', '--config=configs/lora.py:task', '--workdir=w'], "'task', expected key=value", ''),
  (['train', '--config=configs/lora.py', '--workdir=w'], 'config.task.name', 'rotten_tomatoes'),
  (['evaluate', '--run=r', '--splt=test'], 'unknown flag --splt', 'did you mean --split?'),
  (['evaluate', '--run=r', '--config.seed=1'], 'unknown flag --config.seed', '--run'),
  (['evaluate', '--run='], '--run: found nothing', ''),
  (['predict', '--run=r', '--text_column=c'], '--text_column', '--input'),
  (['fetch'], 'no flags', '--task or --model'),
  ([*TRAIN, '--lr=3'], 'unknown flag --lr', 'did you mean --config.optim.lr?'),
  ([*TRAIN, '--optim.lr=3'], 'unknown flag --optim.lr', 'did you mean --config.optim.lr?'),
  ([*TRAIN, '--train.steps', '5'], 'unknown flag --train.steps', 'mean --config.train.steps?'),
  ([*TRAIN, '--model.name=x'], 'unknown flag --model.name', 'did you mean --config.model.name?'),
  ([*TRAIN, '--seed=3'], 'unknown flag --seed', 'did you mean --config.seed?'),
  ([*TRAIN, '--rank', '4'], 'unknown flag --rank', 'did you mean --config.method.lora.rank?'),
  ([*TRAIN, '--task=t'], 'unknown flag --task', 'did you mean --config=FILE:task=?'),
  (
    [*TRAIN, '--batch_size', '8'], 'unknown flag --batch_size',
    'did you mean --config.eval.batch_size or --config.train.batch_size?',
  ),
  ([*TRAIN, '--config.lr=3'], "unknown field 'lr'", 'did you mean optim.lr?'),
  ([*TRAIN, '--config.train.lr=3'], "unknown field 'train.lr'", 'did you mean optim.lr?'),
  ([*TRAIN, '--config.optim.groups.delt.lr=3'], 'delt.lr', 'did you mean optim.groups.delta.lr?'),
  (['train', '--config=configs/lora.py:lr=3'], "unknown key 'lr'", 'mean --config.optim.lr?'),
  (['train', '--config=configs/lora.py:rnk=3'], "unknown key 'rnk'", '--config.FIELD='),
  (['train', '--config=configs/lroa.py'], 'configs/lroa.py', 'did you mean configs/lora.py?'),
  (['compress', '--run=r', '--workdir=w'], '--config: found nothing', 'configs/int8.py'),
  (
    [*TRAIN, '--config.trackers=tensorboard,wandb'], 'config.trackers',
    '''pass --config.trackers="('tensorboard','wandb')"''',
  ),
  (
    [*TRAIN, '--config.task.labels=neg,pos'], "config.task.labels: found 'neg,pos'",
    '''pass --config.task.labels="('a','b')"''',
  ),
  (
    [*TRAIN, '--config.model.init_from=runs/a,runs/b'], "found 'runs/a,runs/b'",
    '''pass several as --config.model.init_from="('runs/a','runs/b')"''',
  ),
]  # fmt: skip


@pytest.mark.parametrize('args, what, fix', REFUSED, ids=lambda x: ' '.join(x)[-40:])
def test_refusals(run, capsys, args, what, fix):
  assert main(args) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.startswith('efft: error: ') and err.count('\n') == 1
  assert what in err and fix in err
  assert not run.calls


@pytest.mark.parametrize(
  'args', [['trian'], [*TRAIN, '--config.optim.lrr=1'], [*TRAIN, '--bogus'], ['evaluate', '--run']]
)
def test_refusals_of_the_process(tmp_path, args):
  began = time.monotonic()
  done = efft_process(*args, cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, '')
  assert done.stderr.startswith('efft: error: ') and done.stderr.count('\n') == 1
  assert list(tmp_path.iterdir()) == [], 'a refusal leaves nothing behind'
  assert time.monotonic() - began < 5


def test_help_is_quick_and_short():
  seconds = []
  for _ in range(3):
    began = time.monotonic()
    done = efft_process('--help')
    seconds.append(time.monotonic() - began)
  assert min(seconds) < 0.5
  assert done.returncode == 0 and done.stderr == ''
  assert len(done.stdout.splitlines()) < 26 and all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize('verb', VERBS)
def test_help_of_a_verb_names_its_flags(capsys, verb):
  assert main([verb, '--help']) == 0
  text = capsys.readouterr().out
  assert all(f'--{flag.name}' in text for flag in VERBS[verb].flags)
  assert len(text.splitlines()) < 24
  assert main([verb, '--helpfull']) == 0
  has_config = any(flag.name == 'config' for flag in VERBS[verb].flags)
  assert ('--config.optim.lr' in capsys.readouterr().out) == has_config


def test_full_help_with_a_config_lists_its_own_options(capsys):
  assert main(['train', '--helpfull']) == 0
  fields = capsys.readouterr().out
  assert re.search(r"config.train.save='best' .*; one of best, last\n", fields)
  assert 'config.method.lora' not in fields
  assert main(['train', '--config=configs/loraplus.py', '--helpfull']) == 0
  out = capsys.readouterr().out
  assert out.startswith(fields.rstrip('\n'))
  # What is printed can be typed: it is taken back, and changes nothing.
  own = [line.strip() for line in out[len(fields) :].splitlines() if '--config.' in line]
  given = [shlex.split(line)[0] for line in own]
  assert {'--config.optim.groups.b.lr=0.0032', '--config.method.lora.rank=8'} <= set(given)
  assert config.resolve(parsed(given)) == config.resolve(parsed([]))
  assert main(['train', '--helpfull', '--config=configs/lroa.py']) == 2


def parsed(overrides):
  args = ['--config=configs/loraplus.py:task=t', '--workdir=w', *overrides]
  return command._parse('train', VERBS['train'], args)['config']


def test_the_readme_lists_every_verb_key_and_setting(tmp_path):
  root = Path(efft.__file__).parents[1]
  readme = (root / 'README.md').read_text(encoding='utf-8')
  commands = readme.partition('## The commands')[2].partition('```')[0]
  assert {verb for verb in VERBS if re.search(rf'efft {verb}\b', commands)} == set(VERBS)
  keys = re.search('Behind `FILE.py:` stand (.*?);', commands, re.DOTALL)[1]
  assert sorted(re.findall(r'`(\w+)`', keys)) == sorted(config.SHORT)
  sources = ''.join(file.read_text(encoding='utf-8') for file in (root / 'efft').rglob('*.py'))
  assert set(re.findall(r"'(EFFT_\w+)'", sources)) == set(re.findall(r'EFFT_[A-Z0-9]+', readme))
  [example] = re.findall(r'```python\n([^`]*def get_config[^`]*)```', readme)
  (tmp_path / 'mine.py').write_text(example)
  resolved = config.resolve(config.load(f'{tmp_path / "mine.py"}:task=reviews.csv'))
  assert resolved['method']['lora']['rank'] == 4


def test_version_and_no_arguments(capsys):
  assert main(['--version']) == 0
  assert capsys.readouterr().out == f'efft {efft.__version__}\n'
  assert main([]) == 0 and 'efft train' in capsys.readouterr().out
  assert main(['help', 'train']) == 0 and '--workdir' in capsys.readouterr().out


def test_methods_lists_the_configs(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'mine.py').write_text('"""My own."""\n')
  assert main(['methods']) == 0
  lines = capsys.readouterr().out.splitlines()
  found = {line[17:37].strip(): line[37:].split() for line in lines[2:]}
  assert found.keys() >= {'lora', 'ia3', 'bitfit', 'full', 'head', 'mine'}
  assert found['lora'][:4] == ['294,912', '294,912', 'yes', '0.36%']
  assert found['mine'] == ['-', '-', '-', '-', 'My', 'own.']
  assert all(len(line) <= 170 for line in lines)
  staged = lines[lines.index('') + 1 :]
  assert 'prune or quantise' in staged[0]
  assert {line.split()[0] for line in staged[1:]} >= {'prune_heads', 'int8'}


def test_closed_pipe_is_quiet():
  process = subprocess.Popen(
    [sys.executable, '-m', 'efft', 'train', '--helpfull'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env={**os.environ, 'PYTHONUNBUFFERED': '1'},
  )
  process.stdout.close()
  assert process.stderr.read() == b''
  process.stderr.close()
  assert process.wait() == 141


def test_public_names_are_lazy():
  code = (
    'import sys, efft; assert "jax" not in sys.modules; '
    'assert {"train", "evaluate", "predict", "inspect", "fetch"} <= set(dir(efft)); efft.nothing'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert "module 'efft' has no attribute 'nothing'" in done.stderr


def test_malloc_settings_take_effect_in_a_process_of_their_own():
  code = 'from efft import cpu; print(cpu.keep_heap())'
  env = {k: v for k, v in os.environ.items() if k != 'EFFT_MALLOC'}
  for extra, expected in (({}, ('True', 'False')), ({'EFFT_MALLOC': 'system'}, ('False',))):
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, env=env | extra, check=True
    )
    assert done.stdout.strip() in expected
