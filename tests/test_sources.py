"""From the user's file, folder or a hub name to a checked data set."""

import csv
import json
import os
import subprocess
import sys
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from efft import data
from efft.data import columns, splits, tables
from efft.errors import EnvironmentProblem, InputError


def write(path, rows, header=('text', 'label')):
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'w', newline='', encoding='utf-8') as file:
    csv.writer(file, delimiter='\t' if path.suffix == '.tsv' else ',').writerows([header, *rows])
  return path


def reviews(n, start=0):
  return [(f'text {i + start}', 'good' if i % 3 else 'bad') for i in range(n)]


def folder(tmp_path, **more):
  parts = {'train': reviews(20), 'validation': reviews(6, 100), 'test': reviews(6, 200)} | more
  for split, rows in parts.items():
    if rows is not None:
      write(tmp_path / f'{split}.csv', rows)
  return str(tmp_path)


# A single file.


def test_a_single_file_is_split_and_says_so(tmp_path):
  path = write(tmp_path / 'reviews.csv', reviews(100))
  found = data.load(str(path))
  assert {split: len(part) for split, part in found.splits.items()} == {
    'train': 80,
    'validation': 10,
    'test': 10,
  }
  assert (found.labels, found.kind, found.metrics, found.num_labels) == (
    ('bad', 'good'),
    'single',
    ('accuracy', 'f1_macro', 'ece'),
    2,
  )
  assert found.columns == {'text': 'text', 'label': 'label'}
  assert any(
    'train 80, validation 10, test 10' in note and 'split_seed 0' in note for note in found.notes
  )
  assert found.samples[0]['row'] == found.splits['train'].rows[0] and len(found.samples) == 3
  lines = path.read_text().splitlines()
  for part in found.splits.values():
    for text, label, row in zip(part.texts, part.labels, part.rows, strict=True):
      assert lines[row - 1] == f'{text},{found.labels[label]}'
    assert abs(np.mean(part.labels == 0) - 0.34) < 0.1


def test_the_split_follows_split_seed_alone(tmp_path):
  path = str(write(tmp_path / 'x.csv', reviews(100)))
  first, same, other = data.load(path), data.load(path, seed=7), data.load(path, split_seed=7)
  assert first.splits['test'].texts == same.splits['test'].texts != other.splits['test'].texts


def test_equal_texts_stay_in_one_part(tmp_path):
  rows = [(f'text {i % 25}', 'good' if i % 25 % 2 else 'bad') for i in range(100)]
  found = data.load(str(write(tmp_path / 'x.csv', rows)))
  assert found.leakage == {'validation': 0, 'test': 0}


def test_too_few_rows_to_split(tmp_path):
  path = write(tmp_path / 'x.csv', [('a', '0'), ('b', '1'), ('c', '1')])
  with pytest.raises(InputError, match='set validation=FILE'):
    data.load(str(path))


@hypothesis.given(
  st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3)), min_size=1, max_size=120),
  st.integers(0, 5),
)
@hypothesis.settings(deadline=None, max_examples=60)
def test_carving_is_a_partition_that_keeps_classes_and_groups(rows, seed):
  keys = [key for key, _ in rows]
  labels = np.asarray([dict(rows)[key] for key in keys], np.int32)
  parts = splits.carve(keys, labels, [0.1, 0.1], seed)
  assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
  assert set(labels[parts[0]]) == set(labels)
  owners = [{keys[i] for i in part} for part in parts]
  assert sum(map(len, owners)) == len(set(keys))
  if len(set(keys)) >= len(set(labels)) + 2:
    assert all(len(part) for part in parts)
  # Equal texts of different labels, too.
  labels = np.asarray([label for _, label in rows], np.int32)
  parts = splits.carve(keys, labels, [0.1, 0.1], seed)
  assert sorted(np.concatenate(parts).tolist()) == list(range(len(rows)))
  assert set(labels[parts[0]]) == set(labels)


def test_a_class_that_only_equal_texts_have_stays_in_training():
  for seed in range(8):
    keys, labels = [*range(10), 5], np.asarray([0] * 10 + [1], np.int32)
    parts = splits.carve(keys, labels, [0.1, 0.1], seed)
    assert set(labels[parts[0]]) == {0, 1} and all(len(part) for part in parts)


def test_carving_multi_labels_keeps_every_class_in_training():
  labels = np.eye(8, dtype=np.float32)[np.arange(40) % 8 * (np.arange(40) < 8)]
  kept, part = splits.carve(list(range(40)), labels, [0.1], 0)
  assert labels[kept].any(0).all() and len(part) == 4


