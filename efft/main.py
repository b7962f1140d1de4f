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
from typing import Any

from efft import command
from efft.command import CONFIG, Flag, Verb
from efft.errors import InputError


def _train(config, workdir, resume):
  _show(_run().train(config, workdir, resume=resume))


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
  for name, file in sorted(files.items()):
    doc = ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or ''
    print(f'{name:<12}{doc.splitlines()[0] if doc else ""}')


def _demo(workdir, short):
  _prepare()
  from efft import demo

  demo.demo(workdir, short=short)


RUN = Flag('run', 'folder of a finished run', None, True)
OVERRIDES = """\
Any field of the config can be set: --config.optim.lr=3e-4 --config.method.lora.rank=4
`efft train --helpfull` lists them all, `efft methods` the configs that come with efft."""

VERBS = {
  'train': Verb(
    _train,
    'fine-tune a model on a task and keep the result in a run folder',
    (
      CONFIG,
      Flag('workdir', 'run folder to make, or to continue', None, True),
      Flag(
        'resume', 'what to do with a run that is there', 'auto', False, ('auto', 'never', 'must')
      ),
    ),
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
