"""What the verbs of the command line do: flags, as text -> a call of `efft.run` -> what is printed.

Nothing here imports jax, flax or transformers before a verb needs them.
"""

import ast
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efft.errors import EfftError, InputError

# What `efft recommend` keeps to.
LIMITS = {
  'max_latency_ms': 'of one call, the median',
  'max_size_mb': 'on disk',
  'max_memory_mb': 'of a training step, or as --memory says',
  'max_trained': 'trained parameters',
  'max_train_seconds': 'of training',
  'min_metric': 'score on --split; of a loss, the most that it may be',
  'min_relative_metric': "share of the best arm's score: 0.97",
}


def train(config, workdir, resume):
  _show(_run().train(config, workdir, resume=resume))


def compress(run, config, workdir, resume):
  _show(_run().compress(run, config, workdir, resume=resume))


def evaluate(run, split):
  _show(_run().evaluate(run, split=split))


def predict(run, input, output, text_column):
  if input is None and text_column:
    fix = 'pass --input=FILE, or drop --text_column'
    raise InputError('--text_column', repr(text_column), '--input with columns', fix)
  texts = _standard_input() if input is None else None
  records = _run().predict(run, texts, input=input, output=output, text_column=text_column)
  if output is None:
    for record in records:
      print(json.dumps(record, ensure_ascii=False), flush=True)


def combine(runs, output, how, weights, density, majority, rank, head, seed):
  options = {
    'weights': _numbers('weights', weights, float),
    'density': _number('density', density, float),
    'rank': _number('rank', rank, int),
    'seed': _number('seed', seed, int),
  }
  runs = [run for run in runs.split(',') if run]
  _show(_run().combine(runs, output, how, majority=majority, head=head, **options))


def merge(run, output, tolerance, split):
  tolerance = _number('tolerance', tolerance, float)
  _show(_run().merge(run, output, tolerance=tolerance, split=split))


def export(run, output, format, tolerance, split, layout, name):
  tolerance = _number('tolerance', tolerance, float)
  found = _run().export(
    run, output, format, tolerance=tolerance, split=split, layout=layout, name=name
  )
  _show(found)


def import_(source, base, output, task, labels, max_length):
  labels = labels.split(',') if labels else None
  max_length = _number('max_length', max_length, int)
  _show(
    _run().import_adapter(source, base, output, task=task, labels=labels, max_length=max_length)
  )


def bench(run, batch, length, precision, merged, output, seconds):
  options = {
    'batch': _numbers('batch', batch, int),
    'length': _numbers('length', length, int),
    'precision': precision.split(','),
    'seconds': _number('seconds', seconds, float),
  }
  bench, rows = _run().bench, []
  try:
    bench(run, merged=merged, output=output, on_row=rows.append, **options)
  finally:
    if rows:  # what was measured before an interruption, too
      from efft.bench import show

      show.table(rows)


def sweep(study, workdir, shard, jobs, dry_run, retry_failed):
  prepare()
  from efft.sweep import sweep  # not by way of efft.run: jax is for the processes that train

  jobs = _number('jobs', jobs, int)
  records = sweep(
    study, workdir, shard=shard, jobs=jobs, dry_run=dry_run, retry_failed=retry_failed
  )
  if failed := sum(record['status'] != 'ok' for record in records):
    fix = f'see {workdir}/logs; --retry_failed makes them again'
    raise EfftError(f'{failed} of {len(records)} runs failed; {fix}')


def report(runs, output, against, baseline, split, title):
  from efft.report import publish  # not by way of efft.run: no report needs jax

  _show(publish.report(runs, output, against=against, baseline=baseline, split=split, title=title))


def recommend(runs, **options):
  from efft.report import recommend

  kinds = {'latency_batch': int, 'latency_length': int, **dict.fromkeys(LIMITS, float)}
  options = {
    name: _number(name, value, kinds[name]) if name in kinds else value
    for name, value in options.items()
  }
  for line in recommend.lines(recommend.recommend(runs, **options)):
    print(line)


def inspect(config):
  _show(_run().inspect(config))


def fetch(task, model):
  if not task and not model:
    raise InputError('efft fetch', 'no flags', '--task or --model', 'name what to fetch')
  _show(_run().fetch(task, model))


def tasks():
  from efft.data import tasks

  _show({name: task.about for name, task in tasks.TASKS.items()})


