"""Reading records, and the folder that a report is."""

import csv
import io
import json
import math
import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import records as make

from efft import files
from efft.errors import EnvironmentProblem, InputError
from efft.main import main
from efft.report import costs, naming, page, plots, publish, records, tables

EVIL = '<script>alert("x")</script> | `a` & _b_ * [c]\nd'


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  made = make.study(seeds=range(4), fractions=(0.1, 1.0), arms=('full', 'lora', 'head'))
  made.append(make.failure('lora', 7, error=EVIL))
  made += [make.record(EVIL, seed, 0.5, task='sst2') for seed in range(4)]
  return make.write(tmp_path_factory.mktemp('runs'), made).parent


@pytest.fixture(scope='module')
def report(runs, tmp_path_factory):
  """(folder, what `report` returned)."""
  folder = tmp_path_factory.mktemp('reports') / 'report'
  before = make.study(('full', 'houlsby'), ('sst2',), range(3), (1e-3,))
  old = make.write(tmp_path_factory.mktemp('old'), before)
  return folder, publish.report(runs, folder, against=old, title=EVIL)


# Records


def test_rows_are_tidy_and_latency_is_exploded(tmp_path):
  made = [make.record('lora', 0), make.record('pruned + int8', 1), make.failure('full', 2)]
  found = records.read(make.write(tmp_path, made))
  row = found.table.iloc[0]
  assert (row['arm'], row['seed'], row['task'], row['fraction']) == ('lora', 0, 'sst2', 1.0)
  assert row['metrics.report.accuracy'] == made[0]['metrics']['report']['accuracy']
  assert row['parameters.trained'] == 74_000 and row['device.cpu'] == 'Some CPU'
  assert not [n for n in found.table if n.startswith(('config.', 'device.versions'))]
  assert list(found.failed['error']) == ['out of memory'] and found.failed.index[0] == 2
  assert len(found.latency) == 4 + 3
  first = found.latency.iloc[0]
  assert (first['arm'], first['batch'], first['length'], first['p50_ms']) == ('lora', 1, 32, 4.0)
  # A float run that was also timed in int8 was not scored in int8.
  assert row['latency.1x128.p50_ms'] == 10 and found.table.iloc[1]['latency.1x128.p50_ms'] == 3


@pytest.mark.parametrize('path', ['{0}/a,{0}/b', '{0}', '{0}/a/records.jsonl,{0}/b,{0}/a'])
def test_folders_files_and_parents_are_read(tmp_path, path):
  make.write(tmp_path / 'a', [make.record(seed=0)])
  make.write(tmp_path / 'b', [make.record(seed=1), make.record(seed=2)])
  found = records.read(path.format(tmp_path))
  assert sorted(found.table['seed']) == [0, 1, 2] and found.notes == []
  assert {folder.name for folder in found.folders} == {'a', 'b'}


def test_the_last_record_of_a_run_counts(tmp_path):
  made = [make.failure(seed=0), make.record(seed=1, value=0.1), make.record(seed=0, value=0.9)]
  made.append(make.record(seed=1, value=0.8))
  found = records.read(make.write(tmp_path, made))
  assert dict(zip(found.table['seed'], found.table['metrics.report.accuracy'], strict=True)) == {
    0: 0.9, 1: 0.8,
  }  # fmt: skip
  assert found.failed.empty and '2 of 4 records' in found.notes[0]


def test_unknown_keys_do_no_harm_and_torn_lines_are_skipped(tmp_path, caplog):
  path = make.write(tmp_path, [make.record(seed=0, new={'deep': [1, {'a': 2}]})])
  with open(path, 'a') as file:
    file.write('{"schema": 1, "arm": "lo')
  found = records.read(path)
  assert len(found.table) == 1 and found.table.iloc[0]['new.deep'] == '[1, {"a": 2}]'
  assert 'skipped a line' in caplog.text


