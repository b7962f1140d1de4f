"""The command line: `efft <verb> --flags`, each verb a thin layer over a function of `efft.run`.

Nothing here imports jax, flax or transformers before a verb needs them: help and refusals answer
at once.
"""

import ast
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from efft import command
from efft.command import CONFIG, Flag, Verb
from efft.errors import EfftError, InputError


def _train(config, workdir, resume):
  _show(_run().train(config, workdir, resume=resume))


def _compress(run, config, workdir, resume):
  _show(_run().compress(run, config, workdir, resume=resume))


def _evaluate(run, split):
  _show(_run().evaluate(run, split=split))


def _predict(run, input, output, text_column):
  if input is None and text_column:
    fix = 'pass --input=FILE, or drop --text_column'
    raise InputError('--text_column', repr(text_column), '--input with columns', fix)
  texts = _standard_input() if input is None else None
  records = _run().predict(run, texts, input=input, output=output, text_column=text_column)
  if output is None:
    for record in records:
      print(json.dumps(record, ensure_ascii=False), flush=True)


def _combine(runs, output, how, weights, density, majority, rank, head, seed):
  options = {
    'weights': _numbers('weights', weights, float),
    'density': _number('density', density, float),
    'rank': _number('rank', rank, int),
    'seed': _number('seed', seed, int),
  }
  runs = [run for run in runs.split(',') if run]
  _show(_run().combine(runs, output, how, majority=majority, head=head, **options))


def _merge(run, output, tolerance, split):
  tolerance = _number('tolerance', tolerance, float)
  _show(_run().merge(run, output, tolerance=tolerance, split=split))


def _export(run, output, format, tolerance, split, layout, name):
  tolerance = _number('tolerance', tolerance, float)
  found = _run().export(
    run, output, format, tolerance=tolerance, split=split, layout=layout, name=name
  )
  _show(found)


def _import(source, base, output, task, labels, max_length):
  labels = labels.split(',') if labels else None
  max_length = _number('max_length', max_length, int)
  _show(
    _run().import_adapter(source, base, output, task=task, labels=labels, max_length=max_length)
  )


def _bench(run, batch, length, precision, merged, output, seconds):
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


def _sweep(study, workdir, shard, jobs, dry_run, retry_failed):
  _prepare()
  from efft.sweep import sweep  # not by way of efft.run: jax is for the processes that train

  jobs = _number('jobs', jobs, int)
  records = sweep(
    study, workdir, shard=shard, jobs=jobs, dry_run=dry_run, retry_failed=retry_failed
  )
  if failed := sum(record['status'] != 'ok' for record in records):
    fix = f'see {workdir}/logs; --retry_failed makes them again'
    raise EfftError(f'{failed} of {len(records)} runs failed; {fix}')


def _report(runs, output, against, baseline, split, title):
  from efft.report import publish  # not by way of efft.run: no report needs jax

  _show(publish.report(runs, output, against=against, baseline=baseline, split=split, title=title))


def _recommend(runs, **options):
  from efft.report import recommend

  kinds = {'latency_batch': int, 'latency_length': int, **dict.fromkeys(LIMITS, float)}
  options = {
    name: _number(name, value, kinds[name]) if name in kinds else value
    for name, value in options.items()
  }
  for line in recommend.lines(recommend.recommend(runs, **options)):
    print(line)


def _inspect(config):
  _show(_run().inspect(config))


def _fetch(task, model):
  if not task and not model:
    raise InputError('efft fetch', 'no flags', '--task or --model', 'name what to fetch')
  _show(_run().fetch(task, model))


def _tasks():
  from efft.data import tasks

  _show({name: task.about for name, task in tasks.TASKS.items()})


def _methods():
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
  print('\nOf several stages, which prune (`efft compress` starts from a run):')
  for name, title in staged:
    print(f'  {name:<20}{title}'.rstrip())


def _demo(workdir, short):
  _prepare()
  from efft import demo

  demo.demo(workdir, short=short)


