"""Every method of efft on two tasks of short texts, one budget for all, three seeds.

    python experiments/methods/run.py --data=FOLDER [--shard=0/2] [--tasks=stsb] [--configs=lora]

FOLDER holds stsb/ and cola/, each with train.parquet and validation.parquet. Half of the validation
split chooses learning rates (`task.halves`): for each family, one config tries its own rate times
1/3, 1 and 3 with seed 0, goes on by threes while the best is at an end, and what is best there all
configs of the family take (the head alone searches for itself). A config that ends no better than
the head alone (on cola: below it), or far below the one that searched, searches for itself, in the
same way and on the same half. One whose seeds end far apart tries a third of its rate, and one that
is still below the head alone gives its head the rate that the head alone has; of what has been
tried with all seeds the best mean counts. The other half is reported. What records.jsonl has is not
made again, so the command may be stopped and started at will; several at once share the work by
--shard (on a CPU: one for each core, each under `taskset -c`). `table.py` makes the table.

Seeds and rates of a config train in one population (`efft.population`) where it can be in one; so
nothing is said here of the speed and memory of a run that is alone: cost.py measures those.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from efft import environment

environment.settle()

from absl import app, flags  # noqa: E402
from chosen import HEAD, NOISE, SEEDS, TASKS, mean, rates, score  # noqa: E402

from efft import catalogue, files, finetune, population  # noqa: E402
from efft import config as configs  # noqa: E402

HERE = Path(__file__).parent
DATA = flags.DEFINE_string('data', os.environ.get('EFFT_DATA'), 'folder of the two tasks')
MODEL = flags.DEFINE_string('model', 'all-MiniLM-L6-v2', 'encoder')
OUTPUT = flags.DEFINE_string('output', str(HERE / 'records.jsonl'), 'where records go')
SHARD = flags.DEFINE_string('shard', '0/1', 'this process makes every n-th config, from the i-th')
ONLY = flags.DEFINE_list('tasks', list(TASKS), 'of BUDGETS')
CONFIGS = flags.DEFINE_list('configs', [], 'only these')
ONE = flags.DEFINE_string(
  'one', None, 'internal: [task, config, [[seed, factor, rate of the head], ...]] as JSON'
)


class Budget(NamedTuple):
  metric: str
  steps: int
  batch: int
  max_length: int
  dtype: str
  group_by_length: bool


# What costs time on a CPU is tokens, and what a short run lacks is steps: hence the small batches
# of stsb. On cola no method leaves the majority class before step 400, whatever the batch: its
# sentences are short, and bfloat16 and batches of equal lengths make 800 steps of 16 bearable.
BUDGETS = {
  'stsb': Budget('pearson', 300, 4, 48, 'float32', False),
  'cola': Budget('matthews', 800, 16, 20, 'bfloat16', True),
}
FACTORS = (1 / 3, 1.0, 3.0)
# A mean that is not this far above the head's, or is this far below that of the config that
# searched, makes a config search for itself. On cola, where a search costs three times as much and
# a half of the split tells less, only what is below the head does.
ABOVE = {'stsb': NOISE, 'cola': -NOISE}
BEHIND = {'stsb': 0.1, 'cola': 1.0}
APART = 0.2  # the best and the worst seed further apart than this: the rate may be too high
MOST = 27.0  # the search goes no further than this from a config's own rate
# Not a way to train less: other studies have them.
ASIDE = ('pruning', 'quantisation')
# What a config says for BERT-base and six layers do not have.
OPTIONS = {
  'adapterdrop': {'method.pfeiffer.at': r'layer_[2-5]/mlp_out'},
}
# The config that searches for each family (`efft.catalogue`); others take the rate of 'low rank'.
SEARCH = {
  'adapters': 'pfeiffer',
  'prompts': 'prompt',
  'representations': 'loreft',
  'scaling': 'ia3',
  'low rank': 'lora',
  'spectral': 'fourierft',
  'orthogonal': 'oft',
  'shared pieces': 'miss',
  'masks': 'fish',
  'hybrids': 's4',
  'side network': 'ladder',
  'rules': 'bitfit',
}


def names() -> dict[str, str]:
  """{config: its family} of all that take part."""
  return {
    name: entry['family']
    for name, entry in files.read_json(catalogue.FILE).items()
    if entry['family'] not in ASIDE and name != 'distil'
  }


def settings(task: str, name: str, seed: int, factor: float, head: float | None = None):
  """The config of one run: everything as the file says but the budget and the rates."""
  budget = BUDGETS[task]
  config = configs.load(f'configs/{name}.py:task={task}')
  for field, value in OPTIONS.get(name, {}).items():
    section, method, option = field.split('.')
    config[section][method][option] = value
  config.seed, config.task.path, config.task.halves = seed, str(Path(DATA.value) / task), True
  config.model.name, config.model.max_length = MODEL.value, budget.max_length
  config.model.dtype = budget.dtype
  config.train.batch_size, config.train.steps = budget.batch, budget.steps
  config.train.group_by_length = budget.group_by_length
  # Evaluated once, at the end, and so not chosen by it.
  config.train.eval_steps, config.train.save = budget.steps, 'last'
  config.optim.lr *= factor
  for fields in config.optim.groups.values():
    if fields.lr is not None:
      fields.lr *= factor
  if head is not None:
    config.optim.groups['head'] = {'lr': head}
  return config


def key(task: str, name: str, seed: int, factor: float, head: float | None = None) -> dict:
  """What makes a record another one."""
  own = {'task': task, 'config': name, 'seed': seed, 'factor': factor}
  return own | ({} if head is None else {'head_lr': head}) | BUDGETS[task]._asdict()


def one(task: str, name: str, runs: list, settings=settings) -> None:
  """Trains a config with several runs in this process, and appends their records."""
  given = [settings(task, name, *run) for run in runs]
  with tempfile.TemporaryDirectory() as scratch:
    workdirs = [Path(scratch) / str(i) for i in range(len(runs))]
    if len(runs) > 1 and population.common(given[0]) is not None:
      found = population.train(given, workdirs)
    else:
      found = [finetune.train(*pair) for pair in zip(given, workdirs, strict=True)]
  metric = BUDGETS[task].metric
  for run, config, results in zip(runs, given, found, strict=True):
    record = {**key(task, name, *run), 'lr': config.optim.lr}
    if 'diverged' in results:
      record |= {'chosen': None, 'reported': None, 'error': f'diverged at {results["diverged"]}'}
    else:
      for half, part in (('chosen', results['metrics']), ('reported', results['report'])):
        record |= {half: part[metric], f'{half}_loss': part['loss']}
      record |= {'trainable': results['trainable'], 'bundle_mb': results['bundle_mb']}
    files.append_jsonl(Path(OUTPUT.value), record)
    print(record, flush=True)


def search(records: list[dict], task: str, name: str) -> tuple[list[float], float | None]:
  """(the factors to try next; the best one, None before the end).

  The lower loss decides between equal scores: a Matthews correlation is 0 for whoever predicts one
  class.
  """
  found = {
    r['factor']: (-math.inf, -math.inf) if r['chosen'] is None else (r['chosen'], -r['chosen_loss'])
    for r in records
    if (r['seed'], r['task'], r['config'], r.get('head_lr')) == (0, task, name, None)
  }
  if missing := [factor for factor in FACTORS if factor not in found]:
    return missing, None
  best = max(found, key=found.get)
  for end, factor in ((max(found), best * 3), (min(found), best / 3)):
    if best == end and 0.999 / MOST <= factor <= MOST * 1.001:
      return [factor], None
  return [], best


def main(argv):
  del argv
  if ONE.value:
    one(*json.loads(ONE.value))
    return
  output = Path(OUTPUT.value)
  index, count = map(int, SHARD.value.split('/'))
  families = names()
  chosen = CONFIGS.value or list(families)

  def records(task):
    every = files.read_jsonl(output) if output.exists() else []
    return [r for r in every if {'task': task, **BUDGETS[task]._asdict()}.items() <= r.items()]

  def missing(task, name):
    """The runs to make next; None while another config is still searching for this one."""
    known = records(task)
    cells = rates(known)
    tried = cells.get((name, task), {})
    searcher = HEAD if name == HEAD else SEARCH.get(families[name], SEARCH['low rank'])

    def lacking(factor, head=None):
      return [(s, factor, head) for s in SEEDS if s not in tried.get((factor, head), {})]

    def whole(name, factor):
      return mean(cells.get((name, task), {}).get((factor, None), {})) is not None

    def best_mean(name):
      return max(found for found in map(mean, cells[name, task].values()) if found is not None)

    factors, best = search(known, task, searcher)
    if name == searcher and factors:
      return [(0, factor, None) for factor in factors]
    if best is None:
      return None
    if runs := lacking(best):
      return runs
    rate = search(known, task, HEAD)[1]
    if not whole(HEAD, rate) or not whole(searcher, best):
      return None
    head, first = best_mean(HEAD), best_mean(searcher)
    if name != searcher and best_mean(name) < max(head + ABOVE[task], first - BEHIND[task]):
      factors, best = search(known, task, name)
      if runs := [(0, factor, None) for factor in factors] or lacking(best):
        return runs
    reached = [score(r) for r in tried[best, None].values()]
    if max(reached) - min(reached) > APART and (runs := lacking(best / 3)):
      return runs
    if name != HEAD and best_mean(name) < head - NOISE:
      return lacking(best, rate * configs.load(f'configs/{HEAD}.py').optim.lr)
    return []

  def make(task, name, runs):
    # In a process of its own: memory and crashes stay in it.
    again = [f'--{f.name}={f.value}' for f in (DATA, MODEL, OUTPUT) if f.value is not None]
    command = [sys.executable, __file__, *again, f'--one={json.dumps([task, name, runs])}']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    known = records(task)
    error = ' '.join(done.stderr.strip().splitlines()[-1:])[:500]
    for run in runs:
      own = key(task, name, *run)
      rate = own.get('head_lr')
      if not any(own.items() <= r.items() and r.get('head_lr') == rate for r in known):
        failed = {'chosen': None, 'reported': None, 'error': error}
        files.append_jsonl(output, own | failed)
        print(name, error, flush=True)

  # Those that search go first: the others wait for them.
  order = sorted(chosen, key=lambda name: (name != HEAD, name not in SEARCH.values()))
  work = list(itertools.product(ONLY.value, order))[index::count]
  while work:
    rest = []
    for task, name in work:
      while runs := missing(task, name):
        make(task, name, runs)
      if runs is None:
        rest.append((task, name))
    if len(rest) == len(work):
      time.sleep(10)
    work = rest


if __name__ == '__main__':
  app.run(main)
