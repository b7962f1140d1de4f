"""Tokens equal to the HF tokenizer's, and batches that are a pure function of (seed, step)."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from efft.data import batches, tokens
from efft.data.splits import Split
from efft.errors import InputError

WORDS = [
  'a',
  'film',
  'that',
  'is',
  'good',
  'bad',
  'un',
  '##watch',
  '##able',
  '##s',
  '.',
  ',',
  '!',
  '文',
  'é',
]


def wordpiece():
  vocab = {word: i for i, word in enumerate(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS])}
  tok = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token='[UNK]'))
  tok.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
  tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  tok.add_special_tokens(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'])
  tok.post_processor = processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    pair='[CLS] $A [SEP] $B:1 [SEP]:1',
    special_tokens=[('[CLS]', 2), ('[SEP]', 3)],
  )
  return tok


def byte_level():
  """As RoBERTa's: pieces carry the space before them, <mask> swallows it, two </s> part a pair."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {
    piece: i
    for i, piece in enumerate(['<s>', '<pad>', '</s>', '<unk>', *alphabet, 'Ġf', 'il', 'oo'])
  }
  tok = tokenizers.Tokenizer(
    models.BPE(vocab, [('Ġ', 'f'), ('i', 'l'), ('o', 'o')], unk_token='<unk>')
  )
  tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tok.add_special_tokens(
    ['<s>', '<pad>', '</s>', '<unk>', tokenizers.AddedToken('<mask>', lstrip=True)]
  )
  tok.post_processor = processors.RobertaProcessing(('</s>', 2), ('<s>', 0), add_prefix_space=False)
  return tok


TOKENIZERS = {'wordpiece': wordpiece(), 'byte_level': byte_level()}


def split(texts, pairs=None, labels=None):
  labels = np.arange(len(texts), dtype=np.int32) % 2 if labels is None else labels
  return Split(list(texts), pairs, labels, np.arange(len(texts)) + 2, 'x.csv')


def expected(texts, pairs, tok, max_length):
  """The whole texts through the tokenizer's own truncation: [(ids, type_ids, was cut)]."""
  tok = tokenizers.Tokenizer.from_str(tok.to_str())
  inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
  full = [len(e) for e in tok.encode_batch(inputs)]
  tok.enable_truncation(max_length, strategy='longest_first')
  return [
    (e.ids, e.type_ids, n > max_length) for e, n in zip(tok.encode_batch(inputs), full, strict=True)
  ]


def assert_equal_tokens(texts, pairs, tok, max_length):
  got = tokens.encode(split(texts, pairs), tok, max_length)
  want = expected(texts, pairs, tok, max_length)
  for i, (ids, types, _) in enumerate(want):
    where = slice(got.offsets[i], got.offsets[i + 1])
    assert got.ids[where].tolist() == ids and got.type_ids[where].tolist() == types
  assert got.truncated == sum(cut for *_, cut in want)


SPACE = st.sampled_from([' ', '  ', '\n', '\t ', '\u00a0', '\x1c'])
WORD = st.sampled_from(
  ['a', 'Film', 'unwatchables', 'good', '.', '!', '文文', 'é', 'e\u0301', '[SEP]', '<mask>', '']
)
TEXT = st.builds(
  lambda parts, times: ''.join(word + space for word, space in parts) * times,
  st.lists(st.tuples(WORD, SPACE), max_size=6),
  st.sampled_from([1, 2, 4]),
)


@pytest.mark.parametrize('characters', [1, tokens.CHARACTERS])
@pytest.mark.parametrize('name', TOKENIZERS)
@hypothesis.given(
  texts=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
  size=st.integers(6, 13),
  paired=st.booleans(),
)
@hypothesis.settings(deadline=None, max_examples=80)
def test_ids_are_the_tokenizers_own(name, characters, texts, size, paired):
  first, second = map(list, zip(*texts, strict=True))
  with pytest.MonkeyPatch.context() as patch:
    # Short texts are cut too, because the tokenizer's own truncation of long pairs takes minutes.
    patch.setattr(tokens, 'CHARACTERS', characters)
    patch.setattr(tokens, 'MARGIN', 1)
    assert_equal_tokens(first, second if paired else None, TOKENIZERS[name], size)


@pytest.mark.parametrize('name', TOKENIZERS)
def test_over_long_texts_cost_what_their_beginning_costs(name, monkeypatch):
  tok, lengths = TOKENIZERS[name], []
  texts = ['a film that is good . ' * 20_000, 'x ' * 50_000, 'good']
  monkeypatch.setattr(
    tokens, '_head', lambda *a, head=tokens._head: lengths.append(len(head(*a))) or head(*a)
  )
  found = tokens.beginnings(texts, tok, 40)
  assert max(lengths) <= 320 and [whole for _, whole in found] == [False, False, True]
  monkeypatch.undo()
  assert_equal_tokens(texts[:1], None, tok, 16)
  assert_equal_tokens(['x' * 5000 + ' a', texts[2]], None, tok, 16)


