"""Every field of a config in one table: its default, what it accepts, and what it means.

`efft.config` makes the defaults, the checks and the help from it, so that they cannot drift apart.
"""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from efft.formats import FORMATS


class Check(NamedTuple):
  """What a field accepts: the words for the error, the test, and the canonical form."""

  expected: str
  test: Callable[[Any], bool]
  cast: Callable[[Any], Any] = lambda value: value
  kind: type = object  # how ml_collections reads an override; object: any Python literal
  example: str = ''  # of a list, as it is written on the command line


class Field(NamedTuple):
  """A row of the table."""

  default: Any
  check: Check
  about: str
  steers: bool = True  # False: changing it between start and resume leaves the run the same run


def integer(low: int, high: int = 2**31 - 1) -> Check:
  def test(x):
    return isinstance(x, int) and not isinstance(x, bool) and low <= x <= high

  return Check(f'an integer from {low} to {high}', test)


def real(low: float, high: float = math.inf, ends: str = '[)') -> Check:
  """A finite number in an interval; `ends` are its brackets, as in '(]' for low < x <= high."""

  def test(x):
    if not isinstance(x, int | float) or isinstance(x, bool) or abs(x) > sys.float_info.max:
      return False
    return low < x < high or (ends[0] == '[' and x == low) or (ends[1] == ']' and x == high)

  bound = f'{">=" if ends[0] == "[" else ">"} {low}'
  words = bound if high == math.inf else f'in {ends[0]}{low}, {high}{ends[1]}'
  return Check(f'a number {words}', test, float)


def choice(*names: str) -> Check:
  return Check(f'one of {", ".join(names)}', lambda x: isinstance(x, str) and x in names, kind=str)


def sequence(of: Check, words: str, example: str) -> Check:
  def test(x):
    return isinstance(x, list | tuple) and all(map(of.test, x))

  return Check(words, test, lambda x: [of.cast(value) for value in x], tuple, example)


def optional(check: Check) -> Check:
  return Check(
    f'{check.expected}, or None',
    lambda x: x is None or check.test(x),
    lambda x: x if x is None else check.cast(x),
    str if check.kind is str else object,
    check.example,
  )


def either(a: Check, b: Check) -> Check:
  return Check(
    f'{a.expected} or {b.expected}',
    lambda x: a.test(x) or b.test(x),
    lambda x: a.cast(x) if a.test(x) else b.cast(x),
    example=a.example or b.example,
  )


def _is_rules(x) -> bool:
  return isinstance(x, list | tuple) and all(
    isinstance(rule, list | tuple) and len(rule) == 2 and all(isinstance(s, str) for s in rule)
    for rule in x
  )


def _is_pairs(x) -> bool:
  return isinstance(x, list | tuple) and all(
    isinstance(pair, list | tuple) and len(pair) == 2 and all(integer(0).test(n) for n in pair)
    for pair in x
  )


TEXT = Check('a non-empty string', lambda x: isinstance(x, str) and x != '', kind=str)
SWITCH = Check('True or False', lambda x: isinstance(x, bool))
TABLE = Check('a dict', lambda x: isinstance(x, dict), kind=dict)
NAMES = sequence(TEXT, 'a list of distinct names', "('a','b')")
NAMES = NAMES._replace(test=lambda x, listed=NAMES.test: listed(x) and len(set(x)) == len(x))
RULES = Check(
  'a list of (path regex, group) pairs', _is_rules, lambda x: [list(rule) for rule in x], tuple,
  "(('params/head/.*','head'),('.*','frozen'))",
)  # fmt: skip
PAIRS = Check(
  'a list of (student layer, teacher layer), one or more, numbered from 0',
  lambda x: _is_pairs(x) and len(x) > 0,
  lambda x: [list(pair) for pair in x],
  example='((0,1),(1,3))',
)
FORMS = Check(
  'a list of (path regex, format) pairs', _is_rules, lambda x: [list(rule) for rule in x], tuple,
  "(('params/layer_0/.*/kernel','int8'),)",
)  # fmt: skip
TRACKERS = sequence(
  choice('tensorboard', 'wandb'), 'a list of tensorboard, wandb', "('tensorboard','wandb')"
)
FULL = (('params/head/.*', 'head'), ('params/.*', 'encoder'))