HOWS = (
  'linear', 'ties', 'dare_linear', 'dare_ties', 'magnitude_prune', 'cat', 'svd',
  'ties_svd', 'dare_linear_svd', 'dare_ties_svd', 'magnitude_prune_svd',
)  # fmt: skip
RUN = Flag('run', 'folder of a finished run', None, True)
TOLERANCE = Flag('tolerance', 'the largest difference of a logit that merging may make', '1e-3')
COMPARED = Flag('split', 'of the task, on which both forms are compared', 'validation')
OVERRIDES = """\
Any field of the config can be set: --config.optim.lr=3e-4 --config.method.lora.rank=4
`efft train --helpfull` lists them all, `efft methods` the configs that come with efft."""

RECORDS = Flag('runs', 'records.jsonl, or folders with one: runs/a,runs/b', None, True)
SCORED = Flag(
  'split', 'report: the half of validation that chose nothing', 'report', False, ('report', 'test')
)
LIMITS = {
  'max_latency_ms': 'of one call, the median',
  'max_size_mb': 'on disk',
  'max_memory_mb': 'of a training step, or as --memory says',
  'max_trained': 'trained parameters',
  'max_train_seconds': 'of training',
  'min_metric': 'score on --split; of a loss, the most that it may be',
  'min_relative_metric': "share of the best arm's score: 0.97",
}

WORKDIR = Flag('workdir', 'run folder to make, or to continue', None, True)
RESUME = Flag(
  'resume', 'what to do with a run that is there', 'auto', False, ('auto', 'never', 'must')
)