# Folders and files for splits.


@pytest.mark.parametrize(
  'names',
  [
    ('train', 'validation', 'test'),
    ('training', 'dev', 'testing'),
    ('train_v2', 'valid', 'test-a'),
  ],
)
def test_a_folder_is_its_files(tmp_path, names):
  for name, rows in zip(names, (reviews(9), reviews(6, 50), reviews(6, 90)), strict=True):
    write(tmp_path / f'{name}.tsv', rows)
  write(tmp_path / 'testimonials.csv', reviews(3))
  found = data.load(str(tmp_path))
  assert {split: len(part) for split, part in found.splits.items()} == {
    'train': 9,
    'validation': 6,
    'test': 6,
  }


def test_numbered_parts_are_one_split(tmp_path):
  for i in range(2):
    write(tmp_path / f'data/train-0000{i}-of-00002.csv', reviews(10, 10 * i))
  found = data.load(str(tmp_path))
  assert sum(map(len, found.splits.values())) == 20


def test_parts_of_a_csv_are_read_as_one_csv(tmp_path):
  for i in range(2):
    rows = [(f'text {i} {j}', j / 7) for j in range(20)]
    write(tmp_path / f'train-0000{i}-of-00002.csv', rows)
  assert data.load(str(tmp_path)).kind == 'regression'
  write(tmp_path / 'train-00001-of-00002.csv', [('', 1.5)])
  with pytest.raises(InputError, match='no text'):
    data.load(str(tmp_path))
  write(tmp_path / 'train-00001-of-00002.csv', [('a', 1.5), (), ('b', 2.5)])
  assert any('1 blank lines skipped' in note for note in data.load(str(tmp_path)).notes)


@pytest.mark.parametrize('seed', range(6))
def test_what_a_file_holds_does_not_hang_on_how_it_is_carved(tmp_path, seed):
  """One rare value more or less in training makes no classes of amounts."""
  rows = [(f'text {i}', 0.5 * (i % 9 + 2)) for i in range(60)] + [('rare', 0.5)]
  found = data.load(str(write(tmp_path / 'stars.csv', rows)), split_seed=seed)
  assert found.kind == 'regression' and sum('regression' in note for note in found.notes) == 1


def test_a_file_without_a_header(tmp_path):
  rows = [(f'{text}, or so it said', label) for text, label in reviews(60)]
  path = write(tmp_path / 'x.csv', rows, ('I really liked it', 'good'))
  with pytest.raises(InputError, match='header line.*label=good'):
    data.load(str(path))
  assert data.load(str(path), label='good').columns['label'] == 'good'


def test_a_folder_without_validation_lends_a_tenth_of_training(tmp_path):
  found = data.load(folder(tmp_path, validation=None))
  assert {split: len(part) for split, part in found.splits.items()} == {
    'train': 18,
    'validation': 2,
    'test': 6,
  }


def test_files_for_splits(tmp_path):
  train, dev = write(tmp_path / 'a.csv', reviews(9)), write(tmp_path / 'b.csv', reviews(6, 50))
  found = data.load(str(train), validation=str(dev))
  assert list(found.splits) == ['train', 'validation']
  found = data.load(folder(tmp_path / 'c'), validation=str(dev), test='validation.csv')
  assert found.splits['validation'].file == str(dev) and found.splits['test'].texts[0] == 'text 100'


def test_a_named_task_over_the_users_files(tmp_path):
  header = ('sentence1', 'sentence2', 'label', 'idx')
  rows = [(f'a {i}', f'b {i}', i % 2, i) for i in range(20)]
  write(tmp_path / 'train.csv', rows, header)
  write(tmp_path / 'validation.csv', [(f'c {i}', 'd', i % 2, i) for i in range(4)], header)
  write(tmp_path / 'test.csv', [(f'e {i}', 'd', -1, i) for i in range(4)], header)
  found = data.load('mrpc', path=str(tmp_path))
  assert found.labels == ('not_equivalent', 'equivalent')
  assert found.metrics == ('accuracy', 'f1', 'ece')
  assert found.splits['train'].pairs[0] == 'b 0' and found.splits['train'].labels[:3].tolist() == [
    0,
    1,
    0,
  ]
  assert found.splits['test'].labels is None


