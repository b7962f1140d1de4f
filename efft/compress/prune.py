"""The stages that a config names: {'fn': 'prune.heads', 'share': 0.5}.

Each returns a `Prune`, which looks at the encoder as the stage before it left it and says what
stays of it. Options are checked before anything runs.
"""

import logging
from collections.abc import Callable, Sequence

from efft.compress import dead as remains
from efft.compress import hidden as dimensions
from efft.compress import latency, scores, select, slicing
from efft.compress import ziplm as zip_lm
from efft.compress.base import Keep, Prune, Smaller, Subject
from efft.data import vocabulary
from efft.errors import nearest
from efft.models import hub
from efft.models.encoder import EncoderConfig
from efft.peft import base as peft

log = logging.getLogger(__name__)


def heads(
  share: float = 0.5, score: str = 'michel', scope: str = 'global', least: int = 0,
  steps: int = 1, examples: int = 256,
) -> Prune:  # fmt: skip
  """Attention heads by a score.

  Args:
    share: of all heads, which go.
    score: random, magnitude, michel, taylor, fisher, activation (`efft.compress.scores`).
    scope: 'global' ranks all heads together, 'layer' those of each layer.
    least: heads that stay in every layer.
    steps: in which they go, scored anew at each (Michel et al. take 10 % of all at a time).
    examples: of the training split, to score by.
  """
  scored = scores.named(score, 'heads')
  _check_choice(share, scope, least, steps)
  _check_examples(examples, score)

  def act(subject: Subject) -> Smaller:
    def choose(found, part):
      return select.heads(found, part, scope, least)

    return Smaller(_iterated(subject, scored, choose, share, steps))

  return _removing(act, examples)


def units(
  share: float = 0.5, score: str = 'michel', scope: str = 'global', least: int = 0,
  multiple: int = 1, steps: int = 1, examples: int = 256,
) -> Prune:  # fmt: skip
  """Feed-forward units by a score.

  Args:
    share, score, scope, least, steps, examples: as for `heads`.
    multiple: of which each layer keeps a number of units; 8 or 64 where the device likes it.
  """
  scored = scores.named(score, 'units')
  _check_choice(share, scope, least, steps)
  _check_examples(examples, score)
  if multiple < 1:
    raise ValueError(f'multiple {multiple} below 1')

  def act(subject: Subject) -> Smaller:
    def choose(found, part):
      return select.units(found, part, scope, least, multiple)

    return Smaller(_iterated(subject, scored, choose, share, steps))

  return _removing(act, examples)


def layers(
  remove: float = 0.5, how: str = 'top', score: str = 'similarity', examples: int = 256
) -> Prune:
  """Whole layers.

  Args:
    remove: how many go: a number of layers from 1 on, a share below 1.
    how: top, bottom, alternate, spread (DistilBERT's), importance (`efft.compress.select.layers`).
    score: for 'importance'; `similarity`, or what scores heads.
    examples: of the training split, for 'importance'.
  """
  scored = scores.named(score, 'layers')
  _one_of('how', how, select.ORDERS)
  if remove < 0 or (remove >= 1 and remove != int(remove)):
    raise ValueError(f'remove {remove}, neither a whole number of layers nor a share below 1')
  if how == 'importance':
    _check_examples(examples, score)

  def act(subject: Subject) -> Smaller:
    found = scored(subject) if how == 'importance' else None
    count = remove if remove < 1 else int(remove)
    return Smaller(select.layers(subject.cfg.layers, count, how, found))

  return _removing(act, examples if how == 'importance' else 0)


def hidden(share: float = 0.25, examples: int = 256) -> Prune:
  """Hidden dimensions, everywhere at once: those that are active least.

  By the mean |x| over real tokens of what goes into each layer and comes out of the last
  (Muralidharan et al. 2024, https://arxiv.org/abs/2407.14679, section 2.2, who take it after the
  norms, as BERT's residual stream is). The norms then act over fewer dimensions, so tune
  afterwards.

  Args:
    share: of the dimensions, which go.
    examples: of the training split.
  """
  _check_share(share)
  _check_examples(examples)

  def act(subject: Subject) -> Smaller:
    return Smaller(dimensions.keep(dimensions.activity(subject), share))

  return _removing(act, examples)


def words(characters: bool = True) -> Prune:
  """Rows of the word embeddings that no training text needs, and their tokens.

  The training texts are cut into the same tokens as before, so nothing changes for them. Others
  may fall into smaller pieces.

  Args:
    characters: whether single characters stay, so that unseen words fall into pieces at all.
  """

  def act(subject: Subject) -> Smaller:
    tok = hub.tokenizer_from(subject.tokenizer)
    used = vocabulary.used(subject.texts, subject.pairs, tok, subject.max_length)
    tokenizer, kept = vocabulary.shrink(subject.tokenizer, used, characters=characters)
    return Smaller(Keep(words=kept), tokenizer=tokenizer)

  return _removing(act)


