"""Runs per hour of populations against the same runs one by one, through `efft sweep`.

    taskset -c 0 python experiments/population/throughput.py [--members=8] [--rounds=3]

LoRA on rotten_tomatoes, seeds alone differ; short runs, as a search makes them. Both ways in turn,
each time in a new folder. Programs that have been compiled are kept between runs, as a sweep does;
--cold forgets them before every sweep. One JSON line a sweep goes to throughput.jsonl.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from efft import environment, files

HERE = Path(__file__).parent
MEMBERS = flags.DEFINE_integer('members', 8, 'runs of a sweep')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'sweeps of each kind')
STEPS = flags.DEFINE_list('steps', ['50', '200'], 'of a run')
BATCH = flags.DEFINE_list('batch', ['4', '16'], 'examples a step')
COLD = flags.DEFINE_bool('cold', False, 'compile everything anew in every sweep')
STUDY = """
from efft.sweep import Run, product, seeds
POPULATIONS = {together}
FIELDS = {{
  'task.fraction': 0.2, 'train.batch_size': {batch}, 'train.steps': {steps},
  'train.eval_steps': {steps}, 'train.save': 'last', 'model.max_length': 32,
}}

def runs():
  for overrides in product([FIELDS], seeds({members})):
    yield Run('lora', 'configs/lora.py:task=rotten_tomatoes', overrides)
"""


def sweep(together: bool, steps: int, batch: int, folder: Path, programs: Path) -> float:
  """Seconds of one sweep, from its start to its last record."""
  study = folder / f'together_{together}.py'.lower()
  study.write_text(STUDY.format(together=together, steps=steps, batch=batch, members=MEMBERS.value))
  command = [sys.executable, '-m', 'efft', 'sweep', f'--study={study}', f'--workdir={folder}/out']
  own = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'programs' if COLD.value else programs)}
  begin = time.monotonic()
  done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
  took = time.monotonic() - begin
  records = files.read_jsonl(folder / 'out' / 'records.jsonl')
  if done.returncode or len(records) != MEMBERS.value:
    raise SystemExit(done.stderr)
  return took


def main(argv):
  del argv
  with tempfile.TemporaryDirectory() as programs:
    for _ in range(ROUNDS.value):
      for steps in map(int, STEPS.value):
        for batch in map(int, BATCH.value):
          for together in (True, False):
            with tempfile.TemporaryDirectory() as folder:
              took = sweep(together, steps, batch, Path(folder), Path(programs))
            record = {
              'together': together, 'members': MEMBERS.value, 'steps': steps, 'batch': batch,
              'cold': COLD.value, 'seconds': round(took, 1),
              'runs_per_hour': round(3600 * MEMBERS.value / took, 1),
              'cores': len(os.sched_getaffinity(0)), 'cpu': environment.describe()['cpu'],
              'versions': environment.versions(),
            }  # fmt: skip
            files.append_jsonl(HERE / 'throughput.jsonl', record)
            print(json.dumps(record), flush=True)


if __name__ == '__main__':
  app.run(main)
