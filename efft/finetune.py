"""One fine-tuning run: from a config to a run folder that holds a bundle."""

import contextlib
import io
import logging
import time
import zipfile
import zlib
from pathlib import Path

import jax
import numpy as np

from efft import (
  assemble,
  bundle,
  checkpoint,
  cpu,
  environment,
  files,
  mesh,
  programs,
  progress,
  quantize,
  teacher,
  trackers,
  transfer,
  tree,
)
from efft import config as configs
from efft.assemble import Job
from efft.data import batches
from efft.errors import InputError, out_of_memory
from efft.eval import evaluate as scoring
from efft.models import quantized
from efft.teacher import Teacher
from efft.training import loop, losses, optim, prepare, step

log = logging.getLogger(__name__)
LOOKED_AT = 64  # batches, to say which width is the usual one


def train(config, workdir, *, resume: str = 'auto') -> dict:
  """Fine-tunes and leaves a run folder, whose bundle `evaluate` and `predict` read.

  Args:
    config: from `efft.config.load` or `default`, or the plain dictionary of an earlier run.
    workdir: the run folder; made, or continued where a run with the same config stopped.
    resume: 'auto' continues what is there, 'never' refuses to, 'must' refuses to start anew.

  Returns:
    The contents of results.json: the validation metrics of the weights handed on, and what the
    run cost.

  Raises:
    InputError: bad config, data or checkpoint, or a folder of another run; nothing is written.
    Diverged: the loss stopped being finite.
    Preempted: SIGTERM; the same call continues.
  """
  config = configs.resolve(config)
  workdir = Path(workdir)
  if config['mesh']['distributed']:
    mesh.initialize()
  done = before(config, workdir, resume)
  if done is not None:
    return done
  devices = mesh.make(config['mesh']['devices'])
  job = assemble.prepare(config)
  guide = teacher.load(job)
  first = jax.process_index() == 0
  lock = files.RunLock(workdir) if first else contextlib.nullcontext()
  with lock, progress.logs(workdir / 'train.log' if first else None) as console:
    # Another process may have been here between the look at the folder and its lock.
    if jax.process_count() == 1 and (done := before(config, workdir, resume)) is not None:
      return done
    if first:
      describe(job, workdir)
    for line in [*announce(job), *(guide.notes if guide else ())]:
      log.info(line)
    results = _fit_in_memory(job, guide, devices, workdir, console, first)
    if first:
      finish(job, results, workdir)
  return results


def describe(job: Job, workdir: Path) -> None:
  """What a run folder has from the start; InputError where data or model have changed since."""
  assemble.keep_start(workdir, job)
  files.write_json(workdir / 'config.json', job.config)
  files.write_json(workdir / 'environment.json', environment.describe())


def finish(job: Job, results: dict, workdir: Path) -> None:
  """What a finished run's folder has besides."""
  files.write_json(workdir / 'results.json', results)
  files.atomic_write(workdir / 'README.md', _card(job, results, workdir))


def before(config: dict, workdir: Path, resume: str) -> dict | None:
  """The results of a finished run; refuses a folder that this config may not continue."""
  if resume not in ('auto', 'never', 'must'):
    raise InputError('resume', repr(resume), 'auto, never or must', 'correct it')
  file = workdir / 'config.json'
  if not file.exists():
    if resume == 'must':
      raise InputError(str(workdir), 'no run', 'a run to continue', 'drop --resume=must')
    if workdir.exists() and not workdir.is_dir():
      raise InputError(str(workdir), 'a file', 'a folder or a new name', 'pass another --workdir')
    return None
  if resume == 'never':
    raise InputError(str(workdir), 'a run', 'no run', 'pass another --workdir or --resume=auto')
  change = configs.difference(files.read_json(file), config)
  if change:
    raise InputError(
      str(workdir), f'a run of another config ({change})', 'the same config',
      'pass another --workdir, or the config.json of this one',
    )  # fmt: skip
  if (workdir / 'results.json').exists() and (workdir / 'bundle').exists():
    log.info('%s: finished already', workdir)
    return files.read_json(workdir / 'results.json')
  return None


def _fit_in_memory(
  job: Job, guide: Teacher | None, devices, workdir: Path, console, first: bool
) -> dict:
  """`_fit`, with smaller micro-batches and the same step each time that memory runs out."""
  pieces = job.config['train']['accumulate']
  while True:
    try:
      return _fit(job, guide, devices, workdir, console, first, pieces)
    except (MemoryError, RuntimeError) as error:
      fits = 2 * pieces <= job.config['train']['batch_size']
      if not fits or not out_of_memory(error):
        raise
    # Outside of the handler, whose traceback keeps the arrays of the failed attempt alive.
    pieces *= 2
    rows = job.config['train']['batch_size'] // pieces
    log.warning('out of memory: going on with %d micro-batches of %d examples', pieces, rows)


