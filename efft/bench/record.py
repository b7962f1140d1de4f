"""One JSON record for each run, of all that runs are compared by: quality, size, time, memory.

Records are lines of a JSONL file. Readers ignore keys that they do not know; what was not measured
is absent, what is not a finite number is null. Schema 1:

    schema, study, run, arm, overrides       who it is: the folder is relative to the records file
    seed, task, metric, higher_is_better
    status, error                            'ok'; or 'failed', 'diverged', and why, in one line
    config, config_hash, data, model         what decides the result, with sha256 of data and model
    versions, device                         where it was trained; 'latency_device', if elsewhere
    metrics      {split: {metric: value}} of each labelled split that training has not seen
    parameters   trained, stored (what 32 bits hold, in the bundle), head, total
    flops        step (a full training batch of the usual length), example (inference of one)
    memory_mb    step, inference (one example; arguments and temporaries of the compiled program),
                 peak (of the process that trained, or its device)
    train        steps, seconds (with compilation), compile_seconds, examples_per_second, step_ms;
                 population: how many trained together, where several did
    latency      rows as of `efft.bench.latency.measure`
    bytes        bundle (its folder), whole (the model standing alone, merged where that is exact)
    time         when the record was made, UTC
"""

import datetime
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efft import assemble, bundle, environment, files
from efft import config as configs
from efft.bench import cost, latency
from efft.classifier import Classifier
from efft.data.sources import Dataset
from efft.data.splits import Split, digest
from efft.data.tasks import TASKS, default_metrics
from efft.errors import InputError
from efft.eval import evaluate as scoring
from efft.fields import FULL
from efft.finetune import folder_size
from efft.training import losses

SCHEMA = 1
SPLITS = ('validation', 'report', 'test')
_MACHINE = ('cpu', 'cores', 'devices')


def measure(
  run, *, study: str = '', arm: str = '', overrides: Mapping | None = None, root=None,
  latency: Iterable = (), splits: Sequence[str] = SPLITS, known: Mapping | None = None,
) -> dict[str, Any]:  # fmt: skip
  """The record of a finished run; nothing is trained.

  Args:
    run: a run folder, of one training or of stages.
    study, overrides: of the sweep that made it.
    arm: what it is compared as; '': the names of its methods.
    root: the folder that 'run' is relative to; None: the path as given.
    latency: (batch, length, precision) to be measured now, or rows that have been measured.
    splits: those to score, where the task has them and they have labels; a name stands for others
      that begin with it, too ('test' for 'test_mismatched').
    known: {split: {metric: value}} of those that have been scored already; others are scored here.

  Raises:
    InputError: no finished run, a damaged one, data or a base model that have changed, or as
      `efft.bench.latency.measure`.
  """
  run = Path(run)
  config, results = finished(run)
  content = bundle.load(run)
  known, asked = known or {}, list(latency)
  rows = [row for row in asked if isinstance(row, Mapping)]
  rows += _timed(run, content, [tuple(cell) for cell in asked if not isinstance(cell, Mapping)])
  model = Classifier.of(content, str(run), devices=1)
  data = assemble.own_task(run, content.labels)
  trained = list(_trained(run, config, results))
  steps = [part['step'] for _, part in trained if 'step' in part]
  length = steps[-1]['length'] if steps else min(128, content.max_length)
  use = cost.inference(model, length)
  place = run / 'environment.json'
  device = files.read_json(place) if place.exists() else environment.describe()
  record = {
    **_identity(config, study, arm, overrides, data.metrics[0]),
    'run': os.path.relpath(run, root) if root is not None else str(run),
    'status': 'ok',
    'error': None,
    'data': {
      'sha256': digest(data.splits), 'examples': {n: len(s) for n, s in data.splits.items()}
    },
    'model': {'name': config['model']['name'], 'sha256': _origin(run, config)},
    **_place(device),
    'metrics': {
      name: dict(known[name]) if name in known else scores(model, data, part)
      for name, part in data.splits.items()
      if part.labels is not None and {name, name.split('_')[0]} & set(splits)
    },
    'parameters': cost.parameters(content, model.variables),
    'flops': {'example': use['flops']},
    'memory_mb': {
      'inference': _mb(use['memory']),
      # That of a population's process is of all of its members.
      'peak': max(
        (r['peak_mb'] for r in (results, *(r for _, r in trained))
         if 'peak_mb' in r and 'population' not in r),
        default=None,
      ),
    },
    'latency': rows,
    'bytes': {
      'bundle': folder_size(bundle.inside(run)),
      'whole': cost.written(cost.standing_alone(content)),
    },
  }  # fmt: skip
  if trained:
    record['parameters']['trained'] = max(part['trainable'] for _, part in trained)
    record['train'] = _speed(trained)
  if steps:
    record['flops']['step'] = max(step['flops'] for step in steps)
    sizes = [step['memory_mb'] for step in steps if step['memory_mb'] is not None]
    record['memory_mb']['step'] = max(sizes, default=None)
  if rows and (here := _place(environment.describe())['device']) != record['device']:
    if any(here.get(name) != record['device'].get(name) for name in _MACHINE):
      record['latency_device'] = here
  return _plain(record)