@pytest.mark.parametrize(
  'changes, what',
  [
    ({'arm': ...}, 'record 2, arm: found nothing, expected a string'),
    ({'seed': 'one'}, "record 2, seed: found 'one', expected a whole number"),
    ({'metric': ...}, 'record 2, metric: found nothing'),
    ({'schema': 2}, 'record 2: found schema 2, expected 1'),
    ({'schema': ...}, 'record 2: found no schema'),
    ({'metric': 'f1'}, r'task sst2: found records scored by accuracy .*, f1'),
  ],
)
def test_records_that_cannot_be_read_are_named(tmp_path, changes, what):
  wrong = {key: value for key, value in (make.record() | changes).items() if value is not ...}
  path = make.write(tmp_path, [make.record(seed=1), wrong])
  with pytest.raises(InputError, match=what):
    records.read(path)


def test_nothing_to_read_is_refused(tmp_path):
  for path in (tmp_path, tmp_path / 'none', ','):
    with pytest.raises(InputError, match='--runs'):
      records.read(path)
  (tmp_path / 'records.jsonl').write_text('\n')
  with pytest.raises(InputError, match='no record'):
    records.read(tmp_path)


def test_later_benches_count_for_the_runs_of_a_study(tmp_path):
  made = [make.record('lora', seed, latency=[]) for seed in range(3)]
  bench = make.record(
    'lora.lora', 1, study='', overrides={}, config_hash=made[1]['config_hash'],
    latency=[make.latency(1, 128, 7.5)], device={'cpu': 'Another CPU'},
  )  # fmt: skip
  found = records.read(make.write(tmp_path, [*made, bench]))
  assert list(found.table['arm']) == ['lora'] * 3
  times = found.table['latency.1x128.p50_ms'].tolist()
  assert times[1] == 7.5 and math.isnan(times[0]) and math.isnan(times[2])
  notes = ' '.join(found.notes)
  assert 'efft bench' in notes and 'measured on' not in notes, 'all times are of one machine'


def test_a_later_time_of_a_shape_replaces_the_earlier_one(tmp_path):
  made = make.record('lora', 0, latency=[make.latency(1, 128, 10.0), make.latency(8, 128, 50.0)])
  merged = make.latency(8, 128, 40.0) | {'merged': True}
  bench = make.record(
    'lora.lora', 0, study='', overrides={}, config_hash=made['config_hash'],
    latency=[make.latency(1, 128, 4.0), merged], device={'cpu': 'Another CPU'},
  )  # fmt: skip
  found = records.read(make.write(tmp_path, [made, bench]))
  row = found.table.iloc[0]
  assert (row['latency.1x128.p50_ms'], row['latency.8x128.p50_ms']) == (4.0, 50.0)
  assert 'measured on 2 machines' in ' '.join(found.notes)
  times = publish.contents(found)
  (table,) = (t for t in times.tables if t.name == 'latency')
  shown = {(r['batch'], r['merged']): r['p50_ms'] for r in table.rows}
  assert shown == {(1, 'beside'): 4.0, (8, 'beside'): 50.0, (8, 'merged'): 40.0}


@pytest.mark.parametrize('unmeasured', ['a task', 'the whole data'])
def test_what_was_measured_of_some_runs_only_is_drawn_of_those(tmp_path, unmeasured):
  made = make.study(('full', 'lora'), seeds=range(2), rates=(1e-3,), fractions=(0.5, 1.0))
  for record in made:
    whole = record['config']['task']['fraction'] == 1
    if (record['task'] == 'mrpc') if unmeasured == 'a task' else whole:
      record['latency'] = []
  content = publish.contents(records.read(make.write(tmp_path, made)))
  timed = {p['task'] for p in content.points if p['axis'].startswith('latency')}
  assert timed == ({'sst2'} if unmeasured == 'a task' else set())
  assert {p['task'] for p in content.points if p['axis'] == 'trained'} == {'sst2', 'mrpc'}
  assert any(name.startswith('latency') for name in content.specs) == bool(timed)


