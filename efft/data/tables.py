"""Reads a csv, tsv, jsonl or parquet file into columns, and refuses what it would have to guess at.

Strings stay strings: no value means "missing" but a null of JSON or parquet, and '007' is not '7'.
Ragged rows, duplicate headers, an unclosed quote and a wrong encoding are errors with line numbers.
"""

import codecs
import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from efft.errors import InputError

SUFFIXES = ('.csv', '.tsv', '.jsonl', '.json', '.parquet')

# Longest mark first: the UTF-32 mark begins with the UTF-16 one.
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF8, 'utf-8-sig'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)


@dataclasses.dataclass(frozen=True)
class Table:
  """Columns of one file, in the file's order.

  columns: name -> N values (str; from JSON and parquet also int, float, bool, list, None).
  rows [N]: where each row begins, counted from 1: the line in a text file, the row in parquet and
  in hub data (`unit`).
  names: column -> class names, for integer columns whose file or hub record declares them.
  suffix: of the file, where `file` does not end in it.
  """

  file: str
  columns: dict[str, list]
  rows: np.ndarray
  unit: str = 'line'
  names: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()
  suffix: str = ''

  def __len__(self) -> int:
    return len(self.rows)

  @property
  def is_text(self) -> bool:
    """Whether an empty cell is the only way this format has to say that nothing is there."""
    return (self.suffix or Path(self.file).suffix).lower() in ('.csv', '.tsv')

  def take(self, indices: Sequence[int], file: str | None = None) -> 'Table':
    """The rows at `indices`, in that order."""
    columns = {name: [values[i] for i in indices] for name, values in self.columns.items()}
    return dataclasses.replace(
      self, file=file or self.file, columns=columns, rows=self.rows[np.asarray(indices, int)]
    )

  def at(self, indices: Sequence[int]) -> str:
    """'file, lines 3, 7 and 12 more': where the rows at `indices` stand."""
    return f'{self.file}, {numbers([int(self.rows[i]) for i in indices], self.unit)}'


def numbers(values: Sequence[int], unit: str = 'line', limit: int = 5) -> str:
  """'line 3' or 'lines 3, 7, 8, 9, 11 and 4 more'."""
  shown = ', '.join(map(str, values[:limit]))
  more = f' and {len(values) - limit} more' if len(values) > limit else ''
  return f'{unit}{"s" if len(values) > 1 else ""} {shown}{more}'


def read(path: str | Path) -> Table:
  """Reads one file by its suffix. Raises InputError for all that the module's docstring lists."""
  path = Path(path)
  suffix = path.suffix.lower()
  if suffix not in SUFFIXES:
    raise InputError(
      str(path),
      f'the suffix {suffix!r}',
      f'one of {", ".join(SUFFIXES)}',
      'convert the file, or name it by what it holds',
    )
  if suffix == '.parquet':
    return _parquet(path)
  text = decode(path)
  if suffix in ('.jsonl', '.json'):
    return _jsonl(path, text)
  return _separated(path, text, '\t' if suffix == '.tsv' else ',')


def decode(path: str | Path) -> str:
  """A text file's content: UTF-8, or what its byte order mark says; line ends are left alone."""
  try:
    data = Path(path).read_bytes()
  except OSError as error:
    raise InputError(
      str(path), error.strerror or 'an unreadable file', 'a readable file', 'check the path'
    ) from error
  encoding = next((name for mark, name in _MARKS if data.startswith(mark)), 'utf-8')
  fix = 'save it as UTF-8, e.g. iconv -f latin1 -t utf-8'
  try:
    text = data.decode(encoding)
  except UnicodeDecodeError as error:
    line = data[: error.start].decode(encoding, 'ignore').count('\n') + 1
    bad = data[error.start : error.start + 1]
    raise InputError(
      f'{path}, line {line}', f'the byte {bad!r}', f'{encoding} text', fix
    ) from error
  if '\0' in text:
    line = text[: text.index('\0')].count('\n') + 1
    raise InputError(
      f'{path}, line {line}',
      'a NUL character',
      'text',
      'if the file is UTF-16 without a byte order mark, '
      'save it as UTF-8; otherwise it is no text file',
    )
  return text


def _separated(path: Path, text: str, delimiter: str) -> Table:
  """csv and tsv. Where a tsv's lines all have the header's width, its quotes may be characters."""
  notes = []
  if delimiter == ',':
    header = text.lstrip('\r\n').split('\n', 1)[0]
    rival = max(';\t', key=header.count)
    if rival in header and ',' not in header:
      delimiter = rival
      notes.append(f'{path}: separated by {rival!r}, not by commas')
  records = error = None
  try:
    records = _records(path, text, delimiter, quotes=True)
  except InputError as refused:
    error = refused
  if path.suffix.lower() == '.tsv' and '"' in text:
    # GLUE's own tsv files hold bare quotes; a quote that opens there and closes lines later would
    # swallow rows in silence. A header in quotes says that whoever wrote the file quotes.
    try:
      plain = _records(path, text, delimiter, quotes=False)
    except InputError:
      plain = None
    if plain and (records is None or (len(plain) > len(records) and plain[0] == records[0])):
      records, error = plain, None
      notes.append(f'{path}: quotes are read as plain characters')
  if error:
    raise error
  if not records:
    raise InputError(str(path), 'an empty file', 'a header line and rows', 'give another file')
  (_, header), *body = records
  header = _header(path, header)
  blank = sum(not fields for _, fields in body)
  body = [(line, fields) for line, fields in body if fields]
  if blank:
    notes.append(f'{path}: {blank} blank lines skipped')
  columns = {name: [fields[i] for _, fields in body] for i, name in enumerate(header)}
  return Table(
    str(path), columns, np.asarray([line for line, _ in body], np.int64), notes=tuple(notes)
  )