VERBS = {
  'train': Verb(
    _train,
    'fine-tune a model on a task and keep the result in a run folder',
    (CONFIG, WORKDIR, RESUME),
    OVERRIDES,
  ),
  'compress': Verb(
    _compress,
    'prune or quantise a finished run, by the stages of a config',
    (RUN, CONFIG, WORKDIR, RESUME),
    OVERRIDES,
  ),
  'evaluate': Verb(
    _evaluate,
    'score a run on a split of its task',
    (RUN, Flag('split', 'a split of the task: train, validation, test', 'validation')),
  ),
  'predict': Verb(
    _predict,
    'classify texts with a run: a file, or standard input line by line',
    (
      RUN,
      Flag('input', 'csv, tsv, jsonl, parquet or txt; without it, standard input'),
      Flag('output', 'jsonl file to write; without it, standard output'),
      Flag('text_column', "column of --input; without it, the task's own"),
    ),
  ),
  'combine': Verb(
    _combine,
    'make one run of several: sums, TIES, DARE, low-rank updates; with their heads',
    (
      Flag('runs', 'folders of finished runs on one base model: runs/a,runs/b', None, True),
      Flag('output', 'run folder to make', None, True),
      Flag('how', 'what to do with the task vectors', 'linear', False, HOWS),
      Flag('weights', 'one a run: 0.7,0.3; without it, equal'),
      Flag('density', 'share of the numbers that pruning keeps; without it, 0.5'),
      Flag('majority', 'how TIES elects signs: total (without it) or frequency'),
      Flag('rank', 'of what svd leaves; without it, the largest of the runs'),
      Flag('head', 'what to do with the heads', 'keep', False, ('keep', 'average', 'union')),
      Flag('seed', "of DARE's masks", '0'),
    ),
  ),
  'merge': Verb(
    _merge,
    'fold what a run has trained into the weights, and prove that it says the same',
    (
      RUN,
      Flag('output', 'run folder to make', None, True),
      TOLERANCE,
      COMPARED,
    ),
  ),
  'export': Verb(
    _export,
    'write a run for transformers, HF PEFT or AdapterHub',
    (
      RUN,
      Flag('output', 'folder to make', None, True),
      Flag(
        'format',
        'hf: merged, for transformers; others: the adapter with its head',
        'hf',
        False,
        ('hf', 'peft', 'adapterhub'),
      ),
      TOLERANCE,
      COMPARED,
      Flag('layout', "of AdapterHub's weights", 'safetensors', False, ('safetensors', 'bin')),
      Flag('name', "of the adapter in AdapterHub's files", 'efft'),
    ),
  ),
  'import': Verb(
    _import,
    'make a run of an adapter that HF PEFT or AdapterHub wrote',
    (
      Flag('source', 'its folder, or a Hugging Face id', None, True),
      Flag('base', 'the encoder it was trained on: a folder or a Hugging Face id', None, True),
      Flag('output', 'run folder to make', None, True),
      Flag('task', 'its task, to evaluate and train on: mrpc, or reviews.csv,text=review'),
      Flag('labels', "class names in the order of its head's outputs: bad,good"),
      Flag('max_length', 'tokens', '128'),
    ),
  ),
  'bench': Verb(
    _bench,
    'measure how long a run takes to answer, by batch, length and precision',
    (
      RUN,
      Flag('batch', 'texts at a time', '1,8,32'),
      Flag('length', 'tokens of each; without it, 32,128,512 as far as the model goes'),
      Flag('precision', 'f32, bf16; int8: merged, then rounded', 'f32,bf16,int8'),
      Flag('merged', 'fold what was trained into the weights first', False),
      Flag('output', 'JSONL file to which a record of the run with these times is added'),
      Flag('seconds', 'for how long each combination is measured', '2'),
    ),
  ),
  'sweep': Verb(
    _sweep,
    'make the runs of a study that are not recorded yet',
    (
      Flag('study', 'a Python file that yields runs, as experiments/example/study.py', None, True),
      Flag('workdir', 'folder of records.jsonl; several sweeps may share it', None, True),
      Flag('shard', 'i/n: every n-th run, from the i-th', '0/1'),
      Flag('jobs', 'processes at once; on a CPU each gets its share of the cores', '1'),
      Flag('dry_run', 'list the runs and what is known of them', False),
      Flag('retry_failed', 'make runs again that have failed', False),
    ),
    'Stopped in any way, the same command goes on; runs that had begun, where they were.',
  ),
  'report': Verb(
    _report,
    'tables, plots and a page of what recorded runs reach and cost',
    (
      RECORDS,
      Flag('output', 'folder to make; an earlier report is replaced', None, True),
      Flag('against', 'other runs: what has changed since, arm by arm'),
      Flag('baseline', 'arm that others are tested against; without it, full or the largest'),
      SCORED,
      Flag('title', 'of the page', 'What it costs'),
    ),
  ),
  'recommend': Verb(
    _recommend,
    'the best recorded configuration under limits, and what each limit costs',
    (
      RECORDS,
      Flag('task', 'of the records, where they hold several'),
      Flag('output', 'folder to make: config.json and the recommendation'),
      SCORED,
      *(Flag(name, about) for name, about in LIMITS.items()),
      Flag('latency_batch', 'texts a call; without it, 1 where that was measured'),
      Flag('latency_length', 'tokens of each; without it, 128 where that was measured'),
      Flag('size', 'of --max_size_mb', 'whole', False, ('whole', 'bundle')),
      Flag('memory', 'of --max_memory_mb', 'step', False, ('step', 'inference', 'peak')),
    ),
  ),
  'inspect': Verb(
    _inspect,
    'show the data, the model and what would train, without training',
    (CONFIG,),
    OVERRIDES,
  ),
  'tasks': Verb(_tasks, 'list the tasks'),
  'methods': Verb(_methods, 'list the methods, one config file each'),
  'fetch': Verb(
    _fetch,
    'download a task or a model into the cache',
    (Flag('task', 'name of a task'), Flag('model', 'Hugging Face id')),
  ),
  'demo': Verb(
    _demo,
    'LoRA on film reviews, from download to table',
    (
      Flag('workdir', 'run folder', 'runs/demo'),
      Flag('short', 'a few steps only', False),
    ),
  ),
}


INTRO = """\
efft: cheap fine-tuning of BERT-like encoders

  efft train    --config=configs/lora.py:task=rotten_tomatoes --workdir=runs/lora
  efft evaluate --run=runs/lora --split=test
  efft predict  --run=runs/lora --input=texts.csv --output=out.jsonl"""


def main(argv: list[str] | None = None) -> int:
  """Runs one command line (default: the process's own) and returns its exit code."""
  return command.run(VERBS, INTRO, sys.argv[1:] if argv is None else list(argv))


def _run():
  _prepare()
  from efft import run

  return run


def _prepare() -> None:
  """Settles what must be settled before jax is imported: malloc, and who may write to stderr."""
  from efft import cpu
  from efft.data import packages

  cpu.keep_heap()
  cpu.keep_programs(packages.cache_root() / 'programs')
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
