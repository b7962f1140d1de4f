"""Configs: made by short Python functions, checked field by field, compared and hashed.

A config file is a short Python function that takes `default(arg)` and changes a few lines:

    from efft.config import default

    def get_config(arg=''):
      config = default(arg)
      config.optim.lr = 1e-3
      return config

`load('configs/lora.py:task=reviews.csv,text=review')` runs it, `resolve(config)` checks every value
and returns plain JSON-ready data. ml_collections takes True for an int, NaN for a float and a list
of anything for a list, so no value is believed before `resolve`.
"""

import ast
import copy
import hashlib
import json
import re
import traceback
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FieldReference

from efft import functions
from efft.errors import InputError, alike, meant, nearest, unknown
from efft.fields import FIELDS, TABLE, Field

PACKAGE = Path(__file__).resolve().parent


OPEN = tuple(name for name, field in FIELDS.items() if field.check is TABLE)
# What all stages of a run share.
FIXED = ('task.', 'mesh.', 'model.name', 'model.head', 'model.pooling', 'stages', 'trackers')
_DIGITS = re.compile(r'(\d+)')
GROUP_FIELDS = ('lr', 'weight_decay', 'schedule', 'transform')
# `file.py:key=value,...`: every task field by its own name, and what everybody sets.
SHORT = {name.partition('.')[2]: name for name in FIELDS if name.startswith('task.')}
SHORT |= {'task': SHORT.pop('name'), 'model': 'model.name', 'init_from': 'model.init_from'}


def default(arg: str = '') -> ConfigDict:
  """The config of full fine-tuning with `arg` applied: 'task=reviews.csv,text=review,label=stars'.

  Labels, and runs to start from, are separated by '|'. A value that holds a comma goes through
  `--config.FIELD=` instead.
  """
  config = ConfigDict()
  for name, field in FIELDS.items():
    group, _, key = name.rpartition('.')
    if group and group not in config:
      config[group] = ConfigDict()
    kind = field.check.kind
    value = ConfigDict() if kind is dict else FieldReference(field.default, field_type=kind)
    (config[group] if group else config)[key] = value
  for piece in filter(None, arg.split(',')):
    key, equals, value = (part.strip() for part in piece.partition('='))
    if not equals or not value:
      found = repr(piece.strip())
      raise InputError('--config=FILE:' + arg, found, 'key=value', "as in 'task=reviews.csv'")
    if key not in SHORT:
      where = '--config=FILE:' + arg
      if flags := flags_of(key, FIELDS):
        expected = f'one of {", ".join(sorted(SHORT))}'
        raise InputError(where, f'unknown key {key!r}', expected, f'did you mean {flags}?')
      raise unknown(where, 'key', key, SHORT, 'pass other fields as --config.FIELD=')
    _assign(config, SHORT[key], value.split('|') if key in ('labels', 'init_from') else value)
  return config.lock()


def flags_of(part: str, names) -> str:
  """'--config.optim.lr' for 'lr': the fields of `names` that end so, ' or ' between; '' if none."""
  return ' or '.join(f'--config.{name}' for name in meant(part, alike(part, names)))


def _assign(config: ConfigDict, name: str, value: Any) -> None:
  """Sets config.<name>; a string for a field that is not one is read as a Python literal."""
  kind = FIELDS[name].check.kind
  if isinstance(value, str) and kind is not str:
    try:
      value = ast.literal_eval(value)
    except (SyntaxError, ValueError):
      pass
  *groups, key = name.split('.')
  for group in groups:
    config = config[group]
  config[key] = tuple(value) if kind is tuple else value


def folders() -> list[Path]:
  """Where config files are: `configs/` here, in the installed package, and in a source checkout."""
  return [Path('configs'), PACKAGE / 'configs', PACKAGE.parent / 'configs']


