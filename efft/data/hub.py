"""Data sets of the Hugging Face hub, by `datasets`, imported on first use."""

from collections.abc import Mapping

import numpy as np

from efft.data.tables import Table
from efft.errors import EnvironmentProblem


def tables(source: str, wanted: Mapping[str, str], task: str) -> dict[str, Table]:
  """Per split one table. source: REPOSITORY[:CONFIG][@REVISION]; wanted: split -> [CONFIG/]SPLIT.

  Raises EnvironmentProblem where the hub is out of reach or does not give the data.
  """
  source, _, revision = source.partition('@')
  repository, _, config = source.partition(':')
  try:
    from datasets import load_dataset
  except ImportError as error:
    raise EnvironmentProblem(f'{task}: {error}; pip install datasets') from error
  found = {}
  for split, value in wanted.items():
    own_config, _, name = value.rpartition('/')
    try:
      data = load_dataset(
        repository, own_config or config or None, split=name, revision=revision or None
      )
    except Exception as error:  # hub, HTTP and Arrow errors share no base class
      reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
      raise EnvironmentProblem(
        f'{task}: cannot get {repository} ({name}) from the hub: {reason}; '
        f'check the network, or give the files: task={task},path=FOLDER'
      ) from error
    columns = {column.strip(): list(data[column]) for column in data.column_names}
    names = {
      column: tuple(feature.names)
      for column, feature in data.features.items()
      if getattr(feature, 'names', None)
    }
    found[split] = Table(
      f'{repository}/{value}', columns, np.arange(1, len(data) + 1), unit='row', names=names
    )
  return found
