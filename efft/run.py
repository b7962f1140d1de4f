"""What the command line does, as functions: train, evaluate, predict, and what is made of runs.

The same job as the first lines of the README:

    from efft import config, predict, train
    train(config.load('configs/lora.py:task=reviews.csv'), 'runs/lora')
    for record in predict('runs/lora', ['A warm and funny film.']):
      print(record['label'], record['score'])
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from efft import assemble, bundle, files, tree
from efft.bench import latency, record, show
from efft.classifier import Classifier, chunks
from efft.combining import combine
from efft.data import sources
from efft.data.splits import Split
from efft.data.tasks import TASKS
from efft.errors import InputError, unknown
from efft.exchange import export, import_adapter
from efft.merging import merge
from efft.models import hub
from efft.pipeline import compress, train
from efft.progress import logs
from efft.report.publish import report
from efft.report.recommend import recommend
from efft.sweep import sweep

log = logging.getLogger(__name__)

__all__ = [
  'bench', 'combine', 'compress', 'evaluate', 'export', 'fetch', 'import_adapter', 'inspect',
  'merge', 'predict', 'recommend', 'report', 'sweep', 'train',
]  # fmt: skip


def evaluate(run, *, split: str = 'validation') -> dict:
  """Scores a run on a split of its own task: {metric: value, 'examples': n}.

  Raises:
    InputError: no such run or split, a split without labels, a base model that has changed.
  """
  folder = Path(run)
  model = Classifier.load(folder)
  data = assemble.own_task(folder, model.labels)
  if data is None:
    found, fix = 'no config.json, so no task', 'name a run folder; import with --task=...'
    raise InputError(str(folder), found, 'a run that knows its task', fix)
  if split not in data.splits or data.splits[split].labels is None:
    labelled = [name for name, s in data.splits.items() if s.labels is not None]
    what = 'which has no labels' if split in data.splits else 'which the task does not have'
    raise InputError('--split', f'{split!r}, {what}', f'one of {", ".join(labelled)}', 'choose it')
  part = data.splits[split]
  return {**record.scores(model, data, part), 'examples': len(part)}


def predict(
  run, texts: Iterable | None = None, *, input=None, output=None, text_column: str | None = None
) -> Iterator[dict]:
  """Classifies texts, or the texts of a file.

  Args:
    run: a run folder or a bundle.
    texts: strings, or (text, pair) tuples where the run was trained on pairs. Read as they come:
      what has arrived is answered before the next is waited for.
    input: csv, tsv, jsonl, parquet or txt, instead of `texts`.
    output: a jsonl file; written whole or not at all.
    text_column: of `input`; by default the one that the run was trained on.

  Returns:
    One record a text: {'text', 'label', 'score', 'scores'} for classes; 'labels' instead of
    'label' where several may apply; 'score' alone for regression. With `output`, an empty
    iterator: the records are in the file.
  """
  if (texts is None) == (input is None):
    raise InputError('predict', 'texts and input' if input else 'neither', 'one of them', 'choose')
  if isinstance(texts, str):
    raise InputError('predict', 'one string', 'a list of texts', 'pass [text]')
  if output is not None:
    _check_output(output)
  model = Classifier.load(run)
  if input is not None:
    part = _texts(input, model.bundle.columns, text_column)
    texts = part.texts if part.pairs is None else list(zip(part.texts, part.pairs, strict=True))
  records = (record for chunk in chunks(texts, model.batch_size) for record in model(chunk))
  if output is None:
    return records
  lines = [json.dumps(record, ensure_ascii=False) for record in records]
  files.atomic_write(output, ''.join(line + '\n' for line in lines))
  log.info('%s: %d records', output, len(lines))
  return iter(())


def bench(
  run, *, batch: Sequence[int] = (1, 8, 32), length: Sequence[int] | None = None,
  precision: Sequence[str] = tuple(latency.PRECISIONS), merged: bool = False, output=None,
  seconds: float = 2.0, on_row: Callable[[dict], None] = lambda row: None,
) -> list[dict]:  # fmt: skip
  """Measures how long a model takes, by batch, length and precision, on one device.

  Args:
    run: a run folder or a bundle.
    batch, length, precision: all combinations; without lengths, 32, 128 and 512 tokens as far as
      the encoder has positions. Precisions: see `efft.bench.latency.measure`.
    merged: fold deltas into the weights first; otherwise they act beside them.
    output: a JSONL file, to which a record of the run is added that has these rows, and the run's
      scores, sizes and costs (`efft.bench.record`).
    seconds: for how long each combination is measured.
    on_row: called with each row when it is there.

  Returns:
    A row for each combination.

  Raises:
    InputError: no bundle, nothing that can be measured, deltas that do not merge, or, with
      `output`, no finished run.
  """
  if not 0 < seconds < float('inf'):
    raise InputError('--seconds', repr(seconds), 'a number above 0', 'correct it')
  content = bundle.load(run)
  asked = latency.cells(content, batch, length, precision)
  if output is not None:
    record.finished(Path(run))
    _check_output(output)
  rows = []
  with logs() as console, show.Bar(console) as bar:
    for row in latency.measure(
      content, str(run), asked, merged=merged, seconds=seconds, announce=bar.announce
    ):
      rows.append(row)
      on_row(row)
      bar.row(row)
  if output is not None:
    root = Path(output).absolute().parent
    record.append(output, record.measure(run, root=root, latency=rows))
  return rows


def inspect(config) -> dict:
  """What a config would train on and what it would train, without training."""
  job = assemble.prepare(config)
  cfg = job.base.cfg
  groups = {}
  for path, group in job.parts.groups.items():
    groups[group] = groups.get(group, 0) + int(np.size(tree.flatten(job.parts.trainable)[path]))
  lengths = {name: np.percentile(e.lengths, [50, 95, 100]) for name, e in job.encoded.items()}
  trained = tree.count(job.parts.trainable)
  return {
    'task': job.data.name,
    'kind': job.data.kind,
    'columns': job.data.columns,
    'labels': list(job.data.labels),
    'metrics': list(job.data.metrics),
    'examples': {name: len(split) for name, split in job.data.splits.items()},
    'tokens p50/p95/max': {n: '/'.join(f'{v:.0f}' for v in p) for n, p in lengths.items()},
    'samples': job.data.samples,
    'notes': job.data.notes + [note for e in job.encoded.values() for note in e.notes],
    'model': job.base.name,
    'architecture': f'{cfg.architecture}, {cfg.layers} layers, hidden {cfg.hidden}',
    'pooling': cfg.pooling,
    'parameters': tree.count(job.variables),
    'trainable': trained,
    'share': trained / tree.count(job.variables),
    'groups': groups,
  }


def fetch(task: str | None = None, model: str | None = None) -> dict:
  """Brings a task or a model into the cache, so that later runs need no network."""
  found = {}
  if task:
    if task not in TASKS:
      raise unknown('--task', 'task', task, TASKS, 'see `efft tasks`')
    data = sources.load(task)
    found |= {f'{task} {name}': f'{len(split)} examples' for name, split in data.splits.items()}
  if model:
    found[model] = str(hub.resolve(model))
  return found


def _check_output(output) -> None:
  """Refuses a file that cannot be written, before there is work that would be lost."""
  found, expected = repr(str(output)), 'a file in a folder that exists'
  if Path(output).is_dir():
    raise InputError('--output', f'the folder {found}', expected, 'name a file in it')
  if not Path(output).absolute().parent.is_dir():
    raise InputError('--output', found, expected, 'make the folder first')


def _texts(input, columns, text_column) -> Split:
  """The texts of a file: from the column asked for, the run's own, or what the header suggests."""
  if text_column:
    return sources.read_texts(input, text_column, columns.get('pair'))
  return sources.read_texts(
    input, usual=[columns[name] for name in ('text', 'pair') if name in columns]
  )
