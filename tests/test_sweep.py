"""Studies and sweeps: spaces, study files, records, and the processes (which train nothing here).

`test_sweep_runs.py` sweeps with real training.
"""

import collections
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from efft import alike, config, files, main
from efft.errors import InputError
from efft.sweep import launch, show, space, study
from efft.sweep.records import Records

# --- spaces ---

FIELDS = st.sampled_from(['optim.lr', 'seed', 'train.steps', 'model.dtype'])
GRIDS = st.dictionaries(FIELDS, st.lists(st.integers(0, 9), max_size=4), max_size=3)


@given(GRIDS)
def test_grid_is_nested_loops(values):
  expected = [{}]
  for field, options in values.items():
    expected = [item | {field: option} for item in expected for option in options]
  assert space.grid(values) == expected


@given(*[st.lists(st.integers(0, 9), max_size=3)] * 3)
def test_product_and_chain_are_a_semiring(a, b, c):
  """Product is associative and distributes over chain; it loses nothing."""
  x, y, z = ([{name: v} for v in values] for name, values in zip('abc', (a, b, c), strict=True))
  assert space.product(x, space.product(y, z)) == space.product(space.product(x, y), z)
  assert space.product(x, y, z) == space.grid({'a': a, 'b': b, 'c': c})
  assert space.product(space.chain(x, y), z) == space.chain(
    space.product(x, z), space.product(y, z)
  )
  assert space.product(x) == space.chain(x) == space.listed(x) == x
  assert space.product() == [{}]


def test_product_refuses_to_lose_a_value():
  with pytest.raises(ValueError, match='seed'):
    space.product(space.seeds(2), [{'seed': 3}])


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 2**31))
def test_random_goes_on_where_it_ended(few, more, seed):
  lr, rank = space.log_uniform(1e-5, 1e-2), space.choice([2, 4, 8])
  long = space.random({'lr': lr, 'rank': rank}, few + more, seed)
  assert space.random({'lr': lr, 'rank': rank}, few, seed) == long[:few]
  alone = space.random({'rank': rank}, few + more, seed)
  assert [item['rank'] for item in alone] == [item['rank'] for item in long]


@pytest.mark.parametrize(
  'draw, law',
  [
    (space.uniform(-1, 3), stats.uniform(-1, 4)),
    (space.log_uniform(1e-5, 1e-2), stats.loguniform(1e-5, 1e-2)),
  ],
)
def test_random_follows_its_distribution(draw, law):
  values = [item['x'] for item in space.random({'x': draw}, 2000, seed=0)]
  assert law.support()[0] <= min(values) and max(values) <= law.support()[1]
  assert stats.kstest(values, law.cdf).pvalue > 0.01
  assert all(value == float(f'{value:.4g}') for value in values)


def test_choice_is_even():
  values = [item['x'] for item in space.random({'x': space.choice(range(1, 5))}, 2000, seed=1)]
  counts = collections.Counter(values)
  assert set(counts) == {1, 2, 3, 4}
  assert stats.chisquare(list(counts.values())).pvalue > 0.01


@pytest.mark.parametrize(
  'wrong',
  [
    lambda: space.grid({'seed': 3}),
    lambda: space.grid({'model.dtype': 'float32'}),
    lambda: space.uniform(2, 1),
    lambda: space.log_uniform(0, 1),
    lambda: space.choice([]),
    lambda: space.listed([('seed', 1)]),
  ],
)
def test_spaces_that_make_no_sense(wrong):
  with pytest.raises(ValueError):
    wrong()


# --- study files ---

HEAD = 'from efft.sweep import *\nfrom efft.sweep import Run\n'


def written(folder: Path, text: str) -> Path:
  file = folder / 'mine.py'
  file.write_text(HEAD + textwrap.dedent(text))
  return file


def of_arms(folder: Path, arms, count: int = 1, more: str = '') -> Path:
  return written(
    folder,
    f"""
    {more}
    POPULATIONS = False
    def runs():
      for arm in {list(arms)}:
        for overrides in seeds({count}):
          yield Run(arm, 'configs/bitfit.py:task=sst2', overrides)
    """,
  )