def test_what_makes_runs_hard_to_compare_is_said(tmp_path):
  made = [make.record(seed=0), make.record('head', 0, data={'sha256': 'other'})]
  made += [make.record('lora', 0, device={'cpu': 'Another CPU', 'devices': '1 x gpu'})]
  notes = ' '.join(records.read(make.write(tmp_path, made)).notes)
  assert 'seen different data' in notes and 'Latency was measured on 2 machines' in notes


# Settings


def test_settings_are_overrides_but_the_seed():
  made = [
    make.record(seed=s, overrides={'optim.lr': lr, 'seed': s, 'task.fraction': 0.1})
    for lr in (0.1, 0.2) for s in range(2)
  ]  # fmt: skip
  assert naming.settings(['a'] * 4, made) == ['optim.lr=0.1'] * 2 + ['optim.lr=0.2'] * 2
  # A field that there was not when the others were made stands at its default.
  made[1]['config'] = made[1]['config'] | {'train': {'consistency': 0.0}}
  assert naming.settings(['a'] * 4, made) == ['optim.lr=0.1'] * 2 + ['optim.lr=0.2'] * 2


def test_what_all_arms_share_is_no_name_of_a_setting():
  made = [
    make.record(arm, 0, overrides={'optim.lr': lr, 'train.steps': 40, **more})
    for arm, more in (('lora', {'method.lora.rank': 2}), ('full', {})) for lr in (0.1, 0.2)
  ]  # fmt: skip
  names = naming.settings(['lora', 'lora', 'full', 'full'], made)
  assert names[1:3] == ['method.lora.rank=2, optim.lr=0.2', 'optim.lr=0.1']
  assert naming.settings(['one'] * 4, made)[3] == 'optim.lr=0.2, train.steps=40'


def test_runs_by_hand_are_told_apart_by_their_configs():
  made = [make.record(seed=s, study='', overrides={}) for s in range(4)]
  for record, lr in zip(made, (0.1, 0.1, 0.2, 0.2), strict=True):
    record['config'] = {
      'seed': record['seed'], 'optim': {'lr': lr, 'clip': 1.0}, 'train': {'log_every': lr},
    }  # fmt: skip
  made.append(make.failure(seed=4, config=None, overrides={}))
  names = naming.settings(['a'] * 5, made)
  assert names == ['optim.lr=0.1'] * 2 + ['optim.lr=0.2'] * 2 + ['']
  assert naming.settings(['a', 'a', 'b', 'b', 'b'], made)[:4] == [''] * 4


def test_runs_by_hand_beside_a_sweep_keep_their_own_rates():
  made = [make.record(overrides={'optim.lr': 0.1}), make.record(study='', overrides={})]
  made.append(make.record(study='', overrides={}))
  for record, lr in zip(made, (0.1, 0.1, 0.2), strict=True):
    record['config'] = {'seed': 0, 'optim': {'lr': lr}}
  assert naming.settings(['a'] * 3, made) == ['optim.lr=0.1'] * 2 + ['optim.lr=0.2']


def test_a_path_that_follows_the_seed_is_no_hyper_parameter():
  made = [
    make.record(seed=s, overrides={'seed': s, 'optim.lr': lr, 'distil.teacher': f'runs/full-{s}'})
    for s in range(2) for lr in (0.1, 0.2)
  ]  # fmt: skip
  assert naming.settings(['a'] * 4, made) == ['optim.lr=0.1', 'optim.lr=0.2'] * 2
  for record in made:
    record['overrides']['distil.teacher'] = f'runs/{record["overrides"]["optim.lr"]}'
  assert 'distil.teacher=runs/0.1' in naming.settings(['a'] * 4, made)[0]


# The folder