def test_a_named_task_finds_other_columns(tmp_path):
  found = data.load(
    'sst2',
    path=folder(
      tmp_path,
      train=[('a', 'positive'), ('b', 'negative')],
      validation=[('c', 'negative')],
      test=None,
    ),
  )
  assert found.labels == ('negative', 'positive') and found.splits['train'].labels.tolist() == [
    1,
    0,
  ]


# Columns.


def sniff(header, *rows, **given):
  values = {name: [row[i] for row in rows] for i, name in enumerate(header)}
  return columns.choose(tables.Table('x.csv', values, np.arange(len(rows))), **given)[0]


@pytest.mark.parametrize(
  'header, row, text, pair, label',
  [
    (('label', 'text'), ('a', 'b'), 'text', None, 'label'),
    (('id', 'Review', 'Stars'), ('1', 'long text', '5'), 'Review', None, 'Stars'),
    (('sentence1', 'sentence2', 'label'), ('a', 'b', '1'), 'sentence1', 'sentence2', 'label'),
    (('question', 'sentence', 'label'), ('a', 'b', '1'), 'question', 'sentence', 'label'),
    (
      ('unnamed_1', 'verbatim', 'label'),
      ('1', 'much longer than the others', 'x'),
      'verbatim',
      None,
      'label',
    ),
    (('verbatim', 'mood'), ('much longer than the others', 'x'), 'verbatim', None, 'mood'),
  ],
)
def test_columns_are_found(header, row, text, pair, label):
  assert sniff(header, row) == columns.Columns(text, pair, (label,))


def test_given_columns_are_taken():
  header, row = ('a', 'b', 'label', 'other'), ('x', 'y', '1', '2')
  assert sniff(header, row, text='b', pair='a', label='other') == columns.Columns(
    'b', 'a', ('other',)
  )
  assert sniff(('t', 'x', 'y'), ('a', '1', '0'), text='t', label='x+y').label == ('x', 'y')
  assert sniff(('t', 'x+y'), ('a', '1'), text='t', label='x+y').label == ('x+y',)


@pytest.mark.parametrize(
  'header, given, says',
  [
    (('a', 'b', 'label'), {}, r"columns: 'a', 'b', 'label'.*set text=COLUMN"),
    (('text', 'b', 'c'), {}, r"columns: 'text', 'b', 'c'.*set label=COLUMN"),
    (('text', 'label'), {'text': 'txt'}, "no column 'txt'.*set text=text"),
    (('text', 'label'), {'text': 'text', 'label': 'text'}, 'different columns'),
    (('text', 'label'), {'pair': 'text'}, 'set text=COLUMN'),
  ],
)
def test_columns_that_cannot_be_told(header, given, says):
  with pytest.raises(InputError, match=says):
    sniff(header, tuple('same' for _ in header), **given)


# What is refused, and what is noted.


@pytest.mark.parametrize(
  'parts, says',
  [
    ({'validation': []}, 'no rows for validation'),
    (
      {'validation': [('x', 'bad'), ('', 'bad'), (' ', 'bad')]},
      r"validation.csv, lines 3, 4, column 'text': found no text",
    ),
    (
      {'validation': [('x', 'ugly')]},
      "validation.csv, line 2: found the label 'ugly', which no training row has",
    ),
    ({'validation': reviews(20)}, r'found the content of .*train.csv'),
    ({'train': [('a', 'x'), ('b', 'x')]}, 'one class only'),
    ({'train': None}, "'test.csv', 'validation.csv', expected a file named train"),
  ],
)
def test_folders_that_are_refused(tmp_path, parts, says):
  with pytest.raises(InputError, match=says):
    data.load(folder(tmp_path, **parts))


def test_columns_of_the_other_splits(tmp_path):
  where = folder(tmp_path)
  write(tmp_path / 'test.csv', [('x',)], ('text',))
  assert data.load(where).splits['test'].labels is None
  write(tmp_path / 'test.csv', [('x', 'bad')], ('body', 'label'))
  with pytest.raises(
    InputError, match=r"test.csv: found no column 'text' \(columns: 'body', 'label'\)"
  ):
    data.load(where)
  write(tmp_path / 'validation.csv', [('x',)], ('text',))
  (tmp_path / 'test.csv').unlink()
  with pytest.raises(InputError, match="validation.csv: found no column 'label'"):
    data.load(where)


