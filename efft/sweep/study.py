"""A study file read and checked: which runs it asks for, and what each is called on disk."""

import functools
import json
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from efft import alike
from efft import config as configs
from efft.errors import InputError, nearest, unknown

PRECISIONS = ('f32', 'bf16', 'int8')
SPLITS = ('validation', 'report', 'test')
SETTINGS = {
  'LATENCY': (), 'KEEP': False, 'TASK_HALVES': True, 'POPULATIONS': True, 'SPLITS': SPLITS,
}  # fmt: skip


class Run(NamedTuple):
  """What a study file yields.

  arm: what is compared; runs of one arm differ in seed and hyper-parameters only.
  config: as for --config, 'configs/lora.py:task=sst2'.
  overrides: {dotted field: value}, as for --config.FIELD=VALUE.
  """

  arm: str
  config: str
  overrides: Mapping[str, Any] = {}


class Planned(NamedTuple):
  """A run that has been checked; everything in it is plain data."""

  arm: str
  overrides: dict[str, Any]
  config: dict  # resolved
  hash: str  # of what decides the result
  name: str  # of its folder and its log: arm, seed, eight digits of the hash

  @property
  def key(self) -> tuple[str, str]:
    """What a run is known by in the records."""
    return self.arm, self.hash


class Study(NamedTuple):
  name: str  # of the file; of its folder where the file is called study.py
  runs: list[Planned]
  repeated: int  # runs that were asked for more than once
  keep: bool  # run folders, without their checkpoints
  latency: tuple[tuple[int, int, str], ...]  # (batch, length, precision)
  populations: bool = True  # whether runs that can train together do
  splits: tuple[str, ...] = SPLITS  # that are scored


def load(file: str | os.PathLike) -> Study:
  """Reads a study file and resolves the config of each of its runs.

  The file defines `runs()`, a generator of `Run`s, and may set LATENCY (a list of (batch, length,
  precision) to measure), KEEP (True: run folders stay), TASK_HALVES (False: the validation split is
  not cut in two; see config.task.halves), POPULATIONS (False: each run in a process of its own) and
  SPLITS (of 'validation', 'report', 'test': those to score, where a test split would take long).

  Raises:
    InputError: naming the line of the file, or the run and the field, at fault.
  """
  file = Path(file)
  namespace, asked = _executed(file)
  settings = {name: namespace.get(name, default) for name, default in SETTINGS.items()}
  for name in namespace:
    close = nearest(name, SETTINGS, 0.75)
    if name.isupper() and name not in SETTINGS and close:
      raise InputError(str(file), f'a setting {name}', close, 'rename it')
  for name in ('KEEP', 'TASK_HALVES', 'POPULATIONS'):
    if not isinstance(settings[name], bool):
      raise InputError(f'{file}: {name}', repr(settings[name]), 'True or False', 'correct it')
  latency = _latency(f'{file}: LATENCY', settings['LATENCY'])
  splits = settings['SPLITS']
  if not isinstance(splits, list | tuple) or not splits or not set(splits) <= set(SPLITS):
    raise InputError(f'{file}: SPLITS', repr(splits), f'some of {SPLITS}', 'correct it')
  load_config = functools.cache(configs.load)
  runs: dict[tuple, Planned] = {}
  owners: dict[str, Planned] = {}
  for number, run in enumerate(asked, 1):
    planned = _planned(f'{file}: run {number}', run, settings['TASK_HALVES'], load_config)
    runs.setdefault(planned.key, planned)
    other = owners.setdefault(planned.name, planned)
    if other.key != planned.key:
      found = f'arms {other.arm!r} and {planned.arm!r}, whose folders would both be {planned.name}'
      raise InputError(str(file), found, 'names that differ in letters or digits', 'rename one')
  if not runs:
    raise InputError(str(file), 'no runs', 'runs() to yield some', 'mend the file')
  name = file.resolve().parent.name if file.stem == 'study' else file.stem
  return Study(
    name,
    [*runs.values()],
    len(asked) - len(runs),
    settings['KEEP'],
    latency,
    settings['POPULATIONS'],
    tuple(splits),
  )