def test_the_folder_holds_what_it_says(report):
  folder, found = report
  names = {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}
  pictures = {f'{cost}.{form}' for cost in ('trained', 'latency_1x128', 'memory_step', 'bundle',
              'whole', 'seconds', 'data') for form in ('png', 'svg')}  # fmt: skip
  varied = pictures - {'whole.png', 'whole.svg'}  # all arms have one size
  assert names == {'report.md', 'summary.csv', 'runs.csv', 'index.html'} | {
    f'plots/{name}' for name in varied
  }
  assert found['runs'] == 101 and found['failed'] == 1 and found['arms'] == 4
  assert found['baseline'] == 'full' and found['tasks'] == ['mrpc', 'sst2']
  assert (folder / 'plots' / 'trained.png').read_bytes()[:8] == b'\x89PNG\r\n\x1a\n'
  assert '<svg' in (folder / 'plots' / 'trained.svg').read_text()


def test_the_same_records_give_the_same_bytes(runs, report, tmp_path):
  folder, _ = report
  again = tmp_path / 'again'
  publish.report(runs, again, title=EVIL)
  once = files.digests(again)
  publish.report(runs, again, title=EVIL)
  assert files.digests(again) == once
  known = files.digests(folder)
  assert all(known[name] == once[name] for name in once if name.startswith('plots/'))
  assert known['runs.csv'] == once['runs.csv'] and known['summary.csv'] == once['summary.csv']


def test_csv_files_hold_the_records(runs, report):
  folder, _ = report
  made = files.read_jsonl(runs / 'records.jsonl')
  rows = list(csv.DictReader(io.StringIO((folder / 'runs.csv').read_text())))
  assert [(r['arm'], int(r['seed']), r['status']) for r in rows] == [
    (m['arm'], m['seed'], m['status']) for m in made
  ]
  for row, record in zip(rows, made, strict=True):
    if record['status'] == 'ok':
      value = record['metrics']['report']['accuracy']
      assert float(row['metrics.report.accuracy']) == value
      assert row['parameters.trained'] == str(record['parameters']['trained'])
    else:
      assert row['metrics.report.accuracy'] == ''
  summary = list(csv.DictReader(io.StringIO((folder / 'summary.csv').read_text())))
  for row in summary:
    values = [float(pair.partition(':')[2]) for pair in row['values'].split()]
    assert float(row['mean']) == pytest.approx(np.mean(values)) and int(row['n']) == len(values)


def test_markdown_is_one_table_row_a_line_whatever_arms_are_called(report):
  text = (report[0] / 'report.md').read_text()
  for block in text.split('\n\n'):
    lines = block.strip().splitlines()
    if lines and lines[0].startswith('| '):
      bare = [line.replace('\\|', '') for line in lines]
      assert len({line.count('|') for line in bare}) == 1
  assert '<script' not in text and text.count('\n# ') == 0 and text.startswith('# &lt;script')
  for title in ('Scores', 'What changed', 'Against full', 'Costs', 'Fronts', 'Latency', 'Failed'):
    assert f'\n## {title}' in text


def test_the_page_ends_no_element_early_and_fetches_nothing(report):
  text = (report[0] / 'index.html').read_text()
  assert '<script>alert' not in text and text.count('</script>') == 3
  assert text.count('<script') == 3 and text.count('<style>') == 1
  before, data = text.split('<script type="application/json" id="data">')
  loaded = json.loads(data.split('</script>')[0])
  assert EVIL in {point['arm'] for point in loaded['points']}
  assert "default-src 'none'" in before
  assert not [tag for tag in ('<link rel="stylesheet', '<img', 'src="') if tag in before]


def test_points_are_the_means_of_the_largest_share(runs, report):
  content = publish.contents(records.read(runs))
  whole = content.rows[content.rows['fraction'] == 1].set_index(['task', 'arm'])
  seen = set()
  for point in content.points:
    row = whole.loc[(point['task'], point['arm'])]
    cost = next(axis for axis in content.axes if axis.name == point['axis'])
    assert point['y'] == row['mean'] and point['x'] == row[cost.column] * cost.scale
    assert point['low'] <= point['y'] <= point['high']
    seen.add((point['task'], point['arm'], point['axis']))
  assert len(seen) == len(whole) * len(content.axes) == len(content.points)
  tried = {row['arm']: row for row in content.curves['data']['values'] if row['task'] == 'sst2'}
  assert tried.keys() == {'full', 'lora', 'head'}, 'one share is no curve'


