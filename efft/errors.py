"""Errors that end a command, each with the exit code that scripts rely on."""

import difflib


class EfftError(Exception):
  """Base of all errors that are reported as one line, without a traceback."""

  exit_code = 1


class InputError(EfftError):
  """Bad input: a flag, a config, a file, a data set or a checkpoint.

  Args:
    where: the file, field or flag at fault, as precise as known (`reviews.csv:17`).
    found: what is there; text that a user wrote is passed through `repr` first.
    expected: what would have been accepted.
    fix: what to do about it.
  """

  exit_code = 2

  def __init__(self, where, found, expected, fix):
    super().__init__(f'{where}: found {found}, expected {expected}; {fix}')
    self.where, self.found, self.expected, self.fix = where, found, expected, fix


class Diverged(EfftError):
  """The loss or a gradient stopped being finite."""

  exit_code = 3


class EnvironmentProblem(EfftError):
  """The machine said no: disk full, permission denied, a missing network or peer."""

  exit_code = 4


class Preempted(EfftError):
  """Stopped from outside with its state saved; the same command continues."""

  exit_code = 75


def out_of_memory(error: BaseException) -> bool:
  """Whether it is the host's or (by XLA's words) the device's memory that an error is about."""
  return isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in str(error)


def nearest(name: str, names, cutoff: float = 0.6) -> str:
  """The closest of `names`, or ''; letters that changed places come before other ones."""
  names, letters = list(names), sorted(name)
  turned = [other for other in names if sorted(other) == letters]
  return next(iter(difflib.get_close_matches(name, turned or names, 1, cutoff)), '')


def alike(name: str, names) -> list[str]:
  """What of dotted `names` ends in the same part: 'optim.lr' for 'lr' and for 'train.lr'."""
  part = name.rpartition('.')[2]
  return sorted(other for other in names if f'.{other}'.endswith(f'.{part}'))


def meant(name: str, names) -> list[str]:
  """What of dotted `names` somebody may have meant; [] if nothing.

  What ends in the same part, the shortest unless one is near; else the nearest.
  """
  same = alike(name, names)
  if '.' in name or not same:
    close = nearest(name, same) or nearest(name, names)
    return [close] if close else same
  fewest = min(other.count('.') for other in same)
  return [other for other in same if other.count('.') == fewest]


def unknown(
  where: str, what: str, name: str, names, see: str = 'see `efft train --helpfull`'
) -> InputError:
  """The error for a name that does not exist, with what may be meant; `see` where nothing is."""
  names = sorted(names)
  close = meant(name, names)
  fix = f'did you mean {" or ".join(close)}?' if close else see
  # Of many dotted names only the neighbours are of use in one line.
  group = name.rpartition('.')[0]
  near = [n for n in names if n.rpartition('.')[0] == group] or names
  shown = ', '.join(near[:16]) + (', ...' if len(near) > 16 else '')
  return InputError(where, f'unknown {what} {name!r}', f'one of {shown}' if near else 'none', fix)