def plan(runs: Sequence[Planned], together: bool = True, jobs: int = 1) -> list[list[Planned]]:
  """Groups runs into jobs, a process each.

  Args:
    runs: in the order in which they are wanted.
    together: whether runs that differ in numbers alone may train as a population.
    jobs: processes at once, for all of which there should be something to do.
  """
  groups: dict[str, list[Planned]] = {}
  for run in runs:
    groups.setdefault(_program(run) if together else run.hash + run.arm, []).append(run)
  size = max(1, min(alike.PLACES, -(-len(runs) // jobs)))
  return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _program(run: Planned) -> str:
  """The same for runs that one program can train side by side."""
  shared = alike.common(run.config)
  if shared is None:
    return run.hash + run.arm
  config = run.config
  task, train = dict(config['task']), config['train']
  if train['steps'] and train['eval_steps']:
    task.pop('fraction')  # which changes the number of steps otherwise
  ranks = {name: spec.get('rank') for name, spec in config['method'].items()}
  return json.dumps([shared, task, ranks], sort_keys=True)


def part(runs: Sequence[Planned], shard: str) -> list[Planned]:
  """The runs of a shard 'i/n': every n-th from the i-th, 0 <= i < n."""
  match = re.fullmatch(r'(\d+)/(\d+)', shard)
  if not match or not int(match[1]) < int(match[2]):
    raise InputError('--shard', repr(shard), 'i/n with 0 <= i < n', 'as in --shard=0/2')
  return list(runs[int(match[1]) :: int(match[2])])


def changed(config: configs.ConfigDict, overrides: Mapping[str, Any]) -> dict:
  """A config as a plain dictionary with `overrides` put in; their values are not checked yet."""
  values = configs.plain(config)
  for name, value in overrides.items():
    node: Any = values
    *groups, key = name.split('.')
    for group in groups:
      node = node.get(group) if isinstance(node, dict) else None
    if not isinstance(node, dict) or key not in node:
      raise unknown(f'override {name}', 'field', name, configs.paths(config))
    node[key] = value
  return values


def _executed(file: Path) -> tuple[dict, list]:
  """What a study file defines, and what its `runs()` yields."""
  # Not by an import: it would leave a __pycache__ beside the user's file.
  namespace = {'__name__': f'study_{file.stem}', '__file__': str(file)}
  try:
    source = file.read_bytes()
  except OSError as error:
    found = f'no readable file ({error.strerror})'
    raise InputError(f'--study={file}', found, 'a Python file', 'pass another') from None
  try:
    exec(compile(source, str(file), 'exec'), namespace)
    if not callable(namespace.get('runs')):
      raise InputError(str(file), 'no function runs', 'def runs():', 'see `efft sweep --help`')
    return namespace, list(namespace['runs']())
  except Exception as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = lines[-1] if lines else getattr(error, 'lineno', None)
    where = f'{file}:{line}' if line else str(file)
    if isinstance(error, InputError):
      if line:
        error = InputError(f'{where}: {error.where}', error.found, error.expected, error.fix)
      raise error from None
    found = f'{type(error).__name__} {" ".join(str(error).split())!r}'
    raise InputError(where, found, 'runs() to yield runs', 'mend the file') from error


def _latency(where: str, settings: Any) -> tuple[tuple[int, int, str], ...]:
  expected = f'(batch, length, precision), as in (1, 128, {PRECISIONS[0]!r})'
  if not isinstance(settings, list | tuple):
    raise InputError(where, repr(settings), f'a list of {expected}', 'correct it')
  for item in settings:
    good = isinstance(item, list | tuple) and len(item) == 3 and item[2] in PRECISIONS
    if not good or not all(type(n) is int and n > 0 for n in item[:2]):
      fix = f'precisions are {", ".join(PRECISIONS)}'
      raise InputError(where, repr(item), expected, fix)
  return tuple(map(tuple, settings))


def _planned(where: str, run: Any, halves: bool, load_config) -> Planned:
  # A tuple of the same length that is not a Run may have its parts in another order.
  if not isinstance(run, Run):
    fix = 'from efft.sweep import Run'
    raise InputError(where, repr(run)[:80], 'Run(arm, config, overrides)', fix)
  for field, kind in (('arm', str), ('config', str), ('overrides', Mapping)):
    value = getattr(run, field)
    if not isinstance(value, kind) or (kind is str and not value.strip()):
      expected = 'a dictionary' if kind is Mapping else 'a name'
      raise InputError(f'{where}: {field}', repr(value)[:80], expected, 'correct it')
  where = f'{where} ({run.arm})'
  overrides = {str(name): _plain(value) for name, value in run.overrides.items()}
  try:
    given = changed(load_config(run.config), overrides)
    if halves and 'task.halves' not in overrides and isinstance(given.get('task'), dict):
      given['task']['halves'] = True
    resolved = configs.resolve(given)
  except InputError as error:
    where = f'{where}: {error.where}'
    raise InputError(where, error.found, error.expected, error.fix) from None
  digest = configs.config_hash(resolved)
  slug = re.sub(r'[^a-z0-9]+', '-', run.arm.lower()).strip('-')[:48] or 'run'
  name = f'{slug}-{resolved["seed"]}-{digest[:8]}'
  return Planned(run.arm, overrides, resolved, digest, name)


def _plain(value: Any) -> Any:
  """numpy's scalars and arrays, tuples and paths as what JSON gives back."""
  if hasattr(value, 'tolist'):
    value = value.tolist()
  if isinstance(value, Mapping):
    return {str(key): _plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(item) for item in value]
  return os.fspath(value) if isinstance(value, os.PathLike) else value