@pytest.mark.parametrize('value, says', [(None, 'a null'), (7, 'int 7'), ('\ud800', 'surrogate')])
def test_texts_that_are_none(tmp_path, value, says):
  rows = [{'text': f't{i}', 'label': i % 2} for i in range(20)]
  rows[3]['text'] = value
  (tmp_path / 'x.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  with pytest.raises(InputError, match=f"x.jsonl, line 4, column 'text': found .*{says}"):
    data.load(str(tmp_path / 'x.jsonl'))


def test_two_files_for_one_split(tmp_path):
  where = folder(tmp_path)
  write(tmp_path / 'train_2.csv', reviews(3))
  with pytest.raises(InputError, match=r"'train.csv', 'train_2.csv' for train.*set train=FILE"):
    data.load(where)
  assert len(data.load(where, train='train.csv').splits['train']) == 20
  (tmp_path / 'train_2.csv').rename(tmp_path / 'train.tsv')
  with pytest.raises(InputError, match="'train.csv', 'train.tsv' for train"):
    data.load('sst2', path=where)


@pytest.mark.parametrize(
  'name, says', [('mrcp', "did you mean 'mrpc'"), ('no/such.csv', 'efft tasks')]
)
def test_unknown_names(name, says):
  with pytest.raises(InputError, match=says):
    data.load(name)


def test_split_files_that_are_not_there(tmp_path):
  with pytest.raises(InputError, match='validation=gone.csv: found no such file'):
    data.load(folder(tmp_path), validation='gone.csv')


def test_leakage_is_counted_and_noted(tmp_path):
  found = data.load(folder(tmp_path, test=reviews(3) + reviews(3, 200)))
  assert found.leakage == {'validation': 0, 'test': 3}
  assert '3 of 6 examples of test are also in train' in found.notes


# Subsets.


@hypothesis.given(st.integers(1, 500), st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 9))
def test_subsets_are_nested(n, a, b, seed):
  small, large = (splits.subset(n, f, seed) for f in sorted((a, b)))
  assert set(small) <= set(large) and 1 <= len(small) and len(large) == max(1, round(max(a, b) * n))
  assert (np.diff(large) > 0).all() and np.array_equal(splits.subset(n, 1.0, seed), np.arange(n))


def test_fraction_thins_training_alone(tmp_path):
  where = folder(tmp_path)
  half, whole = data.load(where, fraction=0.5), data.load(where)
  assert len(half.splits['train']) == 10 and set(half.splits['train'].texts) < set(
    whole.splits['train'].texts
  )
  assert half.splits['test'].texts == whole.splits['test'].texts
  with pytest.raises(InputError, match='one class only in 1 training rows'):
    data.load(where, fraction=0.01)
  with pytest.raises(InputError, match='fraction'):
    data.load(where, fraction=0)


def test_a_copy_at_hand_is_read_in_place_of_the_source(tmp_path, monkeypatch):
  for split in ('train', 'validation'):
    rows = [(f'{split} {i}', i % 2) for i in range(12)]
    write(tmp_path / 'cola' / f'{split}.csv', rows, header=('sentence', 'label'))
  monkeypatch.setenv('EFFT_DATA', str(tmp_path))
  found = data.load('cola')
  assert found.splits['train'].texts == [f'train {i}' for i in range(12)]
  assert found.labels == ('unacceptable', 'acceptable') and found.metrics[0] == 'matthews'


def test_halves_cut_validation_alone(tmp_path):
  where = folder(tmp_path)
  whole, cut = data.load(where), data.load(where, halves=True, seed=3)
  assert list(cut.splits) == ['train', 'validation', 'report', *list(whole.splits)[2:]]
  both = [cut.splits[name].keys() for name in ('validation', 'report')]
  assert sorted(both[0] + both[1]) == sorted(whole.splits['validation'].keys())
  assert not set(both[0]) & set(both[1]) and abs(len(both[0]) - len(both[1])) <= 2
  assert cut.splits['train'].keys() == whole.splits['train'].keys()
  # Which rows choose does not hang on the run's seed: runs are compared over seeds.
  assert data.load(where, halves=True, seed=4).splits['report'].keys() == both[1]


def test_one_text_has_no_halves(tmp_path):
  where = folder(tmp_path, validation=reviews(1) * 3)
  with pytest.raises(InputError, match='task.halves.*two different texts'):
    data.load(where, halves=True)


def test_the_stream_of_random_numbers_is_pinned():
  assert splits.seeded('subset', 0).permutation(8).tolist() == [4, 0, 3, 2, 1, 5, 6, 7]