@pytest.mark.parametrize('extra, kept', [('', [6, 7]), ('a ', [6, 7])])
def test_the_odd_token_goes_to_the_longer_text(extra, kept):
  long = 'a film . ' * 3000
  pair = split([long, long + extra], [long + extra, long])
  got = tokens.encode(pair, TOKENIZERS['wordpiece'], 16)
  counts = [np.bincount(got.type_ids[a:b]).tolist() for a, b in ((0, 16), (16, 32))]
  # [CLS] and [SEP] come with the first text, [SEP] with the second.
  assert counts[0] == [kept[0] + 2, kept[1] + 1]
  assert counts[1] == ([kept[1] + 2, kept[0] + 1] if extra else counts[0])
  assert got.truncated == 2


@hypothesis.given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 20))
def test_what_is_kept_equals_a_loop(n, m, budget):
  kept = tokens.keep([n, m], budget)
  a, b = n, m
  while a + b > budget:
    a, b = (a - 1, b) if a > b or (a == b and n <= m) else (a, b - 1)
  assert kept == [a, b]


def test_special_tokens_in_texts_are_counted():
  got = tokens.encode(
    split(['a [SEP] b', 'good', 'a'], ['x', '[CLS]', 'y']), TOKENIZERS['wordpiece'], 8
  )
  assert got.special == 2 and 'special token' in got.notes[-1]


def test_the_tokenizers_own_settings_are_put_aside_and_kept():
  tok = wordpiece()
  tok.enable_truncation(5)
  tok.enable_padding(length=9)
  got = tokens.encode(split(['good film . ' * 10]), tok, 8)
  assert (
    got.lengths.tolist() == [8] and tok.truncation['max_length'] == 5 and tok.padding['length'] == 9
  )


def test_lengths_that_hold_nothing():
  with pytest.raises(InputError, match='more than the 3 special tokens'):
    tokens.encode(split(['a'], ['b']), TOKENIZERS['wordpiece'], 3)
  bare = tokenizers.Tokenizer(models.WordLevel({'a': 0, '[UNK]': 1}, unk_token='[UNK]'))
  bare.pre_tokenizer = pre_tokenizers.Whitespace()
  with pytest.raises(InputError, match='x.csv:3: found a text without tokens'):
    tokens.encode(split(['a', ' ']), bare, 8)


def test_the_cache_is_keyed_by_content_and_verified(tmp_path, monkeypatch, caplog):
  part, tok, cache = split(['a film', 'good']), TOKENIZERS['wordpiece'], tmp_path / 'deep' / 'cache'
  first = tokens.encode(part, tok, 8, cache)
  [entry] = cache.iterdir()
  with monkeypatch.context() as patch:
    patch.setattr(tokens, '_encode', lambda *_: pytest.fail('tokenised again'))
    again = tokens.encode(part, tok, 8, cache)
  for field in dataclasses.fields(first):
    np.testing.assert_array_equal(getattr(first, field.name), getattr(again, field.name))
  other = tokens.encode(split(['a fil', 'mgood']), tok, 8, cache)
  assert not np.array_equal(other.ids, first.ids)
  tokens.encode(part, tok, 9, cache)
  tokens.encode(split(['a film'], ['good']), tok, 8, cache)
  assert len(list(cache.iterdir())) == 4
  for damage in (lambda b: b[:-5] + bytes([b[-5] ^ 1]) + b[-4:], lambda b: b[:50], lambda b: b''):
    entry.write_bytes(damage(entry.read_bytes()))
    np.testing.assert_array_equal(tokens.encode(part, tok, 8, cache).ids, first.ids)
  assert caplog.text.count('damaged') == 3


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  got = tokens.encode(split(['a film']), TOKENIZERS['wordpiece'], 8, tmp_path / 'file' / 'cache')
  assert len(got) == 1 and 'token cache' in caplog.text


# Batches.


def encoded(lengths, max_length=64, labels=None):
  """Example i holds the id i + 1, `lengths[i]` times."""
  offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
  ids = np.repeat(np.arange(len(lengths), dtype=np.int32) + 1, lengths)
  labels = np.arange(len(lengths), dtype=np.int32) if labels is None else labels
  return tokens.Encoded(ids, ids % 2, offsets, labels, max_length, 0, 0, 0)


LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=40)


