"""What a person sees: a panel on a terminal, plain lines elsewhere, train.log always."""

import io
import logging
import math

import pytest
from rich.console import Console

from efft import progress
from efft.errors import EnvironmentProblem

log = logging.getLogger('efft.something')


def run(console, every):
  shown = progress.Progress(console, every)
  shown.start(10, 40)
  for step in 20, 30, 40:
    shown.update(step, loss=1 / step, rate=math.nan if step == 20 else 123.45)
    log.info('note %d', step)
  shown.stop()


def test_off_a_terminal_plain_lines_on_stderr_and_all_in_the_log(tmp_path, capsys):
  with progress.logs(tmp_path / 'train.log') as console:
    run(console, every=0)
    log.warning('careful')
  out, err = capsys.readouterr()
  assert out == ''
  lines = err.splitlines()
  assert lines[0].startswith('step 20/40, loss 0.0500, ... examples/s, 0:00 left')
  assert lines[2].startswith('step 30/40, loss 0.0333, 123.5 examples/s')
  assert lines[1] == 'note 20' and lines[-1] == 'warning: careful'
  written = (tmp_path / 'train.log').read_text().splitlines()
  assert len(written) == len(lines) and written[-1].endswith('WARNING careful')


def test_lines_come_every_few_seconds_and_at_the_end(capsys, monkeypatch):
  now = iter([0.0, 1.0, 6.0, 7.0])
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(now))
  with progress.logs() as console:
    run(console, every=5)
  steps = [line.split(',')[0] for line in capsys.readouterr().err.splitlines() if 'step' in line]
  assert steps == ['step 30/40', 'step 40/40']


def test_on_a_terminal_a_panel_with_messages_above_it(tmp_path):
  screen = io.StringIO()
  console = Console(file=screen, force_terminal=True, width=120)
  with progress.logs(tmp_path / 'train.log', console) as console:
    run(console, every=0)
  shown = screen.getvalue()
  assert '40/40' in shown and '123.5 examples/s' in shown and 'note 30' in shown
  assert 'left' not in shown  # the plain lines are for the file alone
  assert 'step 40/40' in (tmp_path / 'train.log').read_text()


def test_the_log_is_appended_to_and_handlers_go(tmp_path):
  root = logging.getLogger('efft')
  before = list(root.handlers), root.level, root.propagate
  for _ in range(2):
    with progress.logs(tmp_path / 'train.log'):
      log.info('hello')
  assert (tmp_path / 'train.log').read_text().count('hello') == 2
  assert (list(root.handlers), root.level, root.propagate) == before
  (tmp_path / 'file').write_text('')
  with pytest.raises(EnvironmentProblem), progress.logs(tmp_path / 'file' / 'train.log'):
    pass
  assert list(root.handlers) == before[0]


def test_clock():
  assert [progress.clock(s) for s in (0, 75, 4000)] == ['0:00', '1:15', '1:06:40']
