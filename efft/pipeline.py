"""Runs of several stages: training, pruning, training again; each stage is a run folder of its own.

    workdir/stages/s1_tune      an ordinary run
    workdir/stages/s2_heads     the same encoder with fewer heads, evaluated
    workdir/stages/s3_tune      ...which starts from that one
    workdir/bundle             what the last stage left, standing alone

A stage that is finished is not made again: a run that was killed goes on where it was.
"""

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efft import (
  assemble,
  bundle,
  environment,
  files,
  finetune,
  merging,
  progress,
  quantize,
  starting,
  transfer,
  tree,
)
from efft import config as configs
from efft.classifier import Classifier
from efft.compress import dead, slicing
from efft.compress.base import Prune, Subject
from efft.data import batches, packages, sources, tokens
from efft.errors import InputError
from efft.eval import evaluate as scoring
from efft.fields import FIELDS, FULL
from efft.models import hub
from efft.models.encoder import EncoderConfig
from efft.peft import base as peft
from efft.peft.build import call, family
from efft.training import losses

log = logging.getLogger(__name__)

# A teacher by this name is what was there before the first stage that prunes or trains masks.
UNPRUNED = 'unpruned'
MASKS = 'pruning'  # FAMILY of the methods that are such masks


def train(config, workdir, *, resume: str = 'auto') -> dict:
  """`finetune.train`, for configs with and without stages.

  With stages, results.json holds 'stages' too: a row each, with the validation metrics after it,
  the largest difference of a logit to the stage before, and how many predictions changed.
  """
  config = configs.resolve(config)
  if not config['stages']:
    return finetune.train(config, workdir, resume=resume)
  return _stages(config, Path(workdir), resume, None)


def compress(run, config, workdir, *, resume: str = 'auto') -> dict:
  """Makes a finished run smaller, by the stages of a config.

  Stages before the first that prunes or quantises are left out: the run stands for them. What the
  config leaves at its default is the run's own: config.model's name, max_length, dtype and pooling,
  and where it names no task the fields of config.task, and the seed, by which subsets are drawn.
  Another max_length or dtype is that of the smaller run; another model or pooling is refused. A
  task that is named is what all stages look at, score by and train on.

  Args:
    run: a run folder, or a bundle where the config names a task.
    config: with stages, as for `train`.
    workdir: the run folder to make, or to continue.
    resume: see `finetune.train`.

  Raises:
    InputError: a config without stages that prune or quantise, of another model, or a task of other
      labels.
  """
  run, workdir, given = Path(run), Path(workdir), configs.plain(config)
  content = bundle.load(run)
  _inherit(given, run, content)
  config = configs.resolve(given)
  names = list(config['stages'])
  first = next((i for i, name in enumerate(names) if 'fn' in config['stages'][name]), None)
  if first is None:
    fix = "as in config.stages = {'s1_heads': {'fn': 'prune.heads'}}"
    found = ', '.join(names) or 'none'
    raise InputError('config.stages', found, 'a stage that prunes or quantises', fix)
  for name in names[:first]:
    if masks(configs.tuned(config, config['stages'][name])):
      raise InputError(
        f'config.stages.{name}', 'masks that train before the first stage that prunes or quantises',
        'such a stage before them, as all others are left out: the run stands for them',
        "begin with {'s0_merge': {'fn': 'prune.merge'}}",
      )  # fmt: skip
  config['stages'] = {name: config['stages'][name] for name in names[first:]}
  if not (workdir / 'config.json').exists():
    # The first stage would refuse them too, but in a folder that is then of this config.
    assemble.check_length(EncoderConfig.from_dict(content.encoder), config['model']['max_length'])
    _data(config, content)
  return _stages(config, workdir, resume, run)


def _inherit(given: dict, run: Path, content: bundle.Bundle) -> None:
  """Puts into a config what `compress` takes over from the run."""
  file = run / 'config.json'
  own = files.read_json(file) if file.exists() else {}
  task, model = (given.setdefault(name, {}) for name in ('task', 'model'))
  if not task.get('name'):
    if not own:
      found, fix = 'no config.json, so no task', 'name one: --config=FILE.py:task=...'
      raise InputError(str(run), found, 'a run that knows its task', fix)
    defaults = {name: FIELDS[f'task.{name}'].default for name in own['task']}
    changed = {n: x for n, x in task.items() if n not in defaults or x != defaults[n]}
    given['task'] = own['task'] | changed
    if given.get('seed', FIELDS['seed'].default) == FIELDS['seed'].default:
      given['seed'] = own['seed']
    if given['task'] == own['task']:
      assemble.own_task(run, content.labels)  # the same texts by now, too
  of_run = {
    'name': own['model']['name'] if own else content.base['name'], 'pooling': content.pooling,
    'max_length': content.max_length, 'dtype': content.dtype,
  }  # fmt: skip
  for name, value in of_run.items():
    default = FIELDS[f'model.{name}'].default
    asked = model.get(name, default)
    if name in ('name', 'pooling') and asked not in (default, value):
      fix = 'leave it out: the run stands for the model'
      raise InputError(f'config.model.{name}', repr(asked), f'{value!r}, as {run} has', fix)
    if asked == default:
      model[name] = value