def methods():
  from efft import config

  files = {file.stem: file for folder in config.folders()[::-1] for file in folder.glob('*.py')}
  costs = json.loads(Path(__file__).with_name('methods.json').read_text(encoding='utf-8'))
  rows, staged = [], []
  for name, file in sorted(files.items()):
    text = file.read_text(encoding='utf-8')
    doc = ast.get_docstring(ast.parse(text)) or ''
    if 'config.stages =' in text:
      staged.append((name, doc.splitlines()[0] if doc else ''))
      continue
    known = costs.get(name)  # a config of the user's own has not been counted
    numbers = ('-',) * 4
    if known:
      merges = 'yes' if known['merges'] else 'no'
      extra = f'{100 * known["flops"]:.2f}%'
      numbers = f'{known["trained"]:,}', f'{known["stored"]:,}', merges, extra
    title = doc.splitlines()[0] if doc else ''
    rows.append((known['family'] if known else '-', name, *numbers, title))
  print(
    f'On BERT-base, beside a head of {costs["head"]["head"]:,}. FLOPs: what inference costs more '
    'before merging.'
  )
  head = ('family', 'config', 'trained', 'stored', 'merges', 'FLOPs', 'what')
  for family, name, trained, stored, merges, extra, title in (head, *sorted(rows)):
    numbers = f'{trained:>12}{stored:>12}{merges:>7}{extra:>9}'
    print(f'{family:<17}{name:<20}{numbers}  {title}'.rstrip())
  print('\nOf several stages, which prune or quantise (`efft compress` starts from a run):')
  for name, title in staged:
    print(f'  {name:<20}{title}'.rstrip())


def demo(workdir, short):
  prepare()
  from efft import demo

  demo.demo(workdir, short=short)


def _run():
  prepare()
  from efft import run

  return run


def prepare() -> None:
  """`environment.settle`, and who may write to stderr."""
  from efft import environment

  environment.settle()
  quiet = {
    'TF_CPP_MIN_LOG_LEVEL': '2',
    'GRPC_VERBOSITY': 'ERROR',
    'TRANSFORMERS_VERBOSITY': 'error',
    'DATASETS_VERBOSITY': 'error',
    'HF_HUB_DISABLE_TELEMETRY': '1',
    # Batches are encoded by a pool of threads in this process, before anything forks.
    'TOKENIZERS_PARALLELISM': 'true',
  }
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  warnings.filterwarnings('ignore', module=r'(?!efft)')
  from absl import logging as absl_logging  # orbax and jax write through it

  absl_logging.set_verbosity(absl_logging.ERROR)


def _number(flag: str, text: str | None, kind: type):
  try:
    return None if text is None else kind(text)
  except ValueError:
    expected = 'a whole number' if kind is int else 'a number'
    raise InputError(f'--{flag}', repr(text), expected, 'correct it') from None


def _numbers(flag: str, text: str | None, kind: type):
  return None if text is None else [_number(flag, part, kind) for part in text.split(',')]


def _standard_input() -> Iterator[str]:
  if sys.stdin.isatty():
    print('efft: one text a line; end with Ctrl-D', file=sys.stderr)
  for number, line in enumerate(sys.stdin.buffer, 1):
    try:
      text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
    except UnicodeDecodeError as error:
      where = f'standard input:{number}'
      raise InputError(where, repr(line[error.start : error.end]), 'UTF-8', 'convert it') from None
    yield text.rstrip('\r\n')


def _show(value: Any) -> None:
  """Prints a result as aligned lines: nested names are dotted, rows of a list indented."""
  if value is None:
    return
  if not isinstance(value, dict):
    print(value)
    return
  lines = list(_lines(value))
  width = max((len(name) for name, _ in lines), default=0)
  for name, text in lines:
    print(f'{name:<{width}}  {text}'.rstrip())


def _lines(tree: dict, prefix: str = '') -> Iterator[tuple[str, str]]:
  for key, value in tree.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict):
      yield from _lines(value, f'{name}.')
    elif isinstance(value, list | tuple) and any(isinstance(row, dict | list) for row in value):
      for i, row in enumerate(value):
        yield f'{name}.{i}', json.dumps(row, ensure_ascii=False, default=str)
    elif isinstance(value, list | tuple):
      yield name, ', '.join(map(str, value))
    elif isinstance(value, float):
      yield name, f'{value:.4f}' if abs(value) >= 1e-3 or value == 0 else f'{value:.3g}'
    elif value is None:
      yield name, '-'
    else:
      yield name, f'{value:,}' if type(value) is int else str(value)