def test_a_study_resolves_its_configs(tmp_path):
  file = written(
    tmp_path,
    """
    LATENCY = [(1, 32, 'f32'), [8, 128, 'int8']]
    SPLITS = ['report']
    KEEP = True
    def runs():
      for overrides in product(grid({'method.lora.rank': [2, 4]}), seeds(2)):
        yield Run('LoRA (small)', 'configs/lora.py:task=sst2', overrides)
        yield Run('LoRA (small)', 'configs/lora.py:task=sst2', overrides)  # once more
      yield Run('whole', 'configs/full.py:task=cola', {'task.halves': False, 'optim.clip': None})
    """,
  )
  found = study.load(file)
  assert (found.name, found.keep, found.repeated) == ('mine', True, 4)
  assert found.latency == ((1, 32, 'f32'), (8, 128, 'int8')) and found.splits == ('report',)
  *small, whole = found.runs
  for run, (rank, seed) in zip(small, itertools.product([2, 4], [0, 1]), strict=True):
    cfg = config.load('configs/lora.py:task=sst2')
    cfg.method.lora.rank, cfg.seed, cfg.task.halves = rank, seed, True
    expected = config.resolve(cfg)
    assert run.config == expected and run.hash == config.config_hash(expected)
    assert run.name == f'lora-small-{seed}-{run.hash[:8]}'
    assert run.overrides == {'method.lora.rank': rank, 'seed': seed}
  assert whole.config['task']['halves'] is False and whole.config['optim']['clip'] is None


def test_numpy_values_are_plain_numbers(tmp_path):
  file = written(
    tmp_path,
    """
    import numpy as np
    from pathlib import Path
    def runs():
      for i in np.arange(2):
        yield Run('a', 'configs/full.py:task=t', {'seed': i, 'optim.lr': np.float64(1e-3),
                  'task.path': Path('data')})
    """,
  )
  for i, run in enumerate(study.load(file).runs):
    assert run.overrides == {'seed': i, 'optim.lr': 1e-3, 'task.path': 'data'}
    assert json.loads(json.dumps(run.config)) == run.config


BROKEN = [
  ('def runs(:\n  pass', ':3: found SyntaxError', ''),
  ('def runs():\n  yield 1 / 0', ':4: found ZeroDivisionError', 'mend the file'),
  ("def runs():\n  yield grid({'seed': 3})", ':4: found ValueError', 'list of values'),
  ('import efft.nothing', ':3: found ModuleNotFoundError', ''),
  ('runs = 3', 'no function runs', 'def runs()'),
  ('def runs():\n  return []', 'no runs', ''),
  ('def runs():\n  return None', 'NoneType', ''),
  ("def runs():\n  yield ('a', 'configs/lora.py', {})", 'run 1: found', 'from efft.sweep import'),
  ("def runs():\n  yield Run('', 'configs/lora.py:task=t')", 'run 1: arm', 'a name'),
  ("def runs():\n  yield Run('a', 'configs/lora.py:task=t', 3)", 'run 1: overrides', ''),
  ("def runs():\n  yield Run('a', 'configs/loraa.py:task=t')", 'run 1 (a): --config', 'lora.py?'),
  ("def runs():\n  yield Run('a', 'configs/lora.py')", 'task.name', ''),
  (
    "def runs():\n  yield Run('a', 'configs/lora.py:task=t', {'optim.lrr': 1.0})",
    "unknown field 'optim.lrr'",
    'did you mean optim.lr?',
  ),
  (
    "def runs():\n  yield Run('a', 'configs/lora.py:task=t', {'method.lora.rnk': 1})",
    "unknown field 'method.lora.rnk'",
    'did you mean method.lora.rank?',
  ),
  (
    "def runs():\n  yield Run('a', 'configs/lora.py:task=t', {'optim.lr': 'fast'})",
    "config.optim.lr: found 'fast'",
    'a number > 0',
  ),
  (
    "def runs():\n  yield Run('a', 'configs/lora.py:task=t')\n"
    "  yield Run('A', 'configs/lora.py:task=t')",
    "arms 'a' and 'A'",
    'rename',
  ),
  ('LATENCYS = []\ndef runs(): return []', 'LATENCYS', 'LATENCY'),
  ("LATENCY = [(1, 32, 'f64')]\ndef runs(): return []", "(1, 32, 'f64')", 'bf16'),
  ("SPLITS = ['dev']\ndef runs(): return []", "SPLITS: found ['dev']", 'report'),
  ('KEEP = 1\ndef runs(): return []', 'KEEP: found 1', 'True or False'),
]


