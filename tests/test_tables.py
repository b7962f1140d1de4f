"""Reading files: strings stay strings, and what is not a table is refused with its lines."""

import codecs
import csv
import io
import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from efft.data import tables
from efft.errors import InputError

# Everything that utf-8 can write but NUL; '\r' and '\n' inside fields are the csv module's to
# quote.
FIELD = st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\0'), max_size=12)


def write(folder, name, content):
  path = folder / name
  path.write_bytes(content.encode() if isinstance(content, str) else content)
  return path


@hypothesis.given(
  st.lists(st.tuples(FIELD, FIELD, FIELD), min_size=1, max_size=6), st.sampled_from([',', '\t'])
)
@hypothesis.settings(
  deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_what_csv_writes_is_what_is_read(tmp_path, rows, delimiter):
  buffer = io.StringIO(newline='')
  writer = csv.writer(buffer, delimiter=delimiter, quoting=csv.QUOTE_ALL, lineterminator='\n')
  writer.writerow(['a', 'b', 'c'])
  writer.writerows(rows)
  path = write(tmp_path, 'x.csv' if delimiter == ',' else 'x.tsv', buffer.getvalue())
  table = tables.read(path)
  assert list(zip(*table.columns.values(), strict=True)) == rows
  assert table.rows[0] == 2 and (np.diff(table.rows) > 0).all()


def test_no_string_is_a_missing_value(tmp_path):
  values = ['007', '7', 'null', 'NA', 'None', 'nan', '1e3', ' x ', 'TRUE', '']
  table = tables.read(
    write(tmp_path, 'x.csv', 'text,label\n' + '\n'.join(f'a,{v}' for v in values))
  )
  assert table.columns['label'] == values


@pytest.mark.parametrize(
  'encoding, mark',
  [
    ('utf-8', b''),
    ('utf-8', codecs.BOM_UTF8),
    ('utf-16-le', codecs.BOM_UTF16_LE),
    ('utf-16-be', codecs.BOM_UTF16_BE),
    ('utf-32-le', codecs.BOM_UTF32_LE),
  ],
)
def test_encodings_with_and_without_a_mark(tmp_path, encoding, mark):
  table = tables.read(
    write(tmp_path, 'x.csv', mark + 'text,label\r\nnaïve 文,1\r\n'.encode(encoding))
  )
  assert table.columns == {'text': ['naïve 文'], 'label': ['1']}


def test_lines_are_those_of_an_editor(tmp_path):
  table = tables.read(write(tmp_path, 'x.csv', 'text,label\n"two\nlines",1\n\nb,2\n'))
  assert table.rows.tolist() == [2, 5]
  assert table.notes == (f'{tmp_path}/x.csv: 1 blank lines skipped',)


def test_headers_are_stripped_and_the_nameless_named(tmp_path):
  table = tables.read(write(tmp_path, 'x.csv', ', text ,label\n0,a,b\n'))
  assert list(table.columns) == ['unnamed_1', 'text', 'label']


def test_semicolons_are_found(tmp_path):
  table = tables.read(write(tmp_path, 'x.csv', 'text;label\na, b;1\n'))
  assert table.columns == {'text': ['a, b'], 'label': ['1']} and "';'" in table.notes[0]


@pytest.mark.parametrize(
  'name, content, where, found',
  [
    ('x.csv', 'a,b\n1,2\n1\n1,2,3\n', 'lines 3, 4', '1, 3 fields'),
    ('x.csv', 'a,a\n1,2\n', 'header', "'a' 2 times"),
    ('x.csv', ' a,a \n1,2\n', 'header', "'a' 2 times"),
    ('x.csv', 'a,b\n1,2\n"open,2\n1,2\n', 'line 3', 'never closes'),
    ('x.csv', 'a,b\n"x"y,2\n', 'line 2', 'out of place'),
    ('x.csv', 'a,b\n1,caf\xe9\n'.encode('latin1'), 'line 2', r"b'\xe9'"),
    ('x.csv', 'a,b\n1,2\n'.encode('utf-16-le'), 'line 1', 'NUL'),
    ('x.csv', '', 'x.csv', 'empty file'),
    ('x.tsv', 'a\tb\n"open\t2\t3\n', 'x.tsv', 'never closes'),
    ('x.jsonl', '{"a": 1}\n{"a": \n', 'line 2', 'no JSON'),
    ('x.jsonl', '{"a": 1, " a": 2}\n', 'line 1', "'a' twice"),
    ('x.jsonl', '{"a": 1}\n[1]\n', 'line 2', 'a JSON list'),
    ('x.jsonl', ' [{"a": 1}]', 'x.jsonl', 'one JSON list'),
    ('x.jsonl', '\n', 'x.jsonl', 'no rows'),
    (
      'x.parquet',
      'version https://git-lfs.github.com/spec/v1\n',
      'x.parquet',
      'no readable parquet',
    ),
    ('x.xlsx', '', 'x.xlsx', "'.xlsx'"),
  ],
)
def test_what_is_refused(tmp_path, name, content, where, found):
  with pytest.raises(InputError) as error:
    tables.read(write(tmp_path, name, content))
  assert where in str(error.value.where) and found in error.value.found


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(InputError, match='No such file'):
    tables.read(tmp_path / 'x.csv')


def test_bare_quotes_of_a_tsv_are_characters(tmp_path):
  path = write(tmp_path, 'x.tsv', 'text\tlabel\n"so it begins\t1\nb\t0\nit ends"\t1\n')
  table = tables.read(path)
  assert (
    table.columns['text'] == ['"so it begins', 'b', 'it ends"']
    and 'plain characters' in table.notes[0]
  )


def test_a_quoted_tsv_keeps_its_tabs_and_lines(tmp_path):
  table = tables.read(write(tmp_path, 'x.tsv', 'text\tlabel\n"a\tb\tc\nd ""e"""\t1\n'))
  assert table.columns['text'] == ['a\tb\tc\nd "e"']


def test_long_fields_are_read_and_the_limit_is_put_back(tmp_path):
  before = csv.field_size_limit()
  table = tables.read(write(tmp_path, 'x.csv', 'text,label\n' + 'x' * 300_000 + ',1\n'))
  assert len(table.columns['text'][0]) == 300_000 and csv.field_size_limit() == before


def test_jsonl_keeps_types_and_line_separators(tmp_path):
  records = [{'text': 'a\u2028b', 'label': ['x', 'y']}, {'text': 'c', 'label': None}, {'text': 'd'}]
  lines = '\n\n'.join(json.dumps(r, ensure_ascii=False) for r in records)
  table = tables.read(write(tmp_path, 'x.jsonl', lines))
  assert table.columns == {'text': ['a\u2028b', 'c', 'd'], 'label': [['x', 'y'], None, None]}
  assert table.rows.tolist() == [1, 3, 5]


def test_parquet_and_the_class_names_that_datasets_wrote(tmp_path):
  features = {'info': {'features': {'label': {'names': ['no', 'yes'], '_type': 'ClassLabel'}}}}
  data = pyarrow.table({'text': ['007', None], 'label': [0, 1]}).replace_schema_metadata(
    {'huggingface': json.dumps(features)}
  )
  pyarrow.parquet.write_table(data, tmp_path / 'x.parquet')
  table = tables.read(tmp_path / 'x.parquet')
  assert table.columns == {'text': ['007', None], 'label': [0, 1]}
  assert table.names == {'label': ('no', 'yes')} and table.at([1]).endswith('x.parquet, row 2')


def test_row_numbers_in_words():
  assert tables.numbers([3]) == 'line 3'
  assert tables.numbers([1, 2, 3, 4, 5, 6, 7], 'row') == 'rows 1, 2, 3, 4, 5 and 2 more'
