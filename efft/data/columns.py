"""Which columns hold the text, its pair and the label, where the user did not say."""

import dataclasses
import difflib

from efft.data.tables import Table
from efft.errors import InputError

PAIRS = (
  ('sentence1', 'sentence2'),
  ('premise', 'hypothesis'),
  ('question1', 'question2'),
  ('question', 'sentence'),
  ('text1', 'text2'),
  ('text_a', 'text_b'),
)
TEXTS = (
  'text',
  'sentence',
  'review',
  'content',
  'comment',
  'body',
  'message',
  'document',
  'tweet',
  'utterance',
  'query',
  'question',
  'review_text',
  'comment_text',
  'description',
  'title',
)
LABELS = (
  'label',
  'labels',
  'target',
  'class',
  'category',
  'sentiment',
  'stars',
  'rating',
  'score',
  'intent',
  'topic',
  'y',
)


@dataclasses.dataclass(frozen=True)
class Columns:
  """Column names. Several labels: each column holds the 0 or 1 of one class."""

  text: str
  pair: str | None = None
  label: tuple[str, ...] = ()


def choose(
  table: Table,
  text: str | None = None,
  pair: str | None = None,
  label: str | None = None,
  need_label: bool = True,
) -> tuple[Columns, list[str]]:
  """The columns to use, and a note on each that was found rather than given.

  Raises InputError, with the columns found and the setting to add, where a given name is absent or
  none can be told.
  """
  notes = []
  labels = _labels(table, label) if label else ()
  if text:
    text = _named(table, 'text', text)
    pair = _named(table, 'pair', pair) if pair else None
  if not labels and need_label:
    labels = _find_label(table, [c for c in (text, pair) if c])
    if labels:
      notes.append(f'{table.file}: label column {labels[0]!r}')
  if not text:
    if pair:
      raise InputError(
        table.file, f'pair={pair} alone', 'the first text column too', 'set text=COLUMN'
      )
    text, pair = _find_text(table, labels)
    notes.append(
      f'{table.file}: text column {text!r}' + (f', pair column {pair!r}' if pair else '')
    )
    if not labels and need_label:
      labels = _only_rest(table, [c for c in (text, pair) if c])
      if labels:
        notes.append(f'{table.file}: label column {labels[0]!r}')
  if not labels and need_label:
    raise InputError(
      table.file,
      f'no column known to hold labels; {_list(table)}',
      'a label column',
      'set label=COLUMN',
    )
  chosen = [c for c in (text, pair, *labels) if c]
  if len(set(chosen)) < len(chosen):
    raise InputError(
      table.file,
      f'text={text}, pair={pair}, label={"+".join(labels)}',
      'different columns',
      'name each column once',
    )
  return Columns(text, pair, labels), notes


def _named(table: Table, setting: str, name: str) -> str:
  name = name.strip()
  if name in table.columns:
    return name
  near = difflib.get_close_matches(name, table.columns, 1)
  raise InputError(
    table.file,
    f'no column {name!r}; {_list(table)}',
    f'the column of {setting}={name}',
    f'set {setting}={near[0] if near else "COLUMN"}',
  )


def _labels(table: Table, label: str) -> tuple[str, ...]:
  """One column, or several joined by '+'; a column whose own name holds a '+' comes first."""
  if label.strip() in table.columns or '+' not in label:
    return (_named(table, 'label', label),)
  return tuple(_named(table, 'label', part) for part in label.split('+'))


def _find_label(table: Table, taken: list[str]) -> tuple[str, ...]:
  lower = {name.lower(): name for name in table.columns if name not in taken}
  found = next((lower[name] for name in LABELS if name in lower), None)
  if found is None and taken:
    return _only_rest(table, taken)
  return (found,) if found else ()


def _only_rest(table: Table, taken: list[str]) -> tuple[str, ...]:
  rest = [name for name in table.columns if name not in taken]
  if len(rest) != 1:
    return ()
  if table.is_text and rest[0] in table.columns[rest[0]]:
    raise InputError(
      table.file,
      f'the header {rest[0]!r}, which is a label too',
      "a header line, as in 'text,label'",
      f'add one, or set label={rest[0]}',
    )
  return (rest[0],)


def _find_text(table: Table, labels: tuple[str, ...]) -> tuple[str, str | None]:
  free = [name for name in table.columns if name not in labels]
  # By name even where a row holds no text: that row is then named, which helps more.
  lower = {
    name.lower(): name for name in free if any(isinstance(v, str) for v in table.columns[name])
  }
  for first, second in PAIRS:
    if first in lower and second in lower:
      return lower[first], lower[second]
  for name in TEXTS:
    if name in lower:
      return lower[name], None
  free = [name for name in free if _is_text(table.columns[name])]
  length = {name: sum(map(len, filter(None, table.columns[name]))) for name in free}
  ranked = sorted(free, key=length.get, reverse=True)
  # A column of ids or dates is also strings: the text must be clearly the longest.
  if ranked and (len(ranked) == 1 or length[ranked[0]] > 2 * length[ranked[1]]):
    return ranked[0], None
  raise InputError(
    table.file,
    f'no column known to hold the text; {_list(table)}',
    'a text column',
    'set text=COLUMN (and pair=COLUMN for the second of two)',
  )


def _is_text(values: list) -> bool:
  return all(value is None or isinstance(value, str) for value in values) and any(values)


def _list(table: Table) -> str:
  return 'columns: ' + ', '.join(repr(name) for name in list(table.columns)[:30])
