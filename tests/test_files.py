"""Publishing, records and locks, with the failures a disk and a crash bring."""

import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap

import disk
import numpy as np
import pytest

from efft import files
from efft.errors import EnvironmentProblem, InputError


def names(folder):
  return sorted(entry.name for entry in folder.iterdir())


def test_atomic_write_replaces_and_follows_the_umask(tmp_path):
  path = tmp_path / 'a.json'
  before = os.umask(0o027)
  try:
    files.atomic_write(path, 'one')
    files.atomic_write(path, b'two')
  finally:
    os.umask(before)
  assert path.read_bytes() == b'two'
  assert stat.S_IMODE(path.stat().st_mode) == 0o640
  assert names(tmp_path) == ['a.json']


def test_atomic_write_follows_a_link_and_refuses_special_files(tmp_path):
  (tmp_path / 'link').symlink_to(tmp_path / 'target')
  files.atomic_write(tmp_path / 'link', 'x')
  assert (tmp_path / 'link').is_symlink() and (tmp_path / 'target').read_text() == 'x'
  os.mkfifo(tmp_path / 'pipe')
  for path, kind in (
    (tmp_path / 'pipe', 'a pipe'),
    ('/dev/null', 'a device'),
    (tmp_path, 'a folder'),
  ):
    with pytest.raises(InputError, match=f'found {kind}'):
      files.atomic_write(path, 'x')
  assert stat.S_ISCHR(os.stat('/dev/null').st_mode)


def test_a_full_disk_leaves_the_old_content_and_no_litter(tmp_path):
  path = tmp_path / 'a'
  log = tmp_path / 'log.jsonl'
  with disk.full(8192):
    files.atomic_write(path, 'old')
    with pytest.raises(EnvironmentProblem, match='cannot write: File too large'):
      files.atomic_write(path, b'x' * 9000)
    assert path.read_text() == 'old' and names(tmp_path) == ['a']

    with pytest.raises(EnvironmentProblem), files.atomic_folder(tmp_path / 'b') as temp:
      (temp / 'big').write_bytes(b'x' * 9000)
    assert names(tmp_path) == ['a']

    files.append_jsonl(log, {'n': 1})
    with pytest.raises(EnvironmentProblem, match='log.jsonl'):
      files.append_jsonl(log, {'text': 'x' * 9000})
    files.append_jsonl(log, {'n': 2})
  assert files.read_jsonl(log) == [{'n': 1}, {'n': 2}]


def test_a_path_below_a_file_is_the_machines_problem(tmp_path):
  (tmp_path / 'file').write_text('')
  below = tmp_path / 'file' / 'a'
  with pytest.raises(EnvironmentProblem, match='Not a directory'):
    files.atomic_write(below, 'x')
  with pytest.raises(EnvironmentProblem):
    files.append_jsonl(below, {})
  with pytest.raises(EnvironmentProblem), files.atomic_folder(below):
    pass
  with pytest.raises(EnvironmentProblem), files.RunLock(below):
    pass


def test_atomic_folder_replaces_whole_or_not_at_all(tmp_path):
  target = tmp_path / 'bundle'
  for text in 'one', 'two':
    with files.atomic_folder(target) as temp:
      (temp / 'sub').mkdir()
      (temp / 'sub' / 'a').write_text(text)
  assert (target / 'sub' / 'a').read_text() == 'two' and names(tmp_path) == ['bundle']
  with pytest.raises(RuntimeError), files.atomic_folder(target) as temp:
    (temp / 'a').write_text('half')
    raise RuntimeError
  assert (target / 'sub' / 'a').read_text() == 'two' and names(tmp_path) == ['bundle']
  (tmp_path / 'file').write_text('')
  with pytest.raises(InputError, match='found a file'), files.atomic_folder(tmp_path / 'file'):
    pass


def test_jsonl_ends_a_torn_line_and_readers_skip_it(tmp_path, caplog):
  path = tmp_path / 'm.jsonl'
  path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
  files.append_jsonl(path, {'step': 3, 'loss': float('nan'), 'x': np.float32('inf')}, {'step': 4})
  assert path.read_bytes().endswith(b'{"step": 3, "loss": null, "x": null}\n{"step": 4}\n')
  assert [record['step'] for record in files.read_jsonl(path)] == [1, 3, 4]
  assert f'{path}:2' in caplog.text


def test_keep_jsonl_keeps_lines_byte_for_byte(tmp_path):
  path = tmp_path / 'm.jsonl'
  assert files.keep_jsonl(path, bool) == []
  path.write_bytes(b'{"step":1,  "a":1.0}\n{"step": 2}\n{"ste\n{"step": 3}\n{"step": 9}')
  kept = files.keep_jsonl(path, lambda record: record['step'] != 2)
  assert path.read_bytes() == b'{"step":1,  "a":1.0}\n{"step": 3}\n{"step": 9}\n'
  assert [record['step'] for record in kept] == [1, 3, 9]


def _append(path, who):
  for i in range(20):
    files.append_jsonl(path, {'who': who, 'i': i, 'text': 'x' * 5000 * (i % 3)})


def test_long_appends_of_several_processes_stay_whole(tmp_path):
  path = tmp_path / 'm.jsonl'
  context = multiprocessing.get_context('spawn')
  workers = [context.Process(target=_append, args=(path, who)) for who in range(3)]
  for worker in workers:
    worker.start()
  for worker in workers:
    worker.join()
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert sorted((r['who'], r['i']) for r in lines) == [(w, i) for w in range(3) for i in range(20)]


def test_json_takes_numpy_and_paths_and_never_writes_nan(tmp_path):
  value = {'a': np.float32(0.5), 'b': (np.arange(2), tmp_path), 'c': {1: -np.inf}, 'd': True}
  assert json.loads(files.to_json(value)) == {
    'a': 0.5,
    'b': [[0, 1], str(tmp_path)],
    'c': {'1': None},
    'd': True,
  }


def test_damage_names_the_file(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'sub' / 'a').write_bytes(b'abc')
  (tmp_path / 'b').write_bytes(b'abc')
  recorded = files.digests(tmp_path, skip=('b',))
  assert list(recorded) == ['sub/a'] and files.damage(tmp_path, recorded) == ''
  (tmp_path / 'sub' / 'a').write_bytes(b'abb')
  assert 'sub/a is not the file' in files.damage(tmp_path, recorded)
  (tmp_path / 'sub' / 'a').unlink()
  assert files.damage(tmp_path, recorded) == 'sub/a is missing'


def test_the_second_run_is_refused_and_a_killed_one_frees_its_folder(tmp_path):
  workdir = tmp_path / 'run'
  holder = subprocess.Popen(
    [
      sys.executable,
      '-c',
      textwrap.dedent(f"""
        import time
        from efft import files
        with files.RunLock({str(workdir)!r}):
          print('held', flush=True)
          time.sleep(60)
      """),
    ],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    assert holder.stdout.readline() == 'held\n'
    with pytest.raises(InputError, match=rf'host .*, pid {holder.pid}, started 20') as error:
      files.RunLock(workdir).__enter__()
    assert error.value.exit_code == 2
    (workdir / '.efft-tmp-0').write_text('what the killed run left')
  finally:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
  with files.RunLock(workdir):
    assert names(workdir) == ['.lock']
  with files.RunLock(workdir):
    pass