def failed(
  config, *, study: str = '', arm: str = '', overrides: Mapping | None = None, run=None, root=None,
  status: str = 'failed', error: str,
) -> dict[str, Any]:  # fmt: skip
  """The record of a run that has no result: who it was, and why.

  Args:
    config: what it was to be, or the resolved config as plain data.
    study, arm, overrides, root: see `measure`.
    run: its folder, where it has got as far as that; it says which device it was on.
    status: 'failed' or 'diverged'.
    error: kept as one line.
  """
  if status not in ('failed', 'diverged'):
    raise ValueError(f"status {status!r}, 'failed' or 'diverged'")
  config = configs.resolve(config)
  task = config['task']
  if task['name'] in TASKS:
    metric = TASKS[task['name']].metrics[0]
  else:
    metric = None if task['kind'] == 'auto' else default_metrics(task['kind'])[0]
  known = Path(run) / 'environment.json' if run is not None else None
  if known is not None and known.exists():
    place = _place(files.read_json(known))
  else:  # jax is not asked for its devices: this process may be the one that only starts others
    place = {'versions': environment.versions()}
  where = '' if run is None else str(run) if root is None else os.path.relpath(run, root)
  return _plain({
    **_identity(config, study, arm, overrides, metric),
    'run': where, 'status': status, 'error': ' '.join(str(error).split()), **place,
  })  # fmt: skip


def append(path, record: Mapping[str, Any]) -> None:
  """Adds a line to a records file; several processes may do so at once."""
  files.append_jsonl(path, record)


def finished(run: Path) -> tuple[dict, dict]:
  """(config, results) of a run folder; InputError where a run has not come to its end there."""
  for name in ('config.json', 'results.json'):
    if not (run / name).exists():
      fix = 'name a run folder, and let the run come to its end'
      raise InputError(str(run), f'no {name}', 'the folder of a finished run', fix)
  return files.read_json(run / 'config.json'), files.read_json(run / 'results.json')


def scores(model: Classifier, data: Dataset, part: Split) -> dict[str, float]:
  """The task's metrics of a labelled split, and the loss."""
  logits = model.logits(part.texts, part.pairs)
  return scoring.score(data.metrics, losses.build(data.kind), part.labels, logits, data.kind)


def called(config: Mapping[str, Any]) -> str:
  """What a config is called where nobody has given it a name: 'lora + int8', 'full', and where
  only rules say what trains, those: 'train .*/bias'."""
  groups = config['optim']['groups'].values()
  parts = [*config['method']]
  parts += [g['transform']['fn'].partition('.')[2] for g in groups if 'transform' in g]
  if not parts:
    rules = [tuple(rule) for rule in config['rules']]
    trained = [pattern for pattern, group in rules if group != 'frozen']
    beside = [pattern for pattern in trained if not pattern.startswith('params/head/')]
    parts = ['full' if rules == list(FULL) else f'train {", ".join(beside or trained)}']
  form = config['model']['quantize']
  parts += [form if isinstance(form, str) else 'quantised'] if form else []
  parts += [spec['fn'] for spec in config['stages'].values() if 'fn' in spec]
  return ' + '.join(parts)


def _identity(config, study, arm, overrides, metric) -> dict[str, Any]:
  """What a record has whether the run was a success or not; `metric` may be None: not known."""
  return {
    'schema': SCHEMA,
    'study': study,
    'arm': arm or called(config),
    'overrides': dict(overrides or {}),
    'seed': config['seed'],
    'task': config['task']['name'],
    **({} if metric is None else {'metric': metric, 'higher_is_better': True}),
    'config': config,
    'config_hash': configs.config_hash(config),
    'time': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ'),
  }


def _timed(run: Path, content: bundle.Bundle, cells: list) -> list[dict]:
  return list(latency.measure(content, str(run), cells)) if cells else []


def _trained(run: Path, config: Mapping, results: Mapping):
  """(batch size, results) of each training that made the run: its own, or those of its stages."""
  for name in config['stages']:
    folder = run / 'stages' / name
    own = files.read_json(folder / 'results.json')
    if 'steps' in own:
      yield files.read_json(folder / 'config.json')['train']['batch_size'], own
  if 'steps' in results:
    yield config['train']['batch_size'], results


def _speed(trained: Sequence[tuple[int, Mapping]]) -> dict[str, float | None]:
  """All trainings together; the rates are of steady steps, without compilation."""
  steps = sum(part['steps'] for _, part in trained)
  found = {
    'steps': steps,
    'seconds': round(sum(part['seconds'] for _, part in trained), 2),
    'compile_seconds': round(sum(part['compile_seconds'] for _, part in trained), 2),
  }
  if sizes := [part['population'] for _, part in trained if 'population' in part]:
    # The seconds are its share of those of all; its rate is what it has alone.
    found = {'population': max(sizes), **found}
  rates = [part['examples_per_second'] for _, part in trained]
  if not all(rates):  # a run that was killed after its last step has no speed to tell
    return {**found, 'examples_per_second': None, 'step_ms': None}
  examples = [size * part['steps'] for size, part in trained]
  took = sum(n / rate for n, rate in zip(examples, rates, strict=True))
  return {
    **found,
    'examples_per_second': round(sum(examples) / took, 2),
    'step_ms': round(1000 * took / steps, 3),
  }


def _origin(run: Path, config: Mapping) -> str:
  """sha256 of the model that training began with; that of stages, of the first."""
  first = next(iter(config['stages']), None)
  return bundle.read_about(run if first is None else run / 'stages' / first)['base']['sha256']


def _place(described: Mapping) -> dict[str, dict]:
  device = {name: value for name, value in described.items() if name != 'versions'}
  return {'versions': described['versions'], 'device': device}


def _mb(size: int | None) -> float | None:
  return None if size is None else round(size / 1e6, 3)


def _plain(record: Mapping) -> dict[str, Any]:
  """As it will be read again."""
  return json.loads(files.to_json(record))
