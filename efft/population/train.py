"""Runs that differ in numbers and not in shapes, trained together: one jitted step for all.

    configs = [config | {'seed': seed} for seed in range(8)]
    train(configs, [f'runs/{i}' for i in range(8)])

`jax.vmap` goes over what trains (delta, head, optimiser) and over what the members' configs differ
in; the frozen encoder is there once, and its products see the examples of all members as one batch.
Each member has its own order of examples and draws of dropout, and ends with the weights and scores
that it would have alone, up to rounding; but for dropout in steps in which another member's batch
is longer, because the shape that is drawn for is then another.

Ranks are filled up with zeros to the largest, heads with classes that cannot be chosen: where one
factor of a product is zero no gradient reaches the other, so both stay what they are.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efft import assemble, files, finetune, mesh, progress, trackers, tree
from efft import config as configs
from efft.alike import PLACES
from efft.data import batches
from efft.errors import InputError
from efft.eval import evaluate as scoring
from efft.population.members import RATES, Member, equal, gather, put
from efft.training import loop, losses, optim, step

log = logging.getLogger(__name__)

NEVER = -1e9  # the bias of a class that a task does not have
PACED = 12  # steps timed alone, the first two of which do not count


def train(
  members: Sequence, workdirs: Sequence, *, places: int = PLACES,
  rungs: Mapping[int, int] | None = None,
) -> list[dict]:  # fmt: skip
  """Fine-tunes members together; each leaves the bundle, results and metrics of `finetune.train`.

  On one device, without checkpoints and train.log: what is stopped begins again.

  Args:
    members: configs, as for `finetune.train`, that differ in `VARIES` alone.
    workdirs: the run folder of each; one that is finished is not made again.
    places: members that train side by side. More of them take turns.
    rungs: {step: how many members go on from there}, successive halving (Jamieson and Talwalkar
      2016, arXiv 1502.07943): the best by the validation metric at that step. Nothing is compiled
      anew: those that go on close ranks in the same places.

  Returns:
    The results of each member. Those that a rung stopped have 'stopped', the step, and no bundle;
    those that diverged have 'diverged', and the others go on as if they had not been there.

  Raises:
    InputError: configs that cannot train together, or a folder of another run.
  """
  resolved = [configs.resolve(config) for config in members]
  workdirs = [Path(workdir) for workdir in workdirs]
  if len(set(workdirs)) < len(workdirs):
    raise InputError('workdirs', 'one folder twice', 'a folder for each member', 'name another')
  done = [finetune.before(config, w, 'auto') for config, w in zip(resolved, workdirs, strict=True)]
  left = [i for i, results in enumerate(done) if results is None]
  if left:
    found = gather([resolved[i] for i in left], [workdirs[i] for i in left])
    metrics = {m.job.data.metrics[0] for m in found}
    if rungs and len(metrics) > 1:
      expected = 'one metric, or scores cannot be ranked'
      raise InputError(
        'rungs', f'tasks of {", ".join(sorted(metrics))}', expected, 'leave them out'
      )
    for i, results in zip(left, _Population(found, places).run(dict(rungs or {})), strict=True):
      done[i] = results
  return done


class _Population:
  """Members, and the program that trains them on one device."""

  def __init__(self, members: list[Member], places: int):
    self.members, self.places = members, min(places, len(members))
    first = members[0].job
    self.options = first.config['train']
    self.kind, self.ema = first.data.kind, first.config['optim']['ema']
    _, self.total, self.every = finetune.course(first)
    self.loss = losses.build(self.kind, self.options['label_smoothing'])
    self.devices = mesh.make(1)
    self.shapes = {}
    for m in members:
      for path, x in tree.flatten(m.job.variables).items():
        known = self.shapes.get(path, np.shape(x))
        self.shapes[path] = tuple(map(max, known, np.shape(x)))
    # The member that trains most has the ranks that the others are filled up to.
    self.model = max(members, key=lambda m: tree.count(m.job.parts.trainable)).job
    self.cfg = dataclasses.replace(self.model.base.cfg, num_labels=max(m.labels for m in members))
    dtype = assemble.DTYPES[first.config['model']['dtype']]
    frozen = [tree.flatten(step.cast_frozen(m.job.parts.frozen, dtype)) for m in members]
    own = [p for p, x in frozen[0].items() if not all(equal(f[p], x) for f in frozen)]
    shared = tree.unflatten({p: x for p, x in frozen[0].items() if p not in own})
    self.shared = mesh.place(shared, self.devices)
    self.own = {
      id(m): tree.unflatten({p: self._filled(p, f[p]) for p in own})
      for m, f in zip(members, frozen, strict=True)
    }
    self.step = jax.jit(jax.vmap(self._step, in_axes=(0, 0, 0, None, 0)), donate_argnums=0)
    self.logits = jax.jit(self._logits)
    self.clock, self.widths = loop.Clock(), set()
    self._check()

  def _check(self) -> None:
    """Refuses, before anything is written, methods that decide by a number that members vary."""

    def build(numbers):
      self._network(numbers)
      self._optimizer(numbers)

    try:
      jax.eval_shape(build, self._numbers(self.members[0]))
    except InputError as error:
      found = f'members that differ in {", ".join(self.members[0].numbers)}'
      expected = 'numbers that the method computes with, and does not decide by'
      raise InputError(error.where, found, expected, 'train them one by one') from None

  # The program. `numbers` are the traced values of the fields in which members differ.

  def _network(self, numbers: Mapping) -> assemble.Network:
    rates = {name: numbers[f'rate.{name}'] for name in RATES if f'rate.{name}' in numbers}
    config = self._config(numbers)
    options = config['method'], config['model']['dtype'], config['model']['remat']
    return assemble.network(dataclasses.replace(self.cfg, **rates), *options)

  def _optimizer(self, numbers: Mapping):
    return optim.optimizer(self._config(numbers)['optim'], self.model.parts.groups, self.total)

  def _config(self, numbers: Mapping) -> dict:
    fields = {p: x for p, x in numbers.items() if p.startswith(('optim.', 'method.'))}
    return put(self.model.config, fields)

  def _step(self, state, numbers, own, frozen, batch):
    net, weight = self._network(numbers), self.options['consistency']
    weights = numbers.get('class_weights')
    take = step.make_step(
      net.logits, self.loss, self._optimizer(numbers),
      accumulate=self.options['accumulate'], ema=self.ema, penalty=net.penalty,
      class_weights=weights,
      consistency=losses.divergence(self.kind, weight) if weight else None,
    )  # fmt: skip
    return take(state, tree.join(own, frozen), batch)

  def _logits(self, weights, numbers, own, frozen, batch):
    return self._network(numbers).logits(tree.join(weights, own, frozen), batch)

  # Shapes.

  def _filled(self, path: str, x):
    """A leaf in the shape of the largest member's."""
    missing = [(0, to - size) for to, size in zip(self.shapes[path], np.shape(x), strict=True)]
    if not any(right for _, right in missing):
      return x
    fill = NEVER if path == 'params/head/out/bias' else 0.0
    return np.pad(np.asarray(x), missing, constant_values=fill)

  def _cut(self, m: Member, weights):
    """A member's weights in its own shapes."""
    shapes = {p: np.shape(x) for p, x in tree.flatten(m.job.parts.trainable).items()}
    return tree.map_paths(lambda p, x: x[tuple(map(slice, shapes[p]))], weights)

  def _start(self, m: Member):
    trainable = tree.map_paths(self._filled, m.job.parts.trainable)
    return step.init_state(trainable, self._optimizer({}), seed=m.config['seed'], ema=self.ema)

  def _batch(self, wave: list[Member], count: int) -> dict[str, np.ndarray]:
    """Arrays [K, B, ...] of the batches of a step; T is the widest of them."""
    found = [m.feed.batch(count) for m in wave]
    width = max(batch['mask'].shape[1] for batch in found)

    def widened(m, name, x):
      if name not in ('input_ids', 'mask', 'token_types'):
        return x
      fill = m.feed.encoded.pad_id if name == 'input_ids' else 0
      return np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill)

    both = list(zip(wave, found, strict=True))
    return {
      name: np.stack([widened(m, name, batch[name]) for m, batch in both]) for name in found[0]
    }

  def _numbers(self, m: Member) -> dict:
    """What the program is given of a member's config, 'class_weights' [C] included."""
    found = {name: jnp.float32(x) for name, x in m.numbers.items()}
    weights = finetune.class_weights(m.job)
    if weights is not None:
      found['class_weights'] = jnp.ones(self.cfg.num_labels).at[: m.labels].set(weights)
    return found

  # The run.

  def run(self, rungs: dict[int, int]) -> list[dict]:
    begin, members = time.time(), self.members
    with contextlib.ExitStack() as stack:
      for m in members:
        stack.enter_context(files.RunLock(m.workdir))
        finetune.describe(m.job, m.workdir)
        (m.workdir / 'metrics.jsonl').unlink(missing_ok=True)
        m.sinks = trackers.make(m.workdir, m.config['trackers'], m.config)
        for sink in m.sinks:
          stack.callback(sink.close)
          sink.resume(0)
      shown = progress.Progress(stack.enter_context(progress.logs()))
      for line in finetune.announce(self.model):
        log.info(line)
      names = sorted({name for m in members for name in m.numbers})
      log.info(
        'population of %d: they differ in %s', len(members), ', '.join(names) or 'seed, data'
      )
      for m in members:
        m.state = self._start(m)
      shown.start(0, sum(self._waves(rungs)))
      stack.callback(shown.stop)
      start, passed = 0, 0
      for stop in sorted({*(s for s in rungs if s < self.total), self.total}):
        going = [m for m in members if m.ended is None]
        for i in range(0, len(going), self.places):
          self._advance(going[i : i + self.places], start, stop, shown, passed)
          passed += stop - start
        if stop in rungs:
          self._halve(stop, rungs[stop])
        start = stop
      for m in members:
        m.ended = m.ended or ('', self.total)
      if any(not word for word, _ in (m.ended for m in members)):
        self._pace()
      return [self._finish(m, time.time() - begin) for m in members]

  def _paced(self, m: Member) -> bool:
    """Whether `_pace` is about a member: of its task, and with nothing filled up."""
    own = tree.flatten(m.job.variables).items()
    same = m.job.data.name == self.members[0].job.data.name
    return same and all(self.shapes[path] == np.shape(x) for path, x in own)

  def _pace(self) -> None:
    """What a step costs one member that is alone: the times of a population are of all together."""
    m, size = self.members[0], self.options['batch_size']
    seen = [m.feed.batch(i) for i in range(min(self.total, finetune.LOOKED_AT))]
    take = jax.jit(self._step, donate_argnums=0)
    state = mesh.replicate(m.state, self.devices)
    given = self._numbers(m), self.own[id(m)], self.shared
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    usual = finetune.usual(seen)
    taken = []
    for _ in range(PACED):
      begin = time.perf_counter()
      state, _ = jax.block_until_ready(take(state, *given, usual))
      taken.append(time.perf_counter() - begin)
    self.rate = size / float(np.median(taken[2:]))
    self.cost = finetune.cost(take, like, given, usual)

  def _waves(self, rungs: dict[int, int]) -> list[int]:
    """Steps of each turn on the device."""
    start, going, turns = 0, len(self.members), []
    for stop in sorted({*(s for s in rungs if s < self.total), self.total}):
      turns += [stop - start] * -(-going // self.places)
      start, going = stop, min(going, rungs.get(stop, going))
    return turns

  def _advance(self, wave: list[Member], start: int, stop: int, shown, passed: int) -> None:
    """Trains a wave from one step to another. Empty places repeat its first member."""
    filled = wave + wave[:1] * (self.places - len(wave))
    # Placed as the step's results are, or its second call would compile it anew.
    state = mesh.replicate(_stacked([m.state for m in filled]), self.devices)
    given = (
      _stacked([self._numbers(m) for m in filled]),
      _stacked([self.own[id(m)] for m in filled]),
    )
    pending = []
    for count in range(start + 1, stop + 1):
      batch = self._batch(filled, count - 1)
      args = state, *given, self.shared, batch
      if batch['mask'].shape in self.widths:
        self.clock.start()
        state, metrics = self.step(*args)
        self.clock.examples += len(wave) * self.options['batch_size']
      else:
        self.widths.add(batch['mask'].shape)
        self.clock.stop()
        with self.clock.compiling():
          state, metrics = jax.block_until_ready(self.step(*args))
      pending.append((count, metrics))
      evaluating = count in (stop, self.total) or count % self.every == 0
      if evaluating or count % self.options['log_every'] == 0:
        loss = self._flush(wave, pending)
        shown.update(passed + count - start, loss=loss, rate=self.clock.rate())
      if evaluating:
        for i, m in enumerate(wave):
          if m.ended is None:
            weights = jax.tree.map(lambda x, i=i: x[i], state.weights)
            self._evaluate(m, weights, count)
      if all(m.ended for m in wave):
        break
    for i, m in enumerate(wave):
      m.state = jax.device_get(jax.tree.map(lambda x, i=i: x[i], state))

  def _flush(self, wave: list[Member], pending: list) -> float:
    """Writes the records of the pending steps; gives the mean loss at the last."""
    values = jax.device_get([metrics for _, metrics in pending])
    self.clock.stop()
    now = time.time()
    for i, m in enumerate(wave):
      rows = []
      for (count, _), metrics in zip(pending, values, strict=True):
        if m.ended is None:
          own = {name: float(x[i]) for name, x in metrics.items()}
          rows.append({'event': 'train', 'step': count, **own, 'time': now})
          if not loop.finite(own):
            m.ended = 'diverged', count
            log.warning('%s: loss %s at step %d: it ends', m.workdir, own['loss'], count)
      for sink in m.sinks:
        sink.write(rows)
    pending.clear()
    found = [values[-1]['loss'][i] for i, m in enumerate(wave) if m.ended is None]
    return float(np.mean(found)) if found else float('nan')

  def _score(self, m: Member, weights, split: str) -> dict[str, float]:
    part, numbers = m.job.encoded[split], self._numbers(m)
    found = scoring.predict(
      lambda weights, batch: self.logits(weights, numbers, self.own[id(m)], self.shared, batch),
      weights, batches.evaluation(part, m.config['eval']['batch_size']), self.devices,
    )[:, : m.labels]  # fmt: skip
    names = m.job.data.metrics
    return scoring.score(names, losses.build(self.kind), part.labels, found, self.kind)

  def _evaluate(self, m: Member, weights, count: int) -> None:
    loop.judge(
      lambda _: self._score(m, weights, 'validation'),
      None, count, m.memo, m.job.data.metrics[0], True, m.sinks,
    )  # fmt: skip
    if self.options['save'] == 'last' or m.memo.best_step in (None, count):
      m.best = jax.device_get(weights), count
    if self.options['patience'] and m.memo.worse >= self.options['patience']:
      m.ended = '', count

  def _halve(self, count: int, kept: int) -> None:
    name = self.model.data.metrics[0]
    going = [m for m in self.members if m.ended is None]
    found = {id(m): m.memo.last_metrics[name] for m in going}
    going.sort(key=lambda m: -np.nan_to_num(found[id(m)], nan=-np.inf))
    for m in going[kept:]:
      m.ended = 'stopped', count
      log.info('%s: stopped at step %d with %s %.4f', m.workdir, count, name, found[id(m)])

  def _finish(self, m: Member, seconds: float) -> dict:
    (word, last), share, paced = m.ended, 1 / len(self.members), self._paced(m)
    if word:
      results = {
        'task': m.job.data.name, 'model': m.job.base.name, 'metrics': m.memo.last_metrics,
        word: last, 'steps': last, 'config_hash': configs.config_hash(m.config),
      }  # fmt: skip
      files.write_json(m.workdir / 'stopped.json', results)
      return results
    weights, best_step = m.best
    own = self._cut(m, weights)
    fit = loop.Fit(
      step.State(last, m.config['seed'], own, None), best_step, last,
      m.memo.best_metrics if best_step == m.memo.best_step else m.memo.last_metrics,
      seconds=self.clock.seconds * share, compile_seconds=self.clock.compile_seconds * share,
      examples_per_second=self.rate if paced else 0.0,
    )  # fmt: skip
    pieces = self.options['accumulate']
    results = finetune.hand_on(m.job, fit, m.workdir, seconds * share, accumulate=pieces)
    results |= {'population': len(self.members)}
    results |= {'step': self.cost} if paced else {}
    if m.config['task']['halves']:
      results['report'] = self._score(m, weights, 'report')
    finetune.finish(m.job, results, m.workdir)
    return results


def _stacked(trees: list):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
