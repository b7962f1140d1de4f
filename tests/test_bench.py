"""`efft bench` as a command: its table, what it refuses, and what an interruption leaves."""

import io
import re

import pytest
from rich.console import Console
from test_bench_latency import made
from test_end_to_end import refuse

from efft import bundle, main, run
from efft.bench import latency, show

ROW = {
  'batch': 8, 'length': 128, 'precision': 'f32', 'p50_ms': 12.34, 'p95_ms': 13.0, 'p99_ms': 1500.5,
  'examples_per_second': 648.3, 'memory_mb': None, 'compile_seconds': 1.0, 'repeats': 5,
}  # fmt: skip


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bench') / 'lora'
  bundle.save(folder, made('lora'))
  return folder


def cells(out: str) -> list[list[str]]:
  """The rows of a table as rich draws it."""
  lines = [line for line in out.splitlines() if line.startswith('│')]
  return [[cell.strip() for cell in line.strip('│').split('│')] for line in lines]


def test_a_table_of_all_combinations(saved, capfd):
  flags = ['--batch=1,2', '--length=4', '--precision=f32,int8', '--seconds=0.001']
  assert main.main(['bench', f'--run={saved}', *flags]) == 0
  out, err = capfd.readouterr()
  found = cells(out)
  assert [row[:3] for row in found] == [[b, '4', p] for p in ('f32', 'int8') for b in '12']
  assert all(float(row[3]) <= float(row[4]) <= float(row[5]) for row in found)
  assert [int(n) for n in re.findall(r'^(\d+)/4: batch', err, re.M)] == [1, 2, 3, 4]


@pytest.mark.parametrize('flag, said', [
  ('--batch=0', '--batch: found 0, expected a whole number from 1'),
  ('--batch=1,,2', "--batch: found '', expected a whole number"),
  ('--batch=two', "--batch: found 'two', expected a whole number"),
  ('--length=8,25', '--length: found 25, expected at most 24, the positions of this encoder'),
  ('--precision=f32,bf61', "found 'bf61', expected one of f32, bf16, int8; did you mean bf16"),
  ('--seconds=0', '--seconds: found 0.0, expected a number above 0'),
  ('--seconds=nan', '--seconds: found nan, expected a number above 0'),
  ('--output=x.jsonl', 'found no config.json, expected the folder of a finished run'),
  ('--bach=1', 'did you mean --batch'),
])  # fmt: skip
def test_bad_flags_are_refused_in_a_line(saved, capsys, flag, said):
  assert said in refuse(capsys, 'bench', f'--run={saved}', flag)


def test_no_run_is_refused(tmp_path, capsys):
  assert 'expected a bundle' in refuse(capsys, 'bench', f'--run={tmp_path}')


def test_an_interruption_leaves_what_was_measured(saved, monkeypatch, capfd):
  def measure(*args, announce, **options):
    announce(3)
    yield {**ROW, 'note': 'slow here'}
    raise KeyboardInterrupt

  monkeypatch.setattr(latency, 'measure', measure)
  assert main.main(['bench', f'--run={saved}', '--length=4']) == 130
  out, err = capfd.readouterr()
  assert cells(out) == [['8', '128', 'f32', '12.34', '13', '1,500.5', '648.3', '-']]
  assert 'f32: slow here' in out and 'efft: interrupted' in err and 'Traceback' not in err


def test_the_function_gives_rows_as_they_come(saved):
  seen = []
  rows = run.bench(
    saved, batch=[1], length=[4], precision=['f32'], seconds=1e-3, on_row=seen.append
  )
  assert rows == seen and len(rows) == 1


def test_a_bar_on_a_terminal():
  text = io.StringIO()
  console = Console(file=text, force_terminal=True, width=120)
  with show.Bar(console) as bar:
    bar.announce(2)
    bar.row(ROW)
  assert '1/2' in text.getvalue() and 'batch 8, length 128, f32: 12.34 ms' in text.getvalue()