@hypothesis.given(LENGTHS, st.integers(1, 9), st.integers(0, 3), st.booleans(), st.integers(1, 4))
@hypothesis.settings(deadline=None)
def test_each_epoch_has_every_example_once(lengths, size, seed, grouped, mega):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches, 'MEGA', mega)
    stream = batches.Batches(encoded(lengths), size, seed, group_by_length=grouped)
    seen = np.concatenate([stream.rows(step) for step in range(-(-3 * len(lengths) // size))])
  for epoch in range(3):
    assert sorted(seen[epoch * len(lengths) : (epoch + 1) * len(lengths)]) == list(
      range(len(lengths))
    )
  assert stream.steps_per_epoch == -(-len(lengths) // size)


@pytest.mark.parametrize('grouped', [False, True])
def test_a_batch_is_a_function_of_seed_and_step(grouped):
  data = encoded(np.random.RandomState(0).randint(1, 64, 103))

  def make(seed=1):
    return batches.Batches(data, 8, seed, group_by_length=grouped)

  onward = make()
  whole = [onward.batch(step) for step in range(60)]
  for step in (59, 0, 13, 12, 40):
    for key, value in make().batch(step).items():
      np.testing.assert_array_equal(value, whole[step][key])
    np.testing.assert_array_equal(onward.batch(step)['input_ids'], whole[step]['input_ids'])
  assert any(
    not np.array_equal(make(2).batch(i)['input_ids'], whole[i]['input_ids']) for i in range(3)
  )
  assert not np.array_equal(make().rows(0), make().rows(13))


@hypothesis.given(LENGTHS, st.integers(1, 9), st.integers(0, 50))
@hypothesis.settings(deadline=None)
def test_batches_equal_a_loop(lengths, size, step):
  data = encoded(lengths)
  stream = batches.Batches(data, size, 0)
  batch, rows = stream.batch(step), stream.rows(step)
  width = min(b for b in (16, 24, 32, 48, 64) if b >= max(lengths[row] for row in rows))
  assert batch['input_ids'].shape == (size, width)
  for b, row in enumerate(rows):
    n = lengths[row]
    assert batch['input_ids'][b].tolist() == [row + 1] * n + [0] * (width - n)
    assert batch['mask'][b].tolist() == [True] * n + [False] * (width - n)
    assert batch['token_types'][b].tolist() == [(row + 1) % 2] * n + [0] * (width - n)
    assert batch['labels'][b] == row and batch['weights'][b] == 1
  assert {k: v.dtype.name for k, v in batch.items()} == {
    'input_ids': 'int32',
    'mask': 'bool',
    'token_types': 'int32',
    'labels': 'int32',
    'weights': 'float32',
  }


def test_grouping_saves_padding_and_still_mixes():
  data = encoded(np.random.RandomState(0).randint(1, 64, 4000))

  def cost(grouped):
    stream = batches.Batches(data, 16, 0, group_by_length=grouped)
    return sum(stream.batch(step)['mask'].size for step in range(stream.steps_per_epoch))

  assert cost(True) < 0.7 * cost(False)
  widths = [
    batches.Batches(data, 16, 0, group_by_length=True).batch(i)['mask'].shape[1] for i in range(20)
  ]
  assert widths != sorted(widths) and widths != sorted(widths, reverse=True)


@hypothesis.given(LENGTHS, st.integers(1, 9))
@hypothesis.settings(deadline=None)
def test_evaluation_covers_each_example_once_in_full_batches(lengths, size):
  seen = []
  for batch in batches.evaluation(encoded(lengths), size):
    assert batch['input_ids'].shape[0] == size and batch['mask'].any(1).all()
    real = batch['rows'] >= 0
    np.testing.assert_array_equal(batch['weights'], real.astype(np.float32))
    np.testing.assert_array_equal(batch['input_ids'][real, 0], batch['rows'][real] + 1)
    np.testing.assert_array_equal(batch['labels'][real], batch['rows'][real])
    seen += batch['rows'][real].tolist()
  assert sorted(seen) == list(range(len(lengths)))


def test_unlabelled_and_multi_label_batches():
  bare = dataclasses.replace(encoded([3, 4]), labels=None)
  assert 'labels' not in next(batches.evaluation(bare, 2))
  multi = encoded([3, 4], labels=np.eye(2, 5, dtype=np.float32))
  assert next(batches.evaluation(multi, 3))['labels'].shape == (3, 5)
  assert list(batches.evaluation(encoded([]), 2)) == []


@pytest.mark.parametrize(
  'lengths, max_length, sizes',
  [
    ([5], 64, (16,)),
    ([17], 64, (16, 24)),
    ([50], 50, (16, 24, 32, 48, 50)),
    ([10], 12, (12,)),
    ([600], 600, (*batches.BUCKETS, 600)),
  ],
)
def test_buckets(lengths, max_length, sizes):
  assert batches.buckets_for(encoded(lengths, max_length)) == sizes


def test_steps_and_what_is_refused():
  stream = batches.Batches(encoded([1] * 10), 4, 0)
  assert [stream.steps(e) for e in (0.1, 1, 2, 2.5)] == [1, 3, 5, 7]
  for data, size in ((encoded([]), 4), (encoded([1]), 0)):
    with pytest.raises(InputError):
      batches.Batches(data, size, 0)