def test_an_earlier_report_is_replaced_and_nothing_else(runs, report, tmp_path):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'thesis.tex').write_text('x')
  for output in (tmp_path / 'mine', runs):
    with pytest.raises(InputError, match='something else'):
      publish.report(runs, output)
  assert (tmp_path / 'mine' / 'thesis.tex').read_text() == 'x'
  with pytest.raises(InputError, match='(?s)unknown arm .*; name an arm of the records'):
    publish.report(runs, tmp_path / 'new', baseline='nobody')
  assert not (tmp_path / 'new').exists()


def test_without_vl_convert_the_error_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, 'vl_convert', None)
  with pytest.raises(EnvironmentProblem, match=re.escape("pip install -e '.[report]'")):
    plots.vl_convert()


def test_one_bare_record_makes_a_report(tmp_path):
  bare = {
    'schema': 1, 'arm': 'full', 'task': 'mine.csv', 'metric': 'accuracy', 'seed': 0,
    'status': 'ok', 'metrics': {'validation': {'accuracy': 0.5}},
  }  # fmt: skip
  publish.report(make.write(tmp_path, [bare]), tmp_path / 'report')
  assert 'share their data' in (tmp_path / 'report' / 'report.md').read_text()
  assert not list((tmp_path / 'report' / 'plots').iterdir())


def test_the_command_line_needs_no_jax(tmp_path):
  runs = make.write(tmp_path, [make.record('lora'), make.record('full')])
  code = 'import sys; from efft.main import main; print(main(sys.argv[1:]), "jax" in sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', code, 'report', f'--runs={runs}', f'--output={tmp_path}/r'],
    capture_output=True, text=True, env=dict(os.environ),
  )  # fmt: skip
  assert done.stdout.splitlines()[-1] == '0 False', done.stderr
  assert f'{tmp_path}/r/index.html' in done.stdout
  assert (tmp_path / 'r' / 'index.html').exists()


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
  assert main(['report', f'--runs={tmp_path}', f'--output={tmp_path}/r']) == 2
  out, err = capsys.readouterr()
  assert out == '' and err.count('\n') == 1 and 'a folder without records' in err


# Pieces


def test_axes_are_spaced_by_what_they_span():
  assert plots.scale([1, 5, 19]) == 'linear'
  assert plots.scale([1, 20]) == 'log' and plots.scale([0, 1, 20]) == 'symlog'
  assert plots.scale([0, 0]) == 'linear'
  assert plots.ticks([770, 22e6]) == [10.0**n for n in range(2, 9)]
  assert plots.ticks([0.5, 20]) == [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500]


def test_the_shape_that_stands_for_all():
  def table(*shapes):
    return pd.DataFrame({records.shape_column(*shape): [1.0] for shape in shapes})

  assert costs.usual_shape(table((8, 128), (1, 128), (1, 512))) == (1, 128)
  assert costs.usual_shape(table((8, 64), (2, 32), (2, 64))) == (2, 64)
  assert costs.usual_shape(table()) is None


@pytest.mark.parametrize(
  'x, text',
  [(0, '0.00'), (0.01234, '0.0123'), (3.14159, '3.14'), (1234.5, '1,234')],
)
def test_amounts_have_three_digits(x, text):
  assert tables.amount(x) == text


def test_what_stands_inside_a_script_cannot_end_it():
  value = {'a': '</script><!--', 'b': '\u2028'}
  text = page._json(value)
  assert json.loads(text) == value and '<' not in text and '\u2028' not in text