# Prediction input.


def test_texts_for_prediction(tmp_path, caplog):
  path = write(tmp_path / 'x.csv', [('a', '1'), ('b', '2')], ('body', 'id'))
  assert data.read_texts(path).texts == ['a', 'b']
  assert data.read_texts(path, text='id').texts == ['1', '2']
  own = write(tmp_path / 'own.csv', [('t', 'x', '1'), ('u', '', '2')], ('title', 'remark', 'id'))
  with pytest.raises(InputError, match='line 3'):  # and not the titles, which are not empty
    data.read_texts(own, usual=['remark'])
  own = write(tmp_path / 'own.csv', [('t', 'x', '1'), ('u', 'y', '2')], ('title', 'remark', 'id'))
  assert data.read_texts(own, usual=['remark']).texts == ['x', 'y']
  assert data.read_texts(own, usual=['summary']).texts == ['t', 'u']
  assert "text column 'title', for want of summary" in caplog.text
  assert data.read_texts(own, usual=['title', 'remark']).pairs == ['x', 'y']
  (tmp_path / 'x.txt').write_bytes(b'one\r\ntwo\n')
  found = data.read_texts(tmp_path / 'x.txt')
  assert found.texts == ['one', 'two'] and found.labels is None and found.rows.tolist() == [1, 2]


# The hub, by a stand-in for `datasets`.


MNLI = ['entailment', 'neutral', 'contradiction']


class Rows(dict):
  column_names = property(lambda self: list(self))
  features = property(
    lambda self: {
      name: types.SimpleNamespace(names=MNLI if name == 'label' else None) for name in self
    }
  )

  def __len__(self):
    return len(next(iter(self.values())))


def test_hub_rows(monkeypatch):
  asked = []

  def load_dataset(repository, config, split, revision):
    asked.append((repository, config, split, revision))
    label = [-1] * 6 if split == 'test' else [0, 1, 2, 0, 1, 2]
    return Rows(premise=[f'{split} {i}' for i in range(6)], hypothesis=['h'] * 6, label=label)

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  found = data.load('ax')
  assert asked == [
    ('nyu-mll/glue', 'mnli', 'train', None),
    ('nyu-mll/glue', 'mnli', 'validation_matched', None),
    ('nyu-mll/glue', 'ax', 'test', None),
  ]
  assert (
    found.labels == ('entailment', 'neutral', 'contradiction')
    and found.splits['test'].labels is None
  )
  asked.clear()
  found = data.load('mnli', validation='validation_mismatched')
  assert list(found.splits) == ['train', 'validation', 'test', 'test_mismatched']
  assert ('nyu-mll/glue', 'mnli', 'validation_mismatched', None) in asked and len(asked) == 4


def test_hub_out_of_reach(monkeypatch):
  def load_dataset(*_, **__):
    raise ConnectionError('no\nroute')

  monkeypatch.setitem(sys.modules, 'datasets', types.SimpleNamespace(load_dataset=load_dataset))
  with pytest.raises(
    EnvironmentProblem,
    match=r'trec: cannot get CogComp/trec \(train\).*no route.*task=trec,path=FOLDER',
  ):
    data.load('trec')


def test_nothing_heavy_is_imported():
  heavy = "{'jax', 'flax', 'transformers', 'datasets', 'pyarrow', 'pandas'}"
  code = f'import sys, efft.data; print(sorted({heavy} & set(sys.modules)))'
  assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


needs_data = pytest.mark.skipif(
  'EFFT_DATA' not in os.environ, reason='EFFT_DATA names no folder with cola, mrpc, sst2, stsb'
)


@needs_data
@pytest.mark.parametrize(
  'name, sizes',
  [
    ('sst2', [6920, 872, 1821]),
    ('cola', [8551, 1043]),
    ('mrpc', [3668, 408, 1725]),
    ('stsb', [5749, 1500, 1379]),
  ],
)
def test_glue_folders(name, sizes):
  where = os.path.join(os.environ['EFFT_DATA'], name)
  named, plain = data.load(name, path=where), data.load(where)
  for found in (named, plain):
    assert [len(part) for part in found.splits.values()] == sizes
    assert (
      found.kind == ('regression' if name == 'stsb' else 'single')
      and found.columns['label'] == 'label'
    )
    np.testing.assert_array_equal(found.splits['train'].labels, named.splits['train'].labels)
  assert named.labels == (data.TASKS[name].labels or ())