def _data(config: dict, content: bundle.Bundle) -> sources.Dataset:
  """The data set of a config, for what a bundle answers."""
  data = sources.load(**config['task'], seed=config['seed'])
  if (data.kind, data.labels) != (content.kind, tuple(content.labels)):
    found, expected = (
      f'{kind}: {", ".join(labels) or "numbers"}'
      for kind, labels in ((data.kind, data.labels), (content.kind, content.labels))
    )
    raise InputError(
      'config.task', f'a task of {found}', f'{expected}, as the run answers',
      'name a task of these labels, or restore the data that the run was trained on',
    )  # fmt: skip
  return data


def _stages(config: dict, workdir: Path, resume: str, run: Path | None) -> dict:
  if config['mesh']['distributed']:
    where, found = 'config.mesh.distributed', 'True with stages'
    raise InputError(where, found, 'one host', 'run the stages one by one, each from the last')
  plan = _plan(config, run)
  source = None if run is None else bundle.identity(run)
  begin = time.time()
  if not (workdir / 'config.json').exists() or (workdir / 'results.json').exists():
    # Refused before there is a folder to lock, or finished, which nobody changes any more.
    _same_source(workdir, run, source)
    if (done := finetune.before(config, workdir, resume)) is not None:
      return done
  with files.RunLock(workdir):
    # Under the lock: another process may be at work here, by its own plan.
    _same_source(workdir, run, source)
    if resume != 'never':
      _change(config, workdir)
    if (done := finetune.before(config, workdir, resume)) is not None:
      return done
    files.sweep(workdir / 'stages')
    if run is not None:
      files.write_json(workdir / 'source.json', {'sha256': source})
    files.write_json(workdir / 'config.json', config)
    files.write_json(workdir / 'environment.json', environment.describe())
    rows = list(_carry_out(plan, workdir, run))
    stages = [workdir / 'stages' / row['stage'] for row in rows]
    if trained := [folder for folder in stages if (folder / assemble.DATA).exists()]:
      for name in (assemble.DATA, assemble.BASE):
        if (trained[0] / name).exists():
          files.write_json(workdir / name, files.read_json(trained[0] / name))
    content = alone(bundle.load(stages[-1]))
    bundle.save(workdir / 'bundle', content)
    results = {
      'task': config['task']['name'],
      'model': config['model']['name'],
      'metrics': rows[-1]['metrics'],
      'parameters': rows[-1]['parameters'],
      'bundle_mb': round(finetune.folder_size(workdir / 'bundle') / 1e6, 3),
      'peak_mb': round(environment.peak_memory() / 1e6, 1),
      'wall_seconds': round(time.time() - begin, 2),
      'config_hash': configs.config_hash(config),
      'stages': rows,
    }
    files.write_json(workdir / 'results.json', results)
    files.atomic_write(workdir / 'README.md', _card(content, results, workdir))
  return results


def _same_source(workdir: Path, run: Path | None, source: str | None) -> None:
  """Refuses a folder that was made from another run."""
  file = workdir / 'source.json'
  if file.exists() and (there := files.read_json(file)) != {'sha256': source}:
    raise InputError(
      str(workdir), f'made from the run with sha256 {there["sha256"]}', f'{run}, which is {source}',
      'pass another --workdir',
    )  # fmt: skip


def _change(config: dict, workdir: Path) -> None:
  """Takes up another plan for the stages that an unfinished run has not come to.

  Whoever asked for too much in the third stage need not make the first two again.
  """
  file = workdir / 'config.json'
  if not file.exists() or (workdir / 'results.json').exists():
    return
  old = files.read_json(file)
  if not old.get('stages'):
    return  # another kind of run
  done = [n for n in old['stages'] if (workdir / 'stages' / n / 'stage.json').exists()]
  if list(config['stages'])[: len(done)] != done:
    return

  def fixed(config):
    return config | {'stages': {name: config['stages'][name] for name in done}}

  if not configs.difference(fixed(old), fixed(config)):
    files.write_json(file, config)


