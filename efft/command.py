"""What makes a command line of verbs: flags, help, errors and exit codes.

Exit codes: 0 done; 1 a bug of efft, or failed runs of a sweep; 2 bad input; 3 diverged; 4
environment (disk, permission, memory); 75 preempted, the same command continues; 130 interrupted;
141 the reader of our output went away. An error is one line on standard error; EFFT_TRACEBACK=1
adds where it came from.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from efft import __version__
from efft.errors import (
  EfftError,
  EnvironmentProblem,
  InputError,
  nearest,
  out_of_memory,
  unknown,
)


class Flag(NamedTuple):
  """--name=VALUE; a default of None together with `required` means that it must be given."""

  name: str
  about: str
  default: Any = None
  required: bool = False
  choices: tuple[str, ...] = ()


class Verb(NamedTuple):
  call: Callable[..., None]  # takes the flags as keyword arguments
  about: str
  flags: tuple[Flag, ...] = ()
  more: str = ''


CONFIG = Flag(
  'config', 'FILE.py[:key=value,...], as in configs/lora.py:task=reviews.csv', None, True
)
# Another flag of this name differs in its words alone.
STAGES = CONFIG._replace(about='FILE.py of stages, as configs/prune_heads.py or configs/int8.py')


def run(verbs: Mapping[str, Verb], intro: str, args: list[str]) -> int:
  """Runs one command line and returns its exit code; `intro` stands above the list of verbs."""
  try:
    _dispatch(verbs, intro, args)
    sys.stdout.flush()
    return 0
  except BrokenPipeError:
    # Python flushes standard output once more at exit, and would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
  except KeyboardInterrupt:
    return _report('interrupted', 130)
  except Exception as error:
    return _report(*_describe(error))


def _report(message: str, code: int) -> int:
  if os.environ.get('EFFT_TRACEBACK'):
    traceback.print_exc()
  print(f'efft: {message}' if code == 130 else f'efft: error: {message}', file=sys.stderr)
  return code


def _describe(error: Exception) -> tuple[str, int]:
  """(message, exit code)."""
  text = ' '.join(str(error).split())
  if isinstance(error, EfftError):
    return str(error), error.exit_code
  if isinstance(error, OSError) and error.strerror:
    where = repr(str(error.filename)) if error.filename else 'input or output'
    return f'{where}: {error.strerror}', EnvironmentProblem.exit_code
  if out_of_memory(error):
    fix = 'lower config.train.batch_size, raise config.train.accumulate, or set config.model.remat'
    return f'out of memory; {fix}', EnvironmentProblem.exit_code
  hint = '' if os.environ.get('EFFT_TRACEBACK') else '; EFFT_TRACEBACK=1 shows where'
  return f'{type(error).__name__}: {text} (this is a bug of efft{hint})', 1


def _dispatch(verbs: Mapping[str, Verb], intro: str, args: list[str]) -> None:
  asks = ('--help', '-help', '-h', '--helpfull', '-helpfull', '--helpshort')
  if not args or args[0] in asks or args == ['help']:
    print(_help(verbs, intro))
    return
  if args[0] == '--version':
    print(f'efft {__version__}')
    return
  if args[0] == 'help':
    args = [*args[1:], '--help']
  name, *rest = args
  if name not in verbs:
    names = ', '.join(verbs)
    raise InputError(
      'efft', f'unknown verb {name!r}', f'one of {names}', _did_you_mean(name, verbs)
    )
  if asked := [arg for arg in rest if arg in asks]:
    print(_verb_help(name, verbs[name], rest, everything='full' in asked[0]))
    return
  verb = verbs[name]
  verb.call(**_parse(name, verb, rest))


def _did_you_mean(name: str, names, otherwise: str = 'see `efft --help`') -> str:
  close = nearest(name, names, 0.5)
  return f'did you mean {close}?' if close else otherwise


def _parse(name: str, verb: Verb, args: list[str]) -> dict[str, Any]:
  """Reads the flags of a verb; every refusal is an InputError that names the flag."""
  from absl import flags
  from ml_collections import config_flags

  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  see = f'see `efft {name} --help`'
  for flag in verb.flags:
    define = flags.DEFINE_boolean if isinstance(flag.default, bool) else flags.DEFINE_string
    if flag.name != CONFIG.name:
      define(flag.name, flag.default, flag.about, flag_values=values)
  known = [f'--{flag.name}' for flag in verb.flags]
  own = _config_flag(verb)
  for arg in args:
    given = re.match(r'--?(?:no)?((\w+)[\w.]*)', arg)
    if given and f'--{given[2]}' not in known:
      raise _unknown_flag(name, given[1], known, see, _fields(args) if own else ())
  try:
    argv = values.read_flags_from_files(['efft', *args], force_gnu=True)
    config, argv = _load_config(argv, own) if own else (None, argv)
    if config is not None:
      config_flags.DEFINE_config_dict('config', config, flag_values=values, sys_argv=argv)
    rest = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise _unknown_flag(name, error.flagname, known, see) from None
  except flags.Error as error:
    found = repr(' '.join(str(error).split()))
    raise InputError(f'efft {name}', found, '--flag=value', see) from error
  if rest:
    raise InputError(f'efft {name}', repr(rest[0]), 'flags only', see)
  given = {flag.name: values[flag.name].value for flag in verb.flags}
  for flag in verb.flags:
    value = given[flag.name]
    if value == '' or (value is None and flag.required):
      raise InputError(f'--{flag.name}', 'nothing', flag.about, see)
    if flag.choices and value not in flag.choices:
      expected = f'one of {", ".join(flag.choices)}'
      fix = _did_you_mean(value, flag.choices, see)
      raise InputError(f'--{flag.name}', repr(value), expected, fix)
  if own:
    from efft.config import resolve

    # Refused here, before jax takes seconds to import. A run that is given may name the task.
    resolve(given['config'], task='run' not in given)
  return given


def _config_flag(verb: Verb) -> Flag | None:
  return next((flag for flag in verb.flags if flag.name == CONFIG.name), None)


def _unknown_flag(verb: str, name: str, known: list[str], see: str, may_be=()) -> InputError:
  expected = f'one of {", ".join(known)}' if known else 'no flags'
  fix = _did_you_mean(f'--{name}', known, see)
  if may_be:
    from efft.config import SHORT, flags_of

    flags = f'--config=FILE:{name}=' if name in SHORT else flags_of(name, may_be)
    fix = f'did you mean {flags}?' if flags else fix
  return InputError(f'efft {verb}', f'unknown flag --{name}', expected, fix)


def _fields(args: list[str]) -> Iterable[str]:
  """What a flag that is missing its 'config.' may mean: fields of the config that is given."""
  from efft import config

  try:
    return config.paths(config.load(_take_spec(args)[0]))
  except InputError:
    return config.FIELDS


def _take_spec(args: list[str]) -> tuple[str, list[str]]:
  """(the value of --config, '' without one; the other arguments)."""
  spec, others = '', []
  arguments = iter(args)
  for arg in arguments:
    if match := re.fullmatch(r'--?config(?:=(.*))?', arg, re.DOTALL):
      spec = next(arguments, '') if match[1] is None else match[1]
    else:
      others.append(arg)
  return spec, others


def _load_config(argv: list[str], flag: Flag) -> tuple[Any, list[str]]:
  """Takes --config out of the arguments: (the config of its file, the others).

  config_flags reads the overrides; it could load the file too, but finds no installed configs, and
  its errors are tracebacks.
  """
  from efft import config

  spec, others = _take_spec(argv)
  if not spec:
    raise InputError('--config', 'nothing', flag.about, 'pass --config=FILE.py')
  loaded = config.load(spec)
  known = config.paths(loaded)
  arguments, argv = iter(others), []
  for arg in arguments:
    if match := re.match(r'--?(no)?config\.([^=]*)(=)?', arg):
      no, name, equals = match.groups()
      if name not in known:
        raise unknown(f'--config.{name}', 'field', name, known)
      if not no and not equals and not isinstance(known[name], bool):
        # To config_flags a field of any literal may be a switch, and takes no value after a space.
        value = next(arguments, None)
        if value is None:
          raise InputError(f'--config.{name}', 'nothing', 'a value', f'pass --config.{name}=...')
        arg = f'{arg}={value}'
    argv.append(arg)
  return loaded, argv


def _help(verbs: Mapping[str, Verb], intro: str) -> str:
  lines = '\n'.join(f'  {name:<10}{verb.about}' for name, verb in verbs.items())
  return f'{intro}\n\n{lines}\n\n`efft VERB --help` shows its flags, `efft --version` the version.'


def _verb_help(name: str, verb: Verb, args: list[str], everything: bool) -> str:
  required = ''.join(f' --{flag.name}=...' for flag in verb.flags if flag.required)
  lines = [f'efft {name}{required}', f'  {verb.about}', '']
  width = max([14, *(len(flag.name) + 2 for flag in verb.flags)])
  for flag in verb.flags:
    about = flag.about
    if flag.choices:
      about += f': {", ".join(flag.choices)}'
    if flag.default:
      about += f' (default: {flag.default})'
    lines.append(f'  --{flag.name:<{width}}{about}')
  if everything and _config_flag(verb):
    from efft import config

    spec, _ = _take_spec(args)
    lines += ['', fields(config.load(spec) if spec else None)]
  elif verb.more:
    lines += ['', verb.more]
  return '\n'.join(lines).rstrip()


def fields(config=None) -> str:
  """The fields of all configs, a line each: --config.NAME=default, then what it is and may be.

  With a config of `efft.config.load`, then its own methods, groups and stages, as it has them.
  """
  from efft import config as configs
  from efft.fields import FIELDS, RULES, TABLE

  lines = []
  for name, field in FIELDS.items():
    shown = '...' if field.check in (RULES, TABLE) or name == 'task.name' else repr(field.default)
    takes = f'; {field.check.expected}' if 'one of ' in field.check.expected else ''
    lines.append(f'  --config.{name}={shown}'.ljust(44) + field.about + takes)
  if config is not None:
    lines += ['', "  This config's methods, groups (None: as in config.optim) and stages:"]
    own = tuple(f'{table}.' for table in configs.OPEN)
    for name, value in configs.paths(config).items():
      if name.startswith(own) and not hasattr(value, 'items'):
        lines.append(f'  --config.{name}={_typed(value)}')
  return '\n'.join(lines)


def _typed(value: Any) -> str:
  """A value as it is typed in a shell."""
  if isinstance(value, str):
    return shlex.quote(value)
  return f'"{value!r}"' if isinstance(value, list | tuple) else repr(value)
