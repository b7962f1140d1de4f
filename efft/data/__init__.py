"""A table of tasks, the user's own files, and batches that are a function of (seed, step)."""

from efft.data.batches import Batches, evaluation
from efft.data.sources import Dataset, load, read_texts
from efft.data.splits import Split
from efft.data.tasks import TASKS, Task
from efft.data.tokens import Encoded, encode

__all__ = [
  'TASKS',
  'Batches',
  'Dataset',
  'Encoded',
  'Split',
  'Task',
  'encode',
  'evaluation',
  'load',
  'read_texts',
]