def _plan(config: dict, run: Path | None) -> dict[str, tuple[dict, Prune | None]]:
  """{stage: (its config, what prunes: None where it trains)}; all that can be wrong is, now."""
  plan = {}
  for name, stage in config['stages'].items():
    if 'fn' in stage:
      if run is None and not plan:
        what = f'config.stages.{name}'
        raise InputError(what, 'nothing trained before it', 'a stage that trains first', 'add one')
      prune = call(f'config.stages.{name}', stage, 'Prune', 'efft.compress')
      plan[name] = configs.tuned(config, {}), prune
    else:
      plan[name] = configs.tuned(config, stage), None
      assemble.check_end(plan[name][0], f'config.stages.{name}')
  first = next((i for i, each in enumerate(plan.values()) if prunes(*each)), len(plan))
  for name, (own, prune) in list(plan.items())[first:]:
    if run is None and not first and prune is None and own['distil']['teacher'] == UNPRUNED:
      raise InputError(
        f'config.stages.{name}.distil.teacher', f'{UNPRUNED!r}, and nothing before the first masks',
        'a stage that trains before them', "add {'s0_tune': {}} or name a run",
      )  # fmt: skip
  return plan


def masks(config: Mapping) -> bool:
  """Whether a stage that trains learns what to prune."""
  return any(family(spec['fn']) == MASKS for spec in config['method'].values())


def prunes(config: Mapping, prune: Prune | None) -> bool:
  return prune is not None or masks(config)


def _carry_out(plan: Mapping, workdir: Path, run: Path | None) -> Iterator[dict]:
  """A row for each stage, as it is finished."""
  before, unpruned, known = run, None, None
  for name, (config, prune) in plan.items():
    folder = workdir / 'stages' / name
    if unpruned is None and prunes(config, prune):
      unpruned = before
    file, begin = folder / 'stage.json', time.time()
    if prune is None:
      if before is not None:
        config['model'] |= {'name': str(before), 'head': 'keep', 'pooling': 'auto', 'init_from': []}
      if config['distil']['teacher'] == UNPRUNED:
        config['distil']['teacher'] = str(unpruned or '')
      finetune.train(config, folder)
    else:
      # Not by its results.json: a stage that was killed before its row was written may have been
      # made by other options, and nothing in it says by which.
      if not file.exists():
        goes_on = next((c['method'] for c, p in _later(plan, name) if p is None), None)
        content = bundle.load(before)
        if before == run:
          wanted = {name: config['model'][name] for name in ('max_length', 'dtype')}
          content = dataclasses.replace(content, **wanted)
        with progress.logs(workdir / 'compress.log'):
          _shrink(config, prune, content, unpruned, folder, name, goes_on)
    if file.exists():
      row, known = files.read_json(file), None
    else:
      said, known = _judged(folder, before, known)
      content = alone(bundle.load(folder))
      cfg = EncoderConfig.from_dict(content.encoder)
      row = {
        'stage': name, **said,
        'parameters': _parameters(content),
        'layers': cfg.layers, 'heads': sum(cfg.heads), 'units': sum(cfg.mlp),
        'hidden': cfg.hidden, 'words': cfg.vocab_size,
        **_zeros(cfg, content),
        **(files.read_json(folder / 'results.json') if prune else {}),
        'seconds': round(time.time() - begin, 2),
      }  # fmt: skip
      files.write_json(file, row)
      with progress.logs(workdir / 'compress.log'):
        log.info('stage %s: %s', name, summary(row))
    before = folder
    yield row


def _later(plan: Mapping, name: str) -> list:
  return list(plan.values())[list(plan).index(name) + 1 :]