@pytest.mark.parametrize('text, found, fix', BROKEN, ids=[found for _, found, _ in BROKEN])
def test_a_broken_study_is_one_clear_line(tmp_path, capsys, text, found, fix):
  file = written(tmp_path, text)
  code = main.main(['sweep', f'--study={file}', f'--workdir={tmp_path}/out'])
  out, err = capsys.readouterr()
  assert code == 2 and out == '' and err.count('\n') == 1, err
  assert str(file) in err and found in err and fix in err
  assert [path.name for path in tmp_path.iterdir()] == ['mine.py']


@pytest.mark.parametrize('flag', ['--shard=2/2', '--shard=1', '--shard=-1/2', '--jobs=0'])
def test_flags_that_make_no_sense(tmp_path, capsys, flag):
  file = of_arms(tmp_path, 'a')
  assert main.main(['sweep', f'--study={file}', f'--workdir={tmp_path}/out', flag]) == 2
  assert flag.partition('=')[0] in capsys.readouterr().err and not (tmp_path / 'out').exists()


@given(st.lists(st.integers(), max_size=30), st.integers(1, 7))
def test_shards_partition_the_runs(items, n):
  parts = [study.part(items, f'{i}/{n}') for i in range(n)]
  assert sorted(itertools.chain(*parts)) == sorted(items)
  sizes = [len(part) for part in parts]
  assert max(sizes) - min(sizes) <= 1


def test_shares_of_the_cores(monkeypatch):
  cores = set(range(3, 10))
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: cores, raising=False)
  assert launch.shares(1) == [[]]
  for jobs in range(2, 12):
    found = launch.shares(jobs)
    assert len(found) == jobs and all(found) and set().union(*found) == cores
    if jobs <= len(cores):
      assert sum(map(len, found)) == len(cores), 'no core twice'


# --- records ---

LINES = st.one_of(
  st.builds(
    lambda arm, status, n: json.dumps({'arm': arm, 'config_hash': 'h', 'status': status, 'n': n}),
    st.sampled_from('abc'), st.sampled_from(['ok', 'failed']), st.integers(),
  ),
  st.sampled_from(['', '{"arm": "a"', '[]', '{"arm": "a"}', 'null']),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=12), st.lists(st.integers(0, 400), max_size=5), st.booleans())
def test_records_read_as_they_come(tmp_path_factory, lines, cuts, ended):
  """In pieces cut anywhere, the last record of each run is that of reading all at once."""
  path = tmp_path_factory.mktemp('records') / 'records.jsonl'
  data = '\n'.join(lines).encode() + b'\n' * ended
  records = Records(path)
  for end in sorted(min(cut, len(data)) for cut in cuts):
    path.write_bytes(data[:end])
    records.refresh()
  path.write_bytes(data)
  records.refresh()
  every = [r for r in files.read_jsonl(path) if 'config_hash' in r]
  for arm in 'abc':
    mine = [r for r in every if r['arm'] == arm]
    assert records.count((arm, 'h')) == len(mine)
    assert records.get((arm, 'h')) == (mine[-1] if mine else None)
  records.add({'arm': 'a', 'config_hash': 'h', 'last': True})
  records.refresh()
  assert records.get(('a', 'h'))['last']
  path.unlink()
  records.refresh()
  assert records.get(('a', 'h')) is None


