"""From a line of a config to the method that it names."""

import importlib
import inspect
from collections.abc import Mapping

from efft.errors import InputError


def family(fn: str) -> str:
  """FAMILY of the module that has a method: 'low rank' of 'lora.lora'."""
  return importlib.import_module(f'efft.peft.{fn.partition(".")[0]}').FAMILY


def call(where: str, spec: Mapping, kind: str, package: str = 'efft.peft'):
  """{'fn': 'lora.lora', 'rank': 8} -> efft.peft.lora.lora(rank=8).

  Functions are found by module and name below `package`: adding a file is the registration.

  Args:
    where: how errors name the place, 'config.method.lora'.
    spec: the function and its options.
    kind: name of the type that the function has to say it returns.

  Raises:
    InputError: an unknown function or option, or a value that the function refuses.
  """
  options = dict(spec)
  name = str(options.pop('fn', ''))
  module, _, function = name.rpartition('.')
  try:
    fn = getattr(importlib.import_module(f'{package}.{module}'), function)
    returns = inspect.get_annotations(fn).get('return')
    known = inspect.signature(fn).parameters
  except (ImportError, AttributeError, ValueError, TypeError):
    returns = None
  if kind not in str(returns):
    example = {'Delta': 'lora.lora', 'Transform': 'masks.fish', 'Prune': 'prune.heads'}[kind]
    raise InputError(f'{where}.fn', repr(name), f"one such as '{example}'", 'see `efft methods`')
  unknown = [key for key in options if key not in known]
  if unknown:
    raise InputError(
      where, f'option {unknown[0]!r}', f'one of {", ".join(known)}', 'remove or rename it'
    )
  try:
    return fn(**options)
  except (TypeError, ValueError) as error:
    raise InputError(where, str(error), f'valid options of {name}', 'correct it') from None
