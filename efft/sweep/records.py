"""records.jsonl while several processes append to it: what is done, and the last word on each run.

A run that failed and was tried again has a line for each attempt; the last one counts.
"""

import json
import logging
import os
from pathlib import Path

from efft import config as configs
from efft import files
from efft.errors import EfftError

log = logging.getLogger(__name__)


class Records:
  """The last record of each run, {(arm, config_hash): record}, read line by line as they come.

  A record counts for the config that its own would be today: fields that efft has got since have
  their defaults in it, so that they do not make finished studies anew. Lines that are not records
  are skipped, and said once each.
  """

  def __init__(self, path: str | os.PathLike):
    self.path = Path(path)
    self._forget()

  def _forget(self) -> None:
    self._offset = self._lines = 0
    self._last: dict[tuple[str, str], dict] = {}
    self._counts: dict[tuple[str, str], int] = {}

  def refresh(self) -> None:
    """Reads the lines that have been added; all of them again where the file got shorter."""
    try:
      with open(self.path, 'rb') as file:
        if os.fstat(file.fileno()).st_size < self._offset:
          self._forget()
        file.seek(self._offset)
        data = file.read()
    except FileNotFoundError:
      return self._forget()
    # What is after the last newline is still being written, or was torn: the next append ends it.
    *lines, rest = data.split(b'\n')
    for line in lines:
      self._lines += 1
      if not self._take(line) and line.strip():
        log.warning('%s:%d: skipped a line that is not a record', self.path, self._lines)
    # A killed writer may have left out nothing but the newline.
    self._offset += len(data) - (0 if self._take(rest) else len(rest))

  def _take(self, line: bytes) -> bool:
    try:
      record = json.loads(line)
      key = str(record['arm']), _hash_today(record)
    except (ValueError, TypeError, KeyError):
      return False
    self._last[key] = record
    self._counts[key] = self.count(key) + 1
    return True

  def get(self, key: tuple[str, str]) -> dict | None:
    return self._last.get(key)

  def count(self, key: tuple[str, str]) -> int:
    """How many records a run has."""
    return self._counts.get(key, 0)

  def add(self, record: dict) -> None:
    files.append_jsonl(self.path, record)


def _hash_today(record: dict) -> str:
  """Of the record's config with all fields there are; its own, where it is no longer a config."""
  try:
    return configs.config_hash(configs.resolve(record['config']))
  except (EfftError, KeyError, TypeError, ValueError, AttributeError):
    return str(record['config_hash'])