def find(path: str) -> Path:
  """The config file at `path`; `configs/lora.py` also names the one that comes with efft."""
  file = Path(path)
  if file.parent == Path('configs'):
    candidates = [folder / file.name for folder in folders()]
  else:
    candidates = [file]
  for candidate in candidates:
    if candidate.is_file():
      return candidate
  known = {f'configs/{f.name}' for folder in folders() for f in folder.glob('*.py')}
  close = nearest(f'configs/{file.stem}.py', known, 0.85)
  fix = f'did you mean {close}?' if close else 'see `efft methods`'
  raise InputError('--config', f'no file {path!r}', 'a config file', fix)


def load(spec: str) -> ConfigDict:
  """The locked config of 'FILE.py[:arg]', or of the config.json that an earlier run left.

  Every option of the methods and every group of the rules is present afterwards, so that
  `--config.method.lora.dropout=0.1` works without a line in the file.
  """
  path, _, arg = spec.partition(':')
  file = find(path)
  if file.suffix == '.json':
    config = _from_json(file, arg)
  else:
    config = _from_python(file, arg)
  missing = sorted(FIELDS.keys() - _flatten(config.to_dict()).keys())
  if missing:
    fix = 'start from efft.config.default(arg)'
    raise InputError(str(file), f'no field {missing[0]}', 'every field', fix)
  _checked('config.rules', config.rules, FIELDS['rules'])
  with config.unlocked():
    for name, method in config.method.items():
      if not isinstance(method, ConfigDict):
        raise InputError(f'config.method.{name}', repr(method), 'a dict', f'mend {file}')
      config.method[name] = _opened(method, f'config.method.{name}')
    for name, stage in config.stages.items():
      if isinstance(stage, ConfigDict) and 'fn' in stage:
        config.stages[name] = _opened(stage, f'config.stages.{name}', functions.COMPRESS)
    for group in {group for _, group in config.rules} - {'frozen'}:
      if group not in config.optim.groups:
        config.optim.groups[group] = ConfigDict()
      for key in GROUP_FIELDS:
        value = config.optim.groups[group].get(key)
        if isinstance(value, ConfigDict):
          value = _opened(value, f'config.optim.groups.{group}.{key}')
        else:
          value = FieldReference(value, field_type=object)
        config.optim.groups[group][key] = value
  return config.lock()


def _opened(spec: ConfigDict, where: str, folder: Path = functions.FOLDER) -> ConfigDict:
  """A function and its options with those that it leaves at their defaults."""
  given = {k: v for k, v in spec.items() if k != 'fn'}
  known = functions.signature(spec.get('fn'), folder, where).items()
  opened = ConfigDict({'fn': spec.get('fn')})
  for option, value in ({k: v for k, v in known if v is not functions.REQUIRED} | given).items():
    opened[option] = FieldReference(value, field_type=object)
  return opened


def _from_python(file: Path, arg: str) -> ConfigDict:
  # Not by an import: it would leave a __pycache__ beside the user's file.
  namespace = {'__name__': f'config_{file.stem}', '__file__': str(file)}
  try:
    exec(compile(file.read_bytes(), str(file), 'exec'), namespace)
    config = namespace['get_config'](arg)
  except InputError:
    raise
  except Exception as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    line = lines[-1] if lines else getattr(error, 'lineno', None)
    where = f'{file}:{line}' if line else str(file)
    found = f'{type(error).__name__} {" ".join(str(error).split())!r}'
    raise InputError(where, found, 'get_config(arg) to return a config', 'mend the file') from error
  if not isinstance(config, ConfigDict):
    found = f'get_config returning {type(config).__name__}'
    raise InputError(str(file), found, 'a ConfigDict', 'start from efft.config.default(arg)')
  return config


def _from_json(file: Path, arg: str) -> ConfigDict:
  try:
    values = resolve(json.loads(file.read_text()))
  except (ValueError, RecursionError) as error:
    raise InputError(
      str(file), str(error), 'the config.json of a run', 'pass another file'
    ) from None
  config = default()
  for name, value in _flatten(values).items():
    _assign(config, name, ConfigDict(value) if name in OPEN else value)
  if arg:
    raise InputError('--config', f'{arg!r} after a .json', 'no argument', 'use --config.FIELD=')
  return config