def test_a_field_that_efft_has_got_since_makes_nothing_again(tmp_path):
  """An older record lacks it; one whose config holds another value is of another run."""
  now = config.resolve(config.default('task=sst2'))
  older = json.loads(json.dumps(now))
  del older['optim']['ema'], older['task']['halves']
  other = config.resolve(older | {'seed': 1})
  records = Records(tmp_path / 'records.jsonl')
  records.add({'arm': 'a', 'config_hash': 'of that day', 'config': older})
  records.refresh()
  assert records.get(('a', config.config_hash(now)))['config_hash'] == 'of that day'
  assert records.get(('a', config.config_hash(other))) is None
  # Nobody has the field any more: known by what it says of itself.
  records.add({'arm': 'a', 'config_hash': 'gone', 'config': {**now, 'was_there': 1}})
  records.refresh()
  assert records.count(('a', 'gone')) == 1


# --- processes ---

# The process of a run with training replaced; what the arm is called says what becomes of it.
FAKE = """
import os, signal, sys, time, types
from efft import config as configs
from efft.errors import Diverged, Preempted
from efft.sweep import job

def failed(config, *, study, arm, overrides, run, root, status, error):
  return {
    'study': study, 'arm': arm, 'overrides': overrides, 'seed': config['seed'], 'status': status,
    'config_hash': configs.config_hash(config), 'error': error,
  }

# In place of the real one, which imports jax.
sys.modules['efft.bench'] = types.SimpleNamespace(record=types.SimpleNamespace(failed=failed))

def said(root, event, run):
  with open(f'{root}/events', 'a') as file:
    file.write(f'{event} {run.arm}-{run.config["seed"]}\\n')

def preempted(*_):
  raise Preempted('saved')

def make(run, given, folder):
  said(given.root, 'begun', run)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'weights').write_text('1')
  healed = os.path.exists(f'{given.root}/healed')
  if run.arm == 'slow':
    signal.signal(signal.SIGTERM, preempted)
    said(given.root, 'ready', run)
    time.sleep(0.1 if healed else 60)
  if not healed:
    if run.arm == 'crash':
      raise KeyError('oops')
    if run.arm == 'killed':
      os.kill(os.getpid(), signal.SIGKILL)
    if run.arm == 'leaves':
      print('no way', flush=True)
      os._exit(7)
    if run.arm == 'diverged':
      raise Diverged('step 3: loss is nan')
  time.sleep(0.2)
  said(given.root, 'done', run)
  seed = run.config['seed']
  return {
    'arm': run.arm, 'config_hash': run.hash, 'status': 'ok', 'task': 'sst2', 'seed': seed,
    'metric': 'accuracy', 'metrics': {'validation': {'accuracy': 0.1}, 'report': {'accuracy': seed}},
    'cores': sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [],
  }

job.trained = make
job._together = lambda *_: None  # sst2 may be at hand, and would be trained on
sys.exit(job.main())
"""  # noqa: E501
# `efft sweep` whose processes are those.
PARENT = (
  'import sys; from efft import main; from efft.sweep import launch; '
  'launch.JOB = (sys.executable, sys.argv[1]); launch.WAIT = 0.1; sys.exit(main.main(sys.argv[2:]))'
)


@pytest.fixture
def fake(tmp_path):
  """start(study, *flags) gives the process of a sweep into tmp_path/out."""
  script = tmp_path / 'fake.py'
  script.write_text(FAKE)

  def start(file, *flags):
    command = [sys.executable, '-c', PARENT, str(script), 'sweep', f'--study={file}']
    command += [f'--workdir={tmp_path}/out', *flags]
    return subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      # Whoever starts the tests in the background has interrupts ignored, and so would the sweep.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip

  return start


def ended(process) -> tuple[int, str, str]:
  out, err = process.communicate(timeout=240)
  return process.returncode, out, err