def _shrink(
  config: dict, prune: Prune, content: bundle.Bundle, unpruned: Path, folder: Path, name: str,
  goes_on: Mapping | None,
) -> None:  # fmt: skip
  """One stage that prunes: from the bundle before it to a run folder.

  Deltas are folded into the weights first, unless they train on: `goes_on` is the method of the
  next stage that trains, None where there is none.
  """
  content, trained = alone(content), content.method
  if content.method and goes_on is not None and dict(goes_on) != content.method:
    content = merging.merged(content)
  cfg = EncoderConfig.from_dict(content.encoder)
  net = assemble.network(cfg, content.method, 'float32')
  variables = transfer.restored(net.deltas, content.leaves, {}, content.quantize)
  data = _data(config, content)
  tokenizer = hub.tokenizer_from(content.tokenizer)
  cache = packages.cache_root() / 'tokens'
  encoded = tokens.encode(data.splits['train'], tokenizer, content.max_length, cache)
  feed = batches.Batches(encoded, min(prune.batch_size, len(encoded)), config['seed'])
  count = -(-min(prune.examples, len(encoded)) // feed.batch_size)
  part = data.splits['train']
  looked_at = [feed.batch(i) for i in range(count)]
  if surplus := count * feed.batch_size - min(prune.examples, len(encoded)):
    looked_at[-1]['weights'][-surplus:] = 0
  subject = Subject(
    net, variables, losses.build(content.kind), looked_at,
    seed=config['seed'], tokenizer=content.tokenizer, texts=part.texts, pairs=part.pairs,
    max_length=content.max_length,
    dense=EncoderConfig.from_dict(bundle.read_about(unpruned)['encoder']), dtype=content.dtype,
    folded=bool(trained) and not content.method,
  )  # fmt: skip
  try:
    smaller = prune.act(subject)
  except ValueError as error:
    where = f'config.stages.{name}'
    raise InputError(where, str(error), 'options that fit this encoder', 'correct it') from None
  values = variables if smaller.variables is None else smaller.variables
  folded = 'delta' in variables and 'delta' not in values
  deltas = {} if folded else net.deltas
  cfg, values = slicing.cut(cfg, values, smaller.keep, deltas)
  with files.atomic_folder(folder) as temp:
    method, rules = ({}, FULL) if folded else (content.method, content.rules)
    if not method and quantize.held(values):
      rules = quantize.beside(values)
    content = dataclasses.replace(
      content, encoder=cfg.to_dict(), leaves=tree.flatten(jax.device_get(values)), method=method,
      rules=tuple(map(tuple, rules)), tokenizer=smaller.tokenizer or content.tokenizer, metrics={},
      columns=data.columns, versions=environment.versions(),
    )  # fmt: skip
    bundle.save(temp / 'bundle', content)
    own = config | {'method': method, 'rules': [list(rule) for rule in rules], 'stages': {}}
    own |= {'optim': {}, 'distil': {}}  # nothing trains here
    files.write_json(temp / 'config.json', configs.resolve(own))
    measured = prune.measure(subject.dense, cfg, content.dtype) if prune.measure else {}
    files.write_json(temp / 'results.json', {'parameters': _parameters(content), **measured})


def alone(content: bundle.Bundle) -> bundle.Bundle:
  """A bundle that needs no other: with all numbers of the encoder that it is beside."""
  if not content.needs_base:
    return content
  deltas = peft.build(content.method)
  params = starting.pretrained(content)
  variables = transfer.restored(deltas, content.leaves, params, content.quantize)
  leaves = tree.flatten(jax.device_get(variables))
  own = {path: x for path, x in content.leaves.items() if path.startswith('delta/')}
  return dataclasses.replace(content, leaves={**leaves, **own}, needs_base=False, quantize=())


def _judged(folder: Path, before: Path | None, known) -> tuple[dict, Any]:
  """What is known of a run on the validation split, and its logits there.

  Args:
    folder, before: this stage's run and the one before it.
    known: the logits of the one before; None: not yet computed.
  """
  content = bundle.load(folder)
  data = assemble.own_task(folder, content.labels)
  part = data.splits['validation']

  def logits(run, content):
    # In float32, so that what differs is what the stage has done.
    content = dataclasses.replace(content, dtype='float32')
    return Classifier.of(content, str(run)).logits(part.texts, part.pairs)

  found = logits(folder, content)
  metrics = scoring.score(data.metrics, losses.build(data.kind), part.labels, found, data.kind)
  said = {'metrics': metrics}
  if before is not None:
    old = logits(before, bundle.load(before)) if known is None else known
    said['difference'] = float(np.abs(found - old).max())
    said['flips'] = merging.flips(old, found, data.kind)
  return said, found


def _parameters(content: bundle.Bundle) -> int:
  return sum(int(np.prod(x.shape)) for x in alone(content).leaves.values())


def _zeros(cfg: EncoderConfig, content: bundle.Bundle) -> dict[str, float]:
  """{'zeros': the share of the layers' kernels that is exactly 0}, where they are plain floats."""
  values = tree.unflatten(content.leaves)
  if content.method or quantize.held(values):
    return {}
  return {'zeros': round(dead.sparsity(cfg, values['params'])['zeros'], 6)}


def _card(content: bundle.Bundle, results: dict, workdir: Path) -> str:
  stages = {row['stage']: summary(row) for row in results['stages']}
  costs = {name: results[name] for name in ('parameters', 'bundle_mb', 'wall_seconds')}
  return bundle.card(
    vars(dataclasses.replace(content, metrics=results['metrics'])),
    title=f'{results["task"]}: {results["model"]}, {len(stages)} stages',
    machine={**stages, **costs},
    command=f'efft predict --run={workdir} --input=texts.csv --output=out.jsonl',
  )


def summary(row: dict) -> str:
  metrics = ', '.join(f'{name} {value:.4f}' for name, value in row['metrics'].items())
  shape = f'{row["layers"]} layers, {row["heads"]} heads, {row["units"]} units'
  more = f', {100 * row["zeros"]:.0f} % of the kernels 0' if row.get('zeros') else ''
  if 'speedup' in row:
    more += f', {row["speedup"]:.2f} times as fast ({row["speedup_asked"]:g} asked)'
  return f'{metrics}; {shape}, {row["parameters"]:,} parameters{more}'