def _flatten(config, prefix='') -> dict[str, Any]:
  flat = {}
  for key, value in config.items():
    name = f'{prefix}{key}'
    if isinstance(value, dict) and name not in OPEN:
      flat |= _flatten(value, f'{name}.')
    else:
      flat[name] = value
  return flat


def paths(config: ConfigDict) -> dict[str, Any]:
  """Every dotted name that an override may set, methods and groups included, and its value."""
  names = {}

  def walk(node, prefix):
    for key, value in node.items():
      names[prefix + key] = value
      if isinstance(value, ConfigDict):
        walk(value, f'{prefix}{key}.')

  walk(config, '')
  return names


def plain(config: ConfigDict | dict) -> dict:
  """A config as nested dictionaries of its own, unchecked."""
  return config.to_dict() if isinstance(config, ConfigDict) else copy.deepcopy(config)


def resolve(config: ConfigDict | dict, task: bool = True) -> dict:
  """The checked config as plain data that JSON gives back unchanged.

  Raises InputError, one line that names the field, what it holds and what it should hold.
  """
  if isinstance(config, ConfigDict):
    config = config.to_dict()
  if not isinstance(config, dict):
    raise InputError('config', type(config).__name__, 'a dict', 'use efft.config.load')
  flat = _flatten(config)
  for name in flat:
    if name not in FIELDS:
      raise unknown(f'config.{name}', 'field', name, FIELDS)
  resolved = {}
  for name, field in FIELDS.items():
    value = flat.get(name, field.default)
    if name == 'task.name' and not value and task:
      fix = 'add it to the config, as in --config=configs/lora.py:task=rotten_tomatoes'
      raise InputError('config.task.name', repr(value), 'a task, file or folder', fix)
    absent = name == 'task.name' and not value
    _put(resolved, name, value if absent else _checked(f'config.{name}', value, field))
  # By name, which is ConfigDict's own order: at a site that several match, the order matters.
  methods = sorted(resolved['method'].items())
  resolved['method'] = {name: _method(name, spec) for name, spec in methods}
  resolved['stages'] = {
    name: _stage(f'config.stages.{name}', spec)
    for name, spec in sorted(resolved['stages'].items(), key=lambda item: _natural(item[0]))
  }
  _refuse_joined(resolved['model']['init_from'])
  trained = _trained_groups(resolved['rules'])
  resolved['optim']['groups'] = _groups(resolved['optim']['groups'], trained)
  return resolved


def _refuse_joined(runs: list[str]) -> None:
  """Several runs in one string, which would be read as one path."""
  for run in runs:
    if ',' in run and not Path(run).exists():
      several = ','.join(repr(part.strip()) for part in run.split(',') if part.strip())
      fix = f'pass several as --config.model.init_from="({several})"'
      raise InputError('config.model.init_from', repr(run), 'folders of runs', fix)


def _checked(where: str, value: Any, field: Field) -> Any:
  if not field.check.test(value):
    example = f'"{field.check.example}"' if field.check.example else '...'
    fix = f'pass --{where}={example} ({field.about})'
    raise InputError(where, repr(value), field.check.expected, fix)
  return field.check.cast(value)


def _trained_groups(rules) -> list[str]:
  for pattern, _ in rules:
    try:
      re.compile(pattern)
    except re.error as error:
      raise InputError(
        'config.rules', repr(pattern), 'a regular expression', f'mend it: {error}'
      ) from None
  trained = [group for _, group in rules if group != 'frozen']
  if not trained:
    fix = "give what should train a group of its own, as in ('params/head/.*', 'head')"
    raise InputError('config.rules', repr(rules), "a group besides 'frozen'", fix)
  return trained


def _natural(name: str) -> list:
  """'s10_tune' after 's2_heads'."""
  return [(0, int(part), '') if part.isdigit() else (1, 0, part) for part in _DIGITS.split(name)]