def events(out: Path, what: str) -> list[str]:
  path = out / 'events'
  lines = path.read_text().splitlines() if path.exists() else []
  return [line.split()[1] for line in lines if line.startswith(what)]


def wait_for(condition, process, seconds: float = 120) -> None:
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None and time.monotonic() < deadline, ended(process)
    time.sleep(0.01)


def recorded(out: Path) -> collections.Counter:
  path = out / 'records.jsonl'
  records = files.read_jsonl(path) if path.exists() else []
  return collections.Counter((r['arm'], r['seed'], r['status']) for r in records)


def test_killed_twice_and_gone_on_with(tmp_path, fake):
  file, out = of_arms(tmp_path, ['a', 'b'], 4), tmp_path / 'out'
  for enough in (2, 5):
    process = fake(file, '--jobs=2')
    wait_for(lambda enough=enough: len(events(out, 'done')) >= enough, process)
    process.kill()
    assert ended(process)[0] == -signal.SIGKILL
  code, stdout, stderr = ended(fake(file))
  assert code == 0, stderr
  assert recorded(out) == {(arm, seed, 'ok'): 1 for arm in 'ab' for seed in range(4)}
  assert list((out / 'runs').iterdir()) == [], 'run folders are gone'
  for arm in 'ab':
    (line,) = [line for line in stdout.splitlines() if f' {arm} ' in line]
    assert line.split() == ['sst2', arm, '4', '0', '1.5000', 'accuracy,', 'report']
  assert '8 done' in stderr
  before = (out / 'records.jsonl').read_bytes()
  assert ended(fake(file))[0] == 0 and (out / 'records.jsonl').read_bytes() == before


def test_two_sweeps_share_the_work(tmp_path, fake):
  file, out = of_arms(tmp_path, ['a', 'b', 'c'], 2), tmp_path / 'out'
  both = [fake(file) for _ in range(2)]
  found = [ended(process) for process in both]
  assert [code for code, _, _ in found] == [0, 0], found
  assert sorted(events(out, 'begun')) == [f'{arm}-{seed}' for arm in 'abc' for seed in range(2)]
  assert set(recorded(out).values()) == {1} and len(recorded(out)) == 6
  assert found[0][1] == found[1][1], 'both tell of all runs'


def test_sigterm_ends_the_children_first(tmp_path, fake):
  file, out = of_arms(tmp_path, ['slow'], 2), tmp_path / 'out'
  process = fake(file, '--jobs=2')
  wait_for(lambda: len(events(out, 'ready')) == 2, process)
  process.send_signal(signal.SIGTERM)
  code, stdout, stderr = ended(process)
  assert code == 75 and 'run the same command again' in stderr and stdout == ''
  assert not recorded(out) and 'saved' in ''.join(f.read_text() for f in (out / 'logs').iterdir())
  assert len(list((out / 'runs').iterdir())) == 2, 'what was begun is there to go on with'
  process = fake(file)
  wait_for(lambda: len(events(out, 'ready')) == 3, process)
  process.send_signal(signal.SIGINT)
  assert ended(process)[0] == 130
  (out / 'healed').touch()
  assert ended(fake(file))[0] == 0 and set(recorded(out).values()) == {1}


def test_signals_are_taken_down_and_given_back():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
  interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
  handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
  try:
    with launch._signals() as came:
      for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        signal.raise_signal(number)
      assert came == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
  finally:
    signal.signal(signal.SIGHUP, before)
    signal.signal(signal.SIGINT, interrupt)