def _fit(
  job: Job, guide: Teacher | None, devices, workdir: Path, console, first: bool, pieces: int
) -> dict:
  config, kind = job.config, job.data.kind
  options, names = config['train'], job.data.metrics
  dtype = assemble.DTYPES[config['model']['dtype']]
  loss = losses.build(kind, options['label_smoothing'])
  feed, total, every = course(job)
  frozen = mesh.place(step.cast_frozen(job.parts.frozen, dtype), devices)
  parts = job.parts
  if guide is not None:
    parts, feed, frozen = guide.parts(parts), guide.feed(feed), {**frozen, **guide.variables}

  def make_step(optimizer):
    return step.make_step(
      job.net.logits, loss, optimizer,
      accumulate=pieces, ema=config['optim']['ema'],
      class_weights=class_weights(job), penalty=job.net.penalty,
      consistency=losses.divergence(kind, weight) if (weight := options['consistency']) else None,
      extra=None if guide is None else guide.extra,
    )  # fmt: skip

  def put(batch):
    return mesh.put_batch(batch, devices, pieces)

  def prepared():
    return prepare.prepare(
      config['optim'], parts.groups, mesh.place(parts.trainable, devices), frozen,
      logits=job.net.logits, loss=loss, make_step=make_step, batches=feed, put=put,
      examples=len(job.encoded['train']), steps=total, seed=config['seed'],
    )  # fmt: skip

  transformed = any('transform' in fields for fields in config['optim']['groups'].values())
  given = _given(workdir / 'prepared.npz', prepared, first) if transformed else {}
  optimizer = optim.optimizer(config['optim'], parts.groups, total, given)
  state = step.init_state(
    parts.trainable, optimizer, seed=config['seed'], ema=config['optim']['ema']
  )
  state = mesh.replicate(state, devices)
  run = make_step(optimizer)
  logits = jax.jit(lambda weights, frozen, batch: job.net.logits(tree.join(weights, frozen), batch))

  at_once = config['eval']['batch_size']

  def evaluate(state, split='validation'):
    nonlocal at_once
    part = job.encoded[split]

    def predicted(size):
      return scoring.predict(
        lambda weights, batch: logits(weights, frozen, batch),
        state.weights, batches.evaluation(part, size), devices,
      )  # fmt: skip

    # Here, not by `_fit_in_memory`: smaller steps are of no help.
    scores, at_once = scoring.in_memory(predicted, at_once, devices.size)
    return scoring.score(names, losses.build(kind), part.labels, scores, kind)

  start = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  begin = time.time()
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    fit = loop.fit(
      state, frozen,
      step_fn=run, batches=feed, total_steps=total,
      put=put,
      evaluate=evaluate,
      eval_every=every,
      main_metric=names[0], patience=options['patience'] or 0, keep=options['save'],
      checkpoints=checkpoints, checkpoint_every=options['checkpoint_every'] or 0,
      sinks=trackers.make(workdir, config['trackers'], config) if first else (),
      log_every=options['log_every'], progress=progress.Progress(console) if first else None,
    )  # fmt: skip
  results = hand_on(job, fit, workdir, time.time() - begin, first=first, accumulate=pieces)
  if config['task']['halves']:
    results['report'] = evaluate(fit.state, 'report')
  batch = put(usual([feed.batch(i) for i in range(min(total, LOOKED_AT))]))
  return results | {'step': cost(run, start, (frozen,), batch)}


def hand_on(
  job: Job, fit: loop.Fit, workdir: Path, seconds: float, *, first: bool = True, accumulate: int = 1
) -> dict:
  """Writes the bundle of a trained run; gives its results.

  Args:
    job, fit: what was trained, and how it went.
    workdir: the run folder.
    seconds: of the whole fit, evaluations included.
    first: whether this process writes.
    accumulate: micro-batches that a step was cut into.
  """
  # Not what trained beside the model to compare it with its teacher.
  weights = {name: fit.state.weights[name] for name in job.parts.trainable}
  leaves = transfer.handed_on(job.net.deltas, weights, job.parts.frozen, job.base.params)
  if first:
    _publish(job, leaves, fit, workdir)
  trained, everything = tree.count(job.parts.trainable), tree.count(job.variables)
  return {
    'task': job.data.name,
    'model': job.base.name,
    'metrics': fit.metrics,
    'best_step': fit.best_step,
    'steps': fit.last_step,
    'trainable': trained,
    'parameters': everything,
    'share': trained / everything,
    'seconds': round(fit.seconds + fit.compile_seconds, 2),
    'compile_seconds': round(fit.compile_seconds, 2),
    'examples_per_second': round(fit.examples_per_second, 2),
    'peak_mb': round(environment.peak_memory() / 1e6, 1),
    'bundle_mb': round(folder_size(workdir / 'bundle') / 1e6, 3),
    'wall_seconds': round(seconds, 2),
    'accumulate': accumulate,
    'config_hash': configs.config_hash(job.config),
    'notes': job.data.notes,
  }


def usual(seen: list[dict]) -> dict:
  """A batch of the width that most have."""
  widths = [batch['mask'].shape[1] for batch in seen]
  return seen[widths.index(max(sorted(set(widths)), key=widths.count))]


