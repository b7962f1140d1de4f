"""Sinks: metrics.jsonl always, the optional ones without ever ending a run."""

import sys
import types

import pytest

from efft import files, trackers
from efft.errors import InputError

RECORDS = [
  {'event': 'train', 'step': 1, 'loss': 0.5, 'time': 1.0},
  {'event': 'eval', 'step': 1, 'accuracy': 0.7, 'best': True, 'time': 2.0},
  {'event': 'train', 'step': 2, 'loss': 0.4, 'time': 3.0},
]


def use(workdir, names, step=0, records=RECORDS):
  sinks = trackers.make(workdir, names, {'seed': 1})
  for sink in sinks:
    sink.resume(step)
    sink.write(records)
    sink.sync()
    sink.close()


def test_jsonl_drops_what_comes_after_the_resumed_step(tmp_path, caplog):
  caplog.set_level('INFO')
  use(tmp_path, ())
  use(tmp_path, (), step=1, records=RECORDS[2:])
  assert files.read_jsonl(tmp_path / 'metrics.jsonl') == RECORDS
  assert 'dropped 1 records after step 1' in caplog.text


def test_tensorboard_gets_every_number(tmp_path):
  pytest.importorskip('tensorboardX')
  use(tmp_path, ('tensorboard',))
  data = b''.join(p.read_bytes() for p in (tmp_path / 'tensorboard').iterdir())
  assert b'train/loss' in data and b'eval/accuracy' in data


@pytest.mark.parametrize('module', [None, types.ModuleType('broken')])
def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(tmp_path, caplog, monkeypatch, module):
  """`None` in sys.modules is a missing package; an empty module fails at its first use."""
  monkeypatch.setitem(sys.modules, 'wandb', module)
  monkeypatch.setitem(sys.modules, 'tensorboardX', module)
  use(tmp_path, ('wandb', 'tensorboard'))
  assert [r.getMessage().split(' for ')[0] for r in caplog.records] == [
    'wandb is off',
    'tensorboard is off',
  ]
  assert ("pip install -e '.[wandb]'" in caplog.text) == (module is None)
  assert files.read_jsonl(tmp_path / 'metrics.jsonl') == RECORDS


def test_a_missing_login_is_said_instead_of_asked_for(tmp_path, caplog, monkeypatch):
  monkeypatch.delenv('WANDB_MODE', raising=False)
  monkeypatch.setitem(
    sys.modules, 'wandb', types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
  )
  use(tmp_path, ('wandb',))
  assert caplog.text.count('wandb is off for this run: no login') == 1


def test_wandb_continues_its_run(tmp_path, monkeypatch):
  calls = []
  run = types.SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: None)
  fake = types.SimpleNamespace(
    api=types.SimpleNamespace(api_key='x'), init=lambda **k: calls.append(k['id']) or run
  )
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  use(tmp_path, ('wandb',))
  use(tmp_path, ('wandb',), step=2, records=[])
  assert calls[0] == calls[-1]
  assert calls[1] == (({'train/loss': 0.5},), {'step': 1})


def test_an_unknown_tracker_is_refused(tmp_path):
  with pytest.raises(InputError, match="found 'mlflow', expected 'tensorboard' or 'wandb'"):
    trackers.make(tmp_path, ('mlflow',))