def test_failures_are_recorded_and_told(tmp_path, fake):
  arms = ['crash', 'killed', 'leaves', 'diverged', 'fine']
  file, out = of_arms(tmp_path, arms), tmp_path / 'out'
  code, stdout, stderr = ended(fake(file))
  assert code == 1 and '4 of 5 runs failed' in stderr and '--retry_failed' in stderr
  told = {
    'crash': "failed: KeyError: 'oops'",
    'killed': 'failed: killed by SIGKILL (out of memory?)',
    'leaves': 'failed: exit code 7: no way',
    'diverged': 'diverged: step 3: loss is nan',
  }
  records = {r['arm']: r for r in files.read_jsonl(out / 'records.jsonl')}
  for arm, text in told.items():
    assert f'{arm} seed=0: {text}' in stdout
    record = records[arm]
    assert f'{record["status"]}: {record["error"]}' == text
    assert record['study'] == 'mine' and record['overrides'] == {'seed': 0} and record['run'] == ''
  assert records['fine']['status'] == 'ok'
  assert 'KeyError' in next((out / 'logs').glob('crash-*.log')).read_text()
  # Once more: what failed stays failed, unless asked for.
  (out / 'healed').touch()
  assert ended(fake(file))[0] == 1 and len(events(out, 'begun')) == 5
  listed = ended(fake(file, '--dry_run', '--retry_failed'))[1]
  states = [line.split()[0] for line in listed.splitlines()]
  assert states == ['status', 'failed', 'failed', 'failed', 'diverged', 'done']
  code, stdout, stderr = ended(fake(file, '--retry_failed'))
  assert code == 0, stderr
  assert sorted(events(out, 'begun')[5:]) == [f'{arm}-0' for arm in sorted(told)]
  assert 'oops' not in stdout


def test_a_group_that_dies_is_taken_apart(tmp_path, monkeypatch, capfd):
  """Runs of one process: what was recorded before counts, the others get one each."""
  script = tmp_path / 'fake.py'
  script.write_text(FAKE)
  monkeypatch.setattr(launch, 'JOB', (sys.executable, str(script)))
  monkeypatch.setattr(launch, 'plan', lambda runs, *_: [list(runs)])
  out = tmp_path / 'out'
  found = launch.sweep(of_arms(tmp_path, ['a', 'killed', 'b']), out)
  assert [record['status'] for record in found] == ['ok', 'failed', 'ok']
  assert events(out, 'begun') == ['a-0', 'killed-0', 'killed-0', 'b-0']
  assert len(files.read_jsonl(out / 'records.jsonl')) == 3
  assert 'killed seed=0' in capfd.readouterr().out


def test_kept_folders_lose_their_checkpoints(tmp_path, monkeypatch, capfd):
  from efft.sweep import job

  root = tmp_path / 'out'
  (run,) = study.load(of_arms(tmp_path, ['a'])).runs

  def make(run, given, folder):
    for name in ('checkpoints', 'stages/s1/checkpoints', 'bundle'):
      (folder / name).mkdir(parents=True)
    return {'arm': run.arm, 'config_hash': run.hash, 'status': 'ok'}

  for keep, left in ((True, {'bundle', 'stages'}), (False, None)):
    given = job.Job('mine', str(root), keep, (), study.SPLITS, [], [run], [0])
    assert job.Job.from_json(given.to_json()) == given
    assert job.carry_out(given, make) == 0
    (record,) = files.read_jsonl(root / 'records.jsonl')
    folder = root / 'runs' / run.name
    assert record['run'] == (f'runs/{run.name}' if keep else '')
    if left is None:
      assert not folder.exists()
    else:
      assert {path.name for path in folder.iterdir()} == left
      assert not list(folder.rglob('checkpoints'))
      # What was recorded meanwhile is not made, and what another process has is left to it.
      assert job.carry_out(given, lambda *_: 1 / 0) == 0
      with files.RunLock(root / 'locks' / run.name):
        assert job.carry_out(given, lambda *_: 1 / 0) == job.BUSY
    (root / 'records.jsonl').unlink()
    job.clean(folder, keep=False)


def test_a_sweep_leaves_what_another_is_making_anew(tmp_path, fake):
  """A failed run that another process tries again has a record, and a folder in use."""
  file, out = of_arms(tmp_path, ['crash']), tmp_path / 'out'
  assert ended(fake(file))[0] == 1
  (run,) = study.load(file).runs
  folder = out / 'runs' / run.name
  folder.mkdir(parents=True)
  with files.RunLock(out / 'locks' / run.name):
    assert ended(fake(file))[0] == 1 and folder.exists()
  assert ended(fake(file))[0] == 1 and not folder.exists(), 'left by a process that was killed'


