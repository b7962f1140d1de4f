"""What a training step of every method costs, one config after the other, each in its own process.

    taskset -c 0 python experiments/methods/cost.py --data=FOLDER [--shard=0/2]

The runs of run.py share steps, and so say nothing of the speed of one alone: here each config makes
60 steps of 16 pairs of stsb's texts (FOLDER/stsb), and writes to costs.jsonl how many examples a
second its steps came to after compilation, what the compiled step asks for, and what the process
held at most. Nothing else may run on that core; several share the work by --shard, a core each.
What costs.jsonl has is not made again.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
from absl import app, flags
from run import DATA, HERE, MODEL, SHARD, names, settings

from efft import environment, files, finetune

COSTS = flags.DEFINE_string('costs', str(HERE / 'costs.jsonl'), 'where records go')
ALONE = flags.DEFINE_string('alone', None, 'internal: the config of this process')
STEPS, BATCH = 60, 16


def alone(name: str) -> None:
  """Trains for some steps in this process, and appends the record."""
  config = settings('stsb', name, 0, 1.0)
  with tempfile.TemporaryDirectory() as scratch:
    task = Path(scratch) / 'stsb'
    task.mkdir()
    # As many texts as the steps take; a validation split that costs no time and no memory.
    for split, rows in (('train', STEPS * BATCH), ('validation', BATCH)):
      texts = pd.read_parquet(Path(DATA.value) / 'stsb' / f'{split}.parquet')
      texts.head(rows).to_parquet(task / f'{split}.parquet')
    config.task.path, config.task.halves = str(task), False
    config.train.batch_size, config.train.steps, config.train.eval_steps = BATCH, STEPS, STEPS
    config.eval.batch_size = BATCH
    results = finetune.train(config, Path(scratch) / 'run')
  step = results['step']
  record = {
    'config': name, 'steps': STEPS, 'batch': BATCH, 'length': step['length'],
    'examples_per_second': results['examples_per_second'],
    'compile_seconds': results['compile_seconds'],
    'step_gflops': round(step['flops'] / 1e9, 3), 'step_mb': step['memory_mb'],
    'peak_mb': results['peak_mb'], 'trainable': results['trainable'],
    'bundle_mb': results['bundle_mb'], 'cores': len(os.sched_getaffinity(0)),
    'cpu': environment.describe()['cpu'],
  }  # fmt: skip
  files.append_jsonl(Path(COSTS.value), record)
  print(record, flush=True)


def main(argv):
  del argv
  if ALONE.value:
    alone(ALONE.value)
    return
  output = Path(COSTS.value)
  have = {r['config'] for r in files.read_jsonl(output)} if output.exists() else set()
  index, count = map(int, SHARD.value.split('/'))
  for name in list(names())[index::count]:
    if name in have:
      continue
    again = [f'--{f.name}={f.value}' for f in (DATA, MODEL, COSTS)]
    command = [sys.executable, __file__, *again, f'--alone={name}']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
      error = ' '.join(done.stderr.strip().splitlines()[-1:])[:500]
      files.append_jsonl(output, {'config': name, 'error': error})
      print(json.dumps([name, error]), flush=True)


if __name__ == '__main__':
  app.run(main)
