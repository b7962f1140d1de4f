"""LoRA and full fine-tuning of all-MiniLM-L6-v2 on four GLUE-shaped folders, three seeds.

    python experiments/baseline/run.py --data=FOLDER

FOLDER holds sst2/, mrpc/, cola/ and stsb/, each with train.parquet and validation.parquet. Every
run that records.jsonl does not have yet is made, in a process of its own; `table.py` sets the
records beside those of peer.jsonl: transformers + PEFT with the same steps, batch size, learning
rate, schedule, decay, clipping and pooling.

The budget is small, 100 to 400 steps of 16 examples, so that both sides fit into three hours on two
cores. The scores compare two implementations; they are not what the method can reach.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from absl import app, flags

from efft import files

RECORDS = Path(__file__).parent / 'records.jsonl'

DATA = flags.DEFINE_string('data', os.environ.get('EFFT_DATA'), 'folder of the four tasks')
MODEL = flags.DEFINE_string('model', 'all-MiniLM-L6-v2', 'encoder')
OUTPUT = flags.DEFINE_string('output', str(RECORDS), 'where records go')

GRID = {
  'seed': (0, 1, 2),
  'task': ('sst2', 'mrpc', 'cola', 'stsb'),
  'method': ('lora', 'full'),
  'pooling': ('cls', 'mean'),
}
STEPS = {'sst2': 100, 'mrpc': 150, 'cola': 400, 'stsb': 250}
LR = {'lora': 2e-3, 'full': 1e-4}
BATCH = 16
KEPT = (
  'metrics', 'steps', 'trainable', 'seconds', 'compile_seconds', 'examples_per_second', 'peak_mb',
  'bundle_mb',
)  # fmt: skip


def train(seed: int, task: str, method: str, pooling: str, steps: int) -> dict:
  """One run through the real command line; returns its record."""
  overrides = {
    'seed': seed,
    'task.path': Path(DATA.value) / task,
    'model.name': MODEL.value,
    'model.pooling': pooling,
    'optim.lr': LR[method],
    'train.batch_size': BATCH,
    'train.steps': steps,
    # Evaluated once, at the end: nothing is chosen on the split that is reported.
    'train.eval_epochs': 50,
    'train.save': 'last',
  }
  with tempfile.TemporaryDirectory() as folder:
    workdir = Path(folder) / 'run'
    command = [sys.executable, '-m', 'efft', 'train', f'--workdir={workdir}']
    command += [f'--config=configs/{method}.py:task={task}']
    command += [f'--config.{name}={value}' for name, value in overrides.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
      raise RuntimeError(f'{command}: {done.stderr[-2000:]}')
    results = json.loads((workdir / 'results.json').read_text())
  return {'lr': LR[method], 'batch': BATCH, **{name: results[name] for name in KEPT}}


def main(argv):
  output = Path(OUTPUT.value)
  records = files.read_jsonl(output) if output.exists() else []
  have = [{name: record[name] for name in (*GRID, 'steps')} for record in records]
  settings = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
  settings = [{**setting, 'steps': STEPS[setting['task']]} for setting in settings]
  for setting in settings:
    if setting not in have:
      record = {**setting, **train(**setting)}
      files.append_jsonl(output, record)
      print(record, flush=True)


if __name__ == '__main__':
  app.run(main)