@pytest.mark.skipif(not hasattr(os, 'sched_getaffinity'), reason='this system has no affinity')
def test_jobs_get_their_share_of_the_cores(tmp_path, fake):
  file, out = of_arms(tmp_path, ['a'], 2), tmp_path / 'out'
  assert ended(fake(file, '--jobs=2'))[0] == 0
  shares = [tuple(r['cores']) for r in files.read_jsonl(out / 'records.jsonl')]
  assert sorted(shares) == sorted(map(tuple, launch.shares(2)))


def test_dry_run_writes_nothing_and_needs_no_jax(tmp_path):
  file = of_arms(tmp_path, ['a', 'a', 'b'], 2)
  code = (
    'import sys; from efft import main; code = main.main(sys.argv[1:]); '
    'assert "jax" not in sys.modules; sys.exit(code)'
  )
  arguments = ['sweep', f'--study={file}', f'--workdir={tmp_path}/out', '--dry_run']
  done = subprocess.run([sys.executable, '-c', code, *arguments], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  lines = [line.split() for line in done.stdout.splitlines()[1:]]
  assert lines == [['to', 'do', 'sst2', arm, f'seed={seed}'] for arm in 'ab' for seed in range(2)]
  assert '2 runs are there more than once' in done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ['mine.py']


def test_summary_is_the_mean_of_the_reported_half():
  def record(arm, value, **more):
    metrics = {'validation': {'f1': 0.9}, 'report': {'f1': value}}
    return {'arm': arm, 'task': 't', 'status': 'ok', 'metric': 'f1', 'metrics': metrics} | more

  whole = {'metrics': {'validation': {'f1': 0.25}}}
  failed = {'arm': 'b', 'status': 'failed', 'error': 'no', 'config': {'task': {'name': 't'}}}
  found = show.summary(
    [record('a', 0.2), record('a', 0.4), record('a', None), record('b', 0, **whole), failed]
  )
  head, a, b, error = found.splitlines()
  assert head.split() == ['task', 'arm', 'runs', 'failed', 'mean', 'of']
  assert a.split() == ['t', 'a', '3', '0', '0.3000', 'f1,', 'report']
  assert b.split() == ['t', 'b', '2', '1', '0.2500', 'f1,', 'validation']
  assert error == 'b: failed: no'


def test_bad_overrides_name_the_study_not_the_caller(tmp_path):
  with pytest.raises(InputError, match='no readable file'):
    study.load(tmp_path / 'nothing.py')


def test_what_differs_in_numbers_is_one_job():
  def planned(arm, **fields):
    given = config.load('configs/lora.py:task=rotten_tomatoes')
    given.update_from_flattened_dict({name.replace('__', '.'): x for name, x in fields.items()})
    resolved = config.resolve(given)
    return study.Planned(arm, {}, resolved, config.config_hash(resolved), arm)

  def steps(arm, **fields):
    return planned(arm, **fields, train__steps=9, train__eval_steps=3)

  together = [planned('a', seed=1), planned('a', seed=2), planned('b', optim__lr=1e-4)]
  others = [
    planned('c', method__lora__rank=4),  # other shapes
    planned('d', task__fraction=0.5),  # another number of steps
    planned('e', task__name='sst2'),
    planned('f', train__batch_size=4),
  ]
  counted = [steps('g'), steps('g', task__fraction=0.5)]
  runs = [*together, *others, *counted]
  assert study.plan(runs) == [together, *([run] for run in others), counted]
  assert study.plan(runs, together=False) == [[run] for run in runs]
  many = [planned('a', seed=seed) for seed in range(20)]
  for jobs in (1, 2, 7):
    found = study.plan(many, jobs=jobs)
    assert [run for group in found for run in group] == many and len(found) >= jobs
    assert max(map(len, found)) <= alike.PLACES