def merge() -> Prune:
  """Removes nothing, but folds the deltas into the weights."""

  def act(subject: Subject) -> Smaller:
    return Smaller(variables=_merged(subject))

  return Prune(act)


def dead() -> Prune:
  """What learnt masks have left without effect: deltas are folded in, then empty structures go.

  Unstructured zeros that remain are reported: they make nothing faster. Where no deltas are to be
  folded in and nothing is dead, no masks were learnt: that is refused.
  """

  def act(subject: Subject) -> Smaller:
    merged = _merged(subject)
    slicing.check_float(merged)  # what deltas of rounding merge to, too
    found = remains.sparsity(subject.cfg, merged['params'])
    if not (subject.folded or 'delta' in subject.variables or any(found.values())):
      raise ValueError(
        'no masks to fold in, nothing dead and no zeros (`efft compress` leaves out what trains '
        "before the first stage that prunes: begin with {'s0': {'fn': 'prune.merge'}})"
      )
    keep, variables = remains.dead(subject.cfg, merged)
    log.info('sparsity: %s', found)
    return Smaller(keep, variables)

  return Prune(act)


def ziplm(
  speedup: float = 2.0, batch: int = 32, length: int = 64, dtype: str = '',
  evaluations: int = 100, examples: int = 256, tried_on: int = 64,
) -> Prune:  # fmt: skip
  """Heads and units such that the encoder is so many times faster than before any pruning.

  See `efft.compress.ziplm`. What blocks cost is measured on this device, once, and kept in the
  cache; how fast the encoder has become is measured as well, and stands in the stage's row.

  Args:
    speedup: at that batch and length, over the encoder before the first stage that pruned.
    batch, length: that the encoder shall be fast for.
    dtype: likewise; '': in which the run computes.
    evaluations: candidates tried.
    examples: of the training split, for the second moments of inputs.
    tried_on: of these examples, each candidate.
  """
  if speedup < 1 or batch < 1 or length < 1:
    raise ValueError(f'speedup {speedup}, batch {batch} or length {length} below 1')
  _one_of('dtype', dtype, ('', 'float32', 'bfloat16'))
  _check_examples(examples)
  if evaluations < 1 or tried_on < 1:
    raise ValueError(f'evaluations {evaluations} or tried_on {tried_on} below 1')

  def act(subject: Subject) -> Smaller:
    dense, kind = subject.dense or subject.cfg, dtype or subject.dtype
    table = latency.known(dense, batch, length, kind)
    before = table.predict(dense)
    if (subject.cfg.hidden, subject.cfg.head_dim) != (table.hidden, table.head_dim):
      # Blocks as narrow as they are by now.
      table = latency.known(subject.cfg, batch, length, kind)
    found = zip_lm.ziplm(
      subject,
      speedup,
      table,
      dense=before,
      evaluations=evaluations,
      tried_on=-(-tried_on // len(subject.batches[0]['weights'])),
    )
    return Smaller(*found)

  def measure(dense: EncoderConfig, cfg: EncoderConfig, kind: str) -> dict:
    ratio = latency.faster(dense, cfg, batch, length, dtype or kind)
    return {'speedup': round(ratio, 3), 'speedup_asked': speedup}

  return _removing(act, examples, measure)


def _removing(act: Callable, examples: int = 0, measure: Callable | None = None) -> Prune:
  """A stage for float encoders alone, which says so before it looks at any example."""

  def checked(subject: Subject) -> Smaller:
    slicing.check_float(subject.variables)
    return act(subject)

  return Prune(checked, examples, measure=measure)


def _one_of(what: str, given: str, able: Sequence[str]) -> None:
  if given not in able:
    close = nearest(str(given), able)
    meant = f'; did you mean {close}?' if close else ''
    raise ValueError(f'{what} {given!r}, one of {", ".join(able)}{meant}')


def _check_share(share: float) -> None:
  if not 0 <= share < 1:
    raise ValueError(f'share {share}, not from 0 to below 1')


def _check_choice(share: float, scope: str, least: int, steps: int) -> None:
  _check_share(share)
  _one_of('scope', scope, select.SCOPES)
  if least < 0 or steps < 1:
    raise ValueError(f'least {least} below 0 or steps {steps} below 1')


def _check_examples(examples: int, score: str | None = None) -> None:
  if examples < 0 or (not examples and score not in scores.BLIND):
    raise ValueError(f'examples {examples}, and 1 or more are to be looked at')


def _iterated(subject: Subject, scored, choose, share: float, steps: int) -> Keep:
  return select.iterative(subject.cfg, lambda gates: scored(subject, gates), choose, share, steps)


def _merged(subject: Subject) -> dict:
  """{'params'}, the deltas folded in."""
  params = subject.variables['params']
  if 'delta' in subject.variables:
    params = peft.merge(subject.net.deltas, params, subject.variables['delta'])
  return {'params': params}