def _records(path: Path, text: str, delimiter: str, quotes: bool) -> list[tuple[int, list[str]]]:
  """(line, fields) of each record, no fields of a blank line; refuses open quotes, ragged rows."""
  old = csv.field_size_limit(max(len(text), 1))
  reader = csv.reader(
    io.StringIO(text, newline=''),
    delimiter=delimiter,
    strict=True,
    quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
  )
  records, line = [], 1
  try:
    for fields in reader:
      records.append((line, fields))
      line = reader.line_num + 1
  except csv.Error as error:
    found = (
      'a quote that never closes'
      if 'end of data' in str(error)
      else f'a quote out of place ({error})'
    )
    raise InputError(
      f'{path}, line {line}',
      found,
      'quotes in pairs, doubled inside a quoted field',
      'correct the record that begins there',
    ) from error
  finally:
    csv.field_size_limit(old)
  while records and not records[0][1]:
    records.pop(0)
  if records:
    width = len(records[0][1])
    ragged = [(line, len(fields)) for line, fields in records if fields and len(fields) != width]
    if ragged:
      widths = ', '.join(str(n) for n in sorted({n for _, n in ragged})[:5])
      raise InputError(
        f'{path}, {numbers([line for line, _ in ragged])}',
        f'{widths} fields',
        f'{width} as in the header',
        'quote the fields that hold the separator, or drop those rows',
      )
  return records


def _header(where, names: Sequence[str]) -> list[str]:
  """Stripped column names, a nameless one named by its position; two equal ones are refused."""
  names = [name.strip() or f'unnamed_{i + 1}' for i, name in enumerate(names)]
  twice = [name for name, count in Counter(names).items() if count > 1]
  if twice:
    raise InputError(
      f'{where}, header',
      f'the column {twice[0]!r} {names.count(twice[0])} times',
      'names that differ',
      'rename or drop one',
    )
  return names


def _jsonl(path: Path, text: str) -> Table:
  """One JSON object a line; a key that a line lacks is null there."""
  if text.lstrip().startswith('['):
    raise InputError(
      str(path),
      'one JSON list',
      'one JSON object a line',
      "convert it, e.g. jq -c '.[]' old > new.jsonl",
    )
  records, lines = [], []
  # Not splitlines(): it also cuts at U+2028, which JSON strings may hold.
  for number, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      record = json.loads(line, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
      raise InputError(
        f'{path}, line {number}', f'no JSON ({error})', 'one JSON object a line', 'correct the line'
      ) from error
    if not isinstance(record, dict):
      raise InputError(
        f'{path}, line {number}',
        f'a JSON {type(record).__name__}',
        'an object such as {"text": "...", "label": "..."}',
        'correct the line',
      )
    records.append(record)
    lines.append(number)
  if not records:
    raise InputError(str(path), 'no rows', 'one JSON object a line', 'give another file')
  keys = list(dict.fromkeys(key for record in records for key in record))
  columns = {key: [record.get(key) for record in records] for key in keys}
  return Table(str(path), columns, np.asarray(lines, np.int64))


def _pairs(pairs: list[tuple[str, object]]) -> dict:
  names = [name.strip() for name, _ in pairs]
  twice = [name for name, count in Counter(names).items() if count > 1]
  if twice:
    raise ValueError(f'the key {twice[0]!r} twice')
  return dict(zip(names, (value for _, value in pairs), strict=True))


def _parquet(path: Path) -> Table:
  import pyarrow
  import pyarrow.parquet

  try:
    found = pyarrow.parquet.read_table(path, partitioning=None)
  except (OSError, pyarrow.ArrowException) as error:
    reason = ' '.join(str(error).split())[:200]
    raise InputError(
      str(path), f'no readable parquet ({reason})', 'a parquet file', 'write it again'
    ) from error
  header = _header(path, found.column_names)
  columns = {name: column.to_pylist() for name, column in zip(header, found.columns, strict=True)}
  return Table(
    str(path),
    columns,
    np.arange(1, found.num_rows + 1),
    unit='row',
    names=_declared(found.schema.metadata or {}),
  )


def _declared(metadata: dict[bytes, bytes]) -> dict[str, tuple[str, ...]]:
  """Class names that `datasets` wrote into a parquet file's metadata."""
  try:
    features = json.loads(metadata[b'huggingface'])['info']['features']
    return {
      name.strip(): tuple(feature['names'])
      for name, feature in features.items()
      if isinstance(feature, dict) and feature.get('_type') == 'ClassLabel' and feature.get('names')
    }
  except (KeyError, TypeError, ValueError):
    return {}