FIELDS = {
  'seed': Field(0, integer(0), 'of everything random: new weights, data order, dropout'),
  'task.name': Field(
    '', TEXT, 'a task of `efft tasks`, or your csv, tsv, jsonl, parquet or folder'
  ),
  'task.path': Field(None, optional(TEXT), 'read the task from this file or folder instead'),
  'task.text': Field(None, optional(TEXT), 'text column; found by itself where there is one'),
  'task.pair': Field(None, optional(TEXT), 'second text column, for sentence pairs'),
  'task.label': Field(None, optional(TEXT), 'label column'),
  'task.labels': Field(None, optional(NAMES), 'label names in class order; found by itself'),
  'task.kind': Field(
    'auto', choice('auto', 'single', 'multi', 'regression'), 'one class, several at once, a number'
  ),
  'task.train': Field(None, optional(TEXT), 'training split: its name or file'),
  'task.validation': Field(None, optional(TEXT), 'validation split: its name or file'),
  'task.test': Field(None, optional(TEXT), 'test split: its name or file'),
  'task.fraction': Field(1.0, real(0, 1, '(]'), 'share of the training rows; nested over values'),
  'task.halves': Field(False, SWITCH, "cut validation in two: the split 'report' chooses nothing"),
  'model.name': Field('all-MiniLM-L6-v2', TEXT, 'Hugging Face id, or a folder with a checkpoint'),
  'model.pooling': Field(
    'auto', choice('auto', 'cls', 'mean'), 'what the head reads; auto: what the checkpoint says'
  ),
  'model.head': Field(
    'new', choice('new', 'keep'), "keep: the checkpoint's own classifier, or that of init_from"
  ),
  'model.init_from': Field((), NAMES, 'runs whose trained deltas this one starts from'),
  'model.init_weights': Field(
    None,
    optional(sequence(real(-math.inf), 'a list of numbers', '(0.7,0.3)')),
    'of several; None: their mean',
  ),
  'model.max_length': Field(128, integer(3), 'tokens; longer texts are cut and counted'),
  'model.dtype': Field('float32', choice('float32', 'bfloat16'), 'of the computation'),
  'model.quantize': Field(
    (),
    either(choice(*FORMATS), FORMS),
    'of frozen matrices: int8, ..., or (path regex, format) pairs',
  ),
  'model.remat': Field(False, SWITCH, 'recompute layers in the backward pass to save memory'),
  'model.dropout': Field(None, optional(real(0, 1)), "None: the checkpoint's own"),
  'method': Field({}, TABLE, "{name: {'fn': 'lora.lora', option: value}}, acting in order of name"),
  'rules': Field(FULL, RULES, "what trains: first match wins, group 'frozen' stays as it is"),
  'optim.name': Field('adamw', choice('adamw', 'adafactor', 'lion'), 'optimiser'),
  'optim.lr': Field(5e-5, real(0, ends='()'), 'peak learning rate'),
  'optim.weight_decay': Field(0.01, real(0), 'decoupled'),
  'optim.schedule': Field('linear', choice('linear', 'cosine', 'constant'), 'after warm-up'),
  'optim.warmup': Field(0.06, real(0, 1), 'share of the steps'),
  'optim.clip': Field(1.0, optional(real(0, ends='()')), 'gradient norm of what trains'),
  'optim.b1': Field(0.9, real(0, 1), 'decay of the first moment'),
  'optim.b2': Field(None, optional(real(0, 1)), 'of the second moment; None: 0.999, lion 0.99'),
  'optim.eps': Field(1e-8, real(0, ends='()'), 'added to the root of the second moment'),
  'optim.ema': Field(None, optional(real(0, 1, '()')), 'decay of averaged weights, then evaluated'),
  'optim.groups': Field({}, TABLE, '{group: {lr, weight_decay, schedule, transform}}'),
  'stages': Field({}, TABLE, "in order: {'s1_tune': {field: value}, 's2': {'fn': 'prune.heads'}}"),
  'train.batch_size': Field(32, integer(1), 'examples a step, over all devices'),
  'train.accumulate': Field(1, integer(1), 'micro-batches that make up a step'),
  'train.epochs': Field(3.0, real(0, ends='()'), 'passes over the training rows'),
  'train.steps': Field(None, optional(integer(1)), 'steps, in place of epochs'),
  'train.label_smoothing': Field(0.0, real(0, 1), 'share of the target spread over all classes'),
  'train.consistency': Field(0.0, real(0), 'weight of two passes agreeing (R-Drop); 0: one pass'),
  'train.class_weights': Field(
    None,
    optional(either(choice('balanced'), sequence(real(0), 'a list of numbers >= 0', '(1,2.5)'))),
    'of the loss; balanced: rows / (classes x rows of the class)',
  ),
  'train.eval_epochs': Field(1.0, real(0, ends='()'), 'epochs between evaluations'),
  'train.eval_steps': Field(None, optional(integer(1)), 'steps, in place of eval_epochs'),
  'train.log_every': Field(10, integer(1), 'steps between lines of metrics.jsonl', steers=False),
  'train.patience': Field(None, optional(integer(1)), 'evaluations without a gain before stopping'),
  'train.save': Field('best', choice('best', 'last'), 'the weights that the run hands on'),
  'train.group_by_length': Field(False, SWITCH, 'similar lengths in a batch: faster, less random'),
  'train.checkpoint_every': Field(
    None, optional(integer(1)), 'steps; None: at evaluations', steers=False
  ),
  'distil.teacher': Field(
    '',
    Check("a run folder or bundle, or ''", lambda x: isinstance(x, str), kind=str),
    "run that this one learns from too, of the same task; '': none",
  ),
  'distil.temperature': Field(2.0, real(0, ends='()'), 'T of the softened probabilities'),
  'distil.logits': Field(0.5, real(0), 'weight of T^2 KL(teacher || student) of the classes'),
  'distil.labels': Field(0.5, real(0), "weight of the task's own loss beside a teacher"),
  'distil.hidden': Field(0.0, real(0), 'weight of the hidden states differing'),
  'distil.hidden_loss': Field(
    'mse', choice('mse', 'squared', 'cosine'), 'per token; squared: mse times the width (ZipLM)'
  ),
  'distil.attention': Field(0.0, real(0), 'weight of the attention maps differing'),
  'distil.attention_loss': Field('kl', choice('kl', 'mse'), 'per query, of the mean over heads'),
  'distil.embeddings': Field(0.0, real(0), "weight of the mse between the first layers' inputs"),
  'distil.layers': Field(
    None,
    optional(either(choice('last'), PAIRS)),
    'hidden and attention: (student, teacher) pairs; None: evenly spread',
  ),
  'eval.batch_size': Field(64, integer(1), 'examples a step of evaluation and prediction'),
  'mesh.devices': Field(None, optional(integer(1)), 'of this host; None: all', steers=False),
  'mesh.distributed': Field(False, SWITCH, 'start jax.distributed: several hosts', steers=False),
  'trackers': Field((), TRACKERS, 'besides metrics.jsonl: tensorboard, wandb', steers=False),
}