def cost(run, state, given: tuple, batch: dict) -> dict:
  """What a step asks for, of a program that has been compiled already."""
  size = programs.memory(run.lower(state, *given, batch).compile())
  return {
    'length': batch['mask'].shape[-1],
    'flops': programs.flops(run, state, *given, batch),
    'memory_mb': None if size is None else round(size / 1e6, 3),
  }


def course(job: Job) -> tuple[batches.Batches, int, int]:
  """(training data, steps of the run, steps between evaluations)."""
  options = job.config['train']
  feed = batches.Batches(
    job.encoded['train'], options['batch_size'], job.config['seed'],
    group_by_length=options['group_by_length'],
  )  # fmt: skip
  total = options['steps'] or feed.steps(options['epochs'])
  every = options['eval_steps'] or max(1, feed.steps(options['eval_epochs']))
  return feed, total, every


def _given(file: Path, compute, first: bool) -> dict[str, dict[str, np.ndarray]]:
  """What the optimiser's transforms prepared: from `file` where an earlier sitting left it."""
  if file.exists():
    try:
      with np.load(file) as saved:
        found = {}
        for name in saved.files:
          group, _, key = name.rpartition(':')
          found.setdefault(group, {})[key] = saved[name]
      return found
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      log.warning('%s: %s; prepared again', file, error)
  found = compute()
  if found and first:
    content = io.BytesIO()
    flat = {f'{group}:{key}': x for group, given in found.items() for key, x in given.items()}
    np.savez_compressed(content, **flat)
    files.atomic_write(file, content.getvalue())
  return found


def announce(job: Job) -> list[str]:
  """What the log says before the first step."""
  trained, everything = tree.count(job.parts.trainable), tree.count(job.variables)
  sizes = ', '.join(f'{name} {len(split)}' for name, split in job.data.splits.items())
  # Parameters, and adam's two moments beside them: what one checkpoint holds.
  size = 3 * tree.nbytes(job.parts.trainable) / 1e6
  slow = job.config['model']['dtype'] == 'bfloat16' and jax.default_backend() == 'cpu'
  slow = slow and not cpu.multiplies_bfloat16()
  return [
    f'task {job.data.name}: {sizes}; labels {", ".join(job.data.labels) or "numbers"}',
    *(f'note: {note}' for note in job.data.notes),
    *(f'note: {name}: {note}' for name, e in job.encoded.items() for note in e.notes),
    f'model {job.base.name}: {job.base.cfg.architecture}, {job.base.cfg.pooling} pooling',
    *quantize.summary(job.variables),
    f'trainable params: {trained:,} || all params: {everything:,} '
    f'|| trainable%: {100 * trained / everything:.4f}',
    *(['note: this processor has no bfloat16 instructions: float32 is faster'] if slow else []),
    *([f'note: {quantized.NO_INTEGERS}'] if quantized.slowed(job.variables) else []),
    f'checkpoints: up to 3 of about {size:.1f} MB',
  ]


def class_weights(job: Job):
  """float32 [C] of config.train.class_weights, or None."""
  setting = job.config['train']['class_weights']
  if setting is None:
    return None
  names, labels = job.data.labels, job.encoded['train'].labels
  where = 'config.train.class_weights'
  if not names:
    raise InputError(where, repr(setting), 'None for regression', 'leave it out')
  if setting == 'balanced':
    counts = labels.sum(0) if labels.ndim == 2 else np.bincount(labels, minlength=len(names))
    return np.float32(len(labels) / (len(names) * np.maximum(counts, 1)))
  if len(setting) != len(names):
    raise InputError(where, f'{len(setting)} numbers', f'{len(names)}, one a class', 'correct it')
  return np.float32(setting)


def _publish(job: Job, leaves: dict, fit: loop.Fit, workdir: Path) -> None:
  """Writes the bundle."""
  content = bundle.Bundle(
    encoder=job.base.cfg.to_dict(),
    leaves=leaves,
    needs_base=transfer.needs_base(leaves, job.variables),
    method=job.config['method'],
    rules=tuple(map(tuple, job.config['rules'])),
    labels=job.data.labels,
    kind=job.data.kind,
    max_length=job.config['model']['max_length'],
    dtype=job.config['model']['dtype'],
    columns=job.data.columns,
    pooling=job.base.cfg.pooling,
    tokenizer=job.tokenizer.to_str(),
    base={'name': job.base.name, 'path': str(job.base.folder), 'sha256': job.base.sha256},
    metrics=fit.metrics,
    versions=environment.versions(),
    quantize=quantize.rules(job.config['model']['quantize']),
  )
  bundle.save(workdir / 'bundle', content)


def _card(job: Job, results: dict, workdir: Path) -> str:
  about = bundle.read_about(workdir / 'bundle')
  machine = {name: value for name, value in environment.describe().items() if name != 'versions'}
  costs = (
    'trainable',
    'parameters',
    'steps',
    'seconds',
    'examples_per_second',
    'peak_mb',
    'bundle_mb',
  )
  return bundle.card(
    about,
    title=f'{job.data.name}: {job.base.name}',
    machine={**machine, **{name: results[name] for name in costs}},
    command=f'efft predict --run={workdir} --input=texts.csv --output=out.jsonl',
  )


def folder_size(folder: Path) -> int:
  return sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())