def _stage(where: str, spec: Any) -> dict:
  """A stage: a function of `compress`, or what training changes in the config for a while."""
  name = where.rpartition('.')[2]
  if not isinstance(spec, dict) or not name.isidentifier():
    expected = "a name such as 's2_heads', and a function or fields of the config"
    fix = "as in {'fn': 'prune.heads', 'share': 0.5} or {'train': {'epochs': 1.0}}"
    raise InputError(where, repr(spec), expected, fix)
  if 'fn' in spec:
    return functions.checked(where, spec, functions.COMPRESS)
  fields = {n: f for n, f in FIELDS.items() if not n.startswith(FIXED)}
  checked = {}
  for field, value in _flatten(spec).items():
    if field not in fields:
      raise unknown(where, 'field', field, fields)
    _put(checked, field, _checked(f'{where}.{field}', value, FIELDS[field]))
  return checked


def _put(tree: dict, name: str, value: Any) -> None:
  """tree['a']['b'] = value, for the name 'a.b'."""
  *groups, key = name.split('.')
  for group in groups:
    tree = tree.setdefault(group, {})
  tree[key] = value


def tuned(config: dict, stage: dict) -> dict:
  """The resolved config of a stage that trains: `config` without stages, and what it changes.

  Tables (method, groups) are taken whole.
  """
  flat = _flatten(config) | {'stages': {}} | _flatten(stage)
  changed = default()
  for name, value in flat.items():
    _assign(changed, name, ConfigDict(value) if name in OPEN else value)
  return resolve(changed)


def _groups(groups: dict, trained: list[str]) -> dict:
  checked = {}
  for group, options in groups.items():
    where = f'config.optim.groups.{group}'
    if not isinstance(options, dict):
      raise InputError(where, repr(options), 'a dict', 'as in {"lr": 1e-3}')
    if all(value is None for value in options.values()):
      continue  # opened by `load`, and left alone
    if group not in trained:
      raise unknown('config.optim.groups', 'group', str(group), trained)
    for key in options:
      if key not in GROUP_FIELDS:
        raise unknown(where, 'option', str(key), GROUP_FIELDS)
    checked[group] = {
      k: _transform(f'{where}.{k}', v)
      if k == 'transform'
      else _checked(f'{where}.{k}', v, FIELDS[f'optim.{k}'])
      for k, v in options.items()
      if v is not None
    }
  return checked


def _transform(where: str, spec: Any) -> dict:
  if not isinstance(spec, dict):
    fix = "as in {'fn': 'masks.fish', 'density': 0.005}"
    raise InputError(where, repr(spec), 'a function and its options', fix)
  return functions.checked(where, spec)


def _method(name: str, spec: Any) -> dict:
  where = f'config.method.{name}'
  if not isinstance(spec, dict) or not str(name).isidentifier():
    fix = "as in {'lora': {'fn': 'lora.lora', 'rank': 8}}"
    raise InputError(where, repr(spec), 'a name and its options', fix)
  return functions.checked(where, spec)


def _steering(resolved: dict) -> dict[str, Any]:
  return {k: v for k, v in _flatten(resolved).items() if k not in FIELDS or FIELDS[k].steers}


def config_hash(resolved: dict) -> str:
  """16 hex digits of what decides the result; logging, trackers and devices are left out."""
  text = json.dumps(_steering(resolved), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def difference(old: dict, new: dict) -> str:
  """What decides the result and differs, 'optim.lr 0.001 -> 0.0003, seed 0 -> 1'; '' if nothing."""

  def leaves(tree, prefix=''):
    if not isinstance(tree, dict):
      return {prefix: tree}
    return {k: v for key, sub in tree.items() for k, v in leaves(sub, f'{prefix}.{key}').items()}

  a, b = leaves(_steering(old)), leaves(_steering(new))
  changed = [k for k in {**a, **b} if k not in a or k not in b or a[k] != b[k]]

  def show(side, key):
    return repr(side[key]) if key in side else 'absent'

  return ', '.join(f'{key[1:]} {show(a, key)} -> {show(b, key)}' for key in changed)
