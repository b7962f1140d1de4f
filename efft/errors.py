"""Errors that end a command, each with the exit code that scripts rely on."""


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
