"""The studies' pages, from made-up records in which we know who wins."""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from efft import sweep

ROOT = Path(__file__).parent.parent / 'experiments'


def study_module(name):
  spec = importlib.util.spec_from_file_location(name, ROOT / name / 'study.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def record(run: sweep.Run, score: float, costs: dict, tested: bool = False) -> dict:
  """What `efft sweep` writes, with `score` on all splits but the one that must not be shown.

  `tested`: that is not the test split, but the half of validation, of tasks that have both.
  """
  task = run.config.partition('task=')[2]
  cost = {'trained': 1000, 'stored': 1000, 'head': 100, 'memory': 50.0, 'step': 10.0} | costs
  cost = {'slow': 4.0, 'whole': 80e6, 'inference': 20.0} | cost
  overrides = dict(run.overrides)
  shown, hidden = {'accuracy': score}, {'accuracy': 0.0}
  held = {'report': shown, 'test': hidden}
  if tested:
    held = {'report': shown} if task == 'cola' else {'report': hidden, 'test': shown}
  return {
    'schema': 1, 'study': 'study', 'run': None, 'arm': run.arm, 'overrides': overrides,
    'seed': overrides['seed'], 'task': task, 'metric': 'accuracy', 'higher_is_better': True,
    'status': 'ok', 'error': None,
    'config': {'task': {'name': task, 'fraction': overrides.get('task.fraction', 1.0)}},
    'config_hash': json.dumps(overrides, sort_keys=True),
    'metrics': {'validation': {'accuracy': score + overrides.get('optim.lr', 0)}, **held},
    'parameters': {**{n: cost[n] for n in ('trained', 'stored', 'head')}, 'total': 10**6},
    'flops': {'step': 1.0, 'example': 1.0},
    'memory_mb': {'step': cost['memory'], 'inference': cost['inference'], 'peak': 100.0},
    'train': {'seconds': 5.0, 'step_ms': cost['step']},
    'latency': [
      {'batch': b, 'length': 64, 'precision': 'f32', 'p50_ms': b * cost['slow']} for b in (1, 32)
    ],
    'bytes': {'bundle': 1000, 'whole': cost['whole']},
  }  # fmt: skip


def page(tmp_path, name, records) -> str:
  """README.md of a study with these records."""
  folder = tmp_path / name
  folder.mkdir()
  for file in ('study.py', 'findings.py'):
    shutil.copy(ROOT / name / file, folder)
  return made(folder, 'findings.py', records)


def made(folder: Path, script: str, records: list[dict]) -> str:
  """README.md as the script in the folder writes it of these records, twice the same."""
  (folder / 'records.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
  pages = []
  for _ in range(2):
    environment = os.environ | {'PYTHONPATH': str(ROOT.parent)}
    command = [sys.executable, str(folder / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages.append((folder / 'README.md').read_bytes())
  assert pages[0] == pages[1]
  return pages[0].decode()


def verdict(text: str, claim: str) -> str:
  plain = text.replace('\\', '')  # Markdown's escapes
  (line,) = re.findall(rf'^\| {claim}.*\| ([a-z ]+) \|$', plain, re.M)
  return line


def test_xu2023(tmp_path):
  module = study_module('xu2023')
  best = {'ProPELT_Adapter': 0.9, 'Prompt-tuning': 0.3, 'BitFit': 0.7}
  costs = {'FT': {'memory': 90.0}, 'Adapter^S': {'memory': 70.0}, 'LoRA': {'memory': 60.0}}
  runs = list(module.runs())
  records = [
    record(
      run, best.get(run.arm, 0.8) + 0.001 * run.overrides['seed'], costs.get(run.arm, {}), True
    )
    for run in runs
  ]  # fmt: skip
  assert len(records) == ((9 + 4 * 2) * 3 + (10 + 3 * 2)) * 3
  # A row that learns nothing on one task.
  for each in records:
    if (each['arm'], each['task']) == ('(IA)^3', 'mrpc'):
      each['metrics'] = dict.fromkeys(each['metrics'], {'accuracy': 0.7})
    # The best but for cola.
    if each['arm'] == 'MAM':
      score = 0.95 if each['task'] != 'cola' else 0.0
      each['metrics'] = dict.fromkeys(each['metrics'], {'accuracy': score})
  text, _, without = page(tmp_path, 'xu2023', records).partition('### Without cola')
  assert verdict(without, 'ProPELT_Adapter is better') == 'agrees' and 'memory' not in without
  assert verdict(text, 'ProPELT_Adapter is better') == 'agrees'
  assert verdict(text, 'ProPELT_Adapter has the best') == 'agrees'
  assert verdict(without, 'ProPELT_Adapter has the best .*against MAM') == 'disagrees'
  assert verdict(text, 'Prompt tuning is far behind .* 5 points') == 'agrees'
  assert verdict(text, 'BitFit is better') == 'disagrees'
  assert verdict(text, 'LoRA is level') == 'agrees'
  assert verdict(text, 'Child-Tuning_D is better') == 'cannot be told'
  assert verdict(text, 'LoRA needs less memory') == 'agrees'
  assert verdict(text, 'Sequential adapters need more') == 'agrees'
  (row,) = re.findall(r'^\| BitFit \| (.*) \|$', text, re.M)
  cells = row.split(' | ')
  assert cells[:5] == ['70.1 ± 0.1'] * 4 + ['70.1']
  assert cells[5:] == ['1,000', '1,000', '1,000', '100', '50']
  (row,) = re.findall(r'^\| Adapter\^S \| (.*) \|$', text, re.M)
  assert row.split(' | ')[5:7] == ['900', '1,000']
  (row,) = re.findall(r'^\| \(IA\)\^3 \| (.*) \|$', text, re.M)
  assert row.split(' | ')[:5] == ['80.1 ± 0.1', '80.1 ± 0.1', '70.0 ± 0.0°', '80.1 ± 0.1', '77.6']


def test_doering2024(tmp_path):
  module = study_module('doering2024')

  def score(run):
    method, seed = run.arm.partition(',')[0], run.overrides['seed']
    share = run.overrides['task.fraction']
    if method == 'bitfit':
      return 0.8 + 0.05 * (0.3 <= share <= 0.7) + 0.001 * seed
    return 0.8 + {'full': 0.01, 'pfeiffer': 0.02}[method] * (seed - 2)

  records = [record(run, score(run), {}, True) for run in module.runs()]
  # Nothing is learnt in half a minute of cola.
  for each in records:
    if (each['arm'], each['task']) == ('bitfit, 30 s', 'cola'):
      each['metrics'] = dict.fromkeys(each['metrics'], {'accuracy': 0.0})
  text = page(tmp_path, 'doering2024', records)
  assert verdict(text, 'BitFit is better') == 'agrees'
  assert verdict(text, 'BitFit is stable') == 'agrees'
  assert verdict(text, 'Adapters vary more') == 'agrees'
  assert verdict(text, 'BitFit keeps up .* amounts') == 'agrees'
  assert verdict(text, 'BitFit keeps up .* budgets') == 'disagrees'
  assert '| 30 s: -80.' in text
  assert verdict(text, 'Adapters bring no') == 'agrees'
  (row,) = re.findall(r'^\| 30 s \| (.*) \|$', text, re.M)
  assert row.startswith('0.0 ± 0.0 (0.0)° | 80.0 ± 3.2')
  (row,) = re.findall(r'^\| 30% \| (.*) \|$', text.partition('| mrpc |')[0], re.M)
  assert row.split(' | ') == ['85.2 ± 0.2 (85.0)', '80.0 ± 3.2 (76.0)', '80.0 ± 1.6 (78.0)']
  # One amount at which it does not keep up is enough, whatever the others are.
  for each in records:
    if (each['arm'], each['overrides']['task.fraction']) == ('bitfit', 0.1):
      each['metrics'] = dict.fromkeys(each['metrics'], {'accuracy': 0.7})
  (tmp_path / 'again').mkdir()
  text = page(tmp_path / 'again', 'doering2024', records)
  assert verdict(text, 'BitFit keeps up .* amounts') == 'disagrees' and '| 10%: -10.' in text


def test_thomas2025(tmp_path):
  module = study_module('thomas2025')
  costs = {
    'full': {'step': 20.0, 'trained': 10**6},
    'lora': {'memory': 20.0},
    'layers': {'slow': 2.0, 'whole': 40e6},
    'int8': {'slow': 5.0, 'whole': 25e6},
    'layers + int8 + lora': {'slow': 1.5, 'whole': 15e6, 'inference': 5.0},
  }
  scores = {'full': 0.85, 'layers + int8 + lora': 0.7}
  records = [
    record(run, scores.get(run.arm, 0.84) + 0.001 * run.overrides['seed'], costs.get(run.arm, {}))
    for run in module.runs()
  ]
  text = page(tmp_path, 'thomas2025', records)
  assert verdict(text, 'LoRA: a training step') == 'agrees'
  assert verdict(text, 'LoRA: and less memory') == 'agrees'
  assert verdict(text, 'LoRA: at the same score') == 'agrees'
  assert verdict(text, 'int8: inference takes') == 'disagrees'
  assert verdict(text, 'int8: the model is smaller') == 'agrees'
  assert verdict(text, 'All at once: at the same') == 'disagrees'
  assert verdict(text, 'All at once is faster than layers') == 'agrees'
  (line,) = re.findall(r'^\| sst2 \| `--max_latency_ms=64.0[^|]*` \| (.*) \|$', text, re.M)
  assert line.startswith('layers | 84.1 (')
  assert '| full | 1,000,000 | 20 | 50 | 5 | 4.00 | 128.0 | 20.0 | 80.0 |' in text


def test_lora_int8(tmp_path):
  module = study_module('lora_int8')
  scores = {'float': 0.8, 'int8': 0.801, 'int8, gradients rounded at random': 0.79}

  def made(run):
    found = record(run, scores[run.arm] + 0.0001 * run.overrides['seed'], {})
    found['metrics']['validation']['accuracy'] = found['metrics']['report']['accuracy'] + 0.02
    found['metrics']['test']['accuracy'] = 0.5
    if run.config.endswith('cola'):
      del found['metrics']['test']
    return found

  text = page(tmp_path, 'lora_int8', [made(run) for run in module.runs()])
  for split in ('validation', 'test'):
    assert verdict(text, f'int8, all tasks, {split}') == 'agrees'
  random = 'int8, gradients rounded at random'
  assert verdict(text, f'{random}, r8, validation') == 'disagrees'
  assert verdict(text, f'{random}, r8, test') == 'agrees'
  assert 'cola, test' not in text
  assert '| cola | int8 | 81.12 ± 0.02 | - | 10.0 | 50.0 | 80.0 | 5 |' in text


def test_quantization(tmp_path):
  scores = {'base': 0.9, 'w8a8 simulated': 0.8, 'peg simulated': 0.9, 'int4 gptq': 0.85}
  folder = tmp_path / 'quantization'
  folder.mkdir()
  shutil.copy(ROOT / 'quantization' / 'table.py', folder)
  records = [
    {
      'task': task, 'seed': seed, 'steps': 300, 'variant': name, 'whole_mb': 20.0, 'disk_mb': 30.0,
      'metrics': {metric: score + 0.001 * seed}, 'flips': 0.1 if task == 'sst2' else 0.9,
      'off': 0.05 if name == 'int4 gptq' else None,
    }
    for name, score in scores.items()
    for task, metric in (('sst2', 'accuracy'), ('stsb', 'pearson'))
    for seed in range(3)
  ]  # fmt: skip
  failed = {'task': 'sst2', 'seed': 0, 'steps': 300, 'variant': 'lsq', 'error': 'no room'}
  text = made(folder, 'table.py', [*records, failed])
  assert verdict(text, 'Activations of 8 bits') == 'agrees'
  assert verdict(text, 'Groups of embedding') == 'agrees'
  assert verdict(text, 'With groups it is level') == 'agrees'
  assert verdict(text, 'GPTQ') == 'cannot be told'
  (row,) = re.findall(r'^\| int4 gptq \| [^|]* \| (.*) \|$', text, re.M)
  cells = ['85.1 ± 0.1', '85.1 ± 0.1', '10.0 ± 0.0', '5.00%', '20.0', '30.0', '6']
  assert row.split(' | ') == cells
  assert 'lsq on sst2, seed 0: no room' in text


def test_pruning(tmp_path):
  folder = tmp_path / 'pruning'
  folder.mkdir()
  shutil.copy(ROOT / 'pruning' / 'table.py', folder)
  fast, slow = 'layers_top-3+distil', 'units-0.5'
  score = {  # chain: (steps after the base, validation, test, speed-up)
    'base': (0, 0.9, 0.7, 1.0),
    'none': (150, 0.9, 0.8, 1.0),
    'none ': (450, 0.9, 0.6, 1.0),
    'none  ': (600, 0.9, 0.6, 1.0),
    fast: (150, 0.891, 0.796, 2.1),
    slow: (150, 0.899, 0.9, 1.5),
    'block-5': (450, 0.8, 0.3, 1.9),
    'layers_top-3': (150, 0.88, 0.7, 2.1),
    'heads-0.5': (150, 0.87, 0.85, 2.5),
    'block-5+distil': (600, 0.8, 0.6, 1.9),
    'units-0.9': (300, 0.9, 0.9, 3.0),
  }
  records = [
    {
      'task': 'r8', 'seed': seed, 'steps': 300, 'chain': chain.strip(),
      'stage': 's2_tune' if steps == 450 else 's9_tune', 'steps_after': steps,
      'validation': validation, 'test': test + 0.001 * seed, 'speedup_32': speedup,
      'speedup_1': 0.9 * speedup, 'predicted_32': 1.1 * speedup, 'parameters': 10**7,
      'kernels_nonzero': 2 * 10**6 if chain == slow else 8 * 10**6,
    }
    for chain, (steps, validation, test, speedup) in score.items()
    for seed in range(3)
  ]  # fmt: skip
  curve = {'task': 'r8', 'seed': 0, 'steps': 300, 'chain': 'curve', 'structure': 'heads'}
  curve['predicted_32'] = 1.2
  records += [
    {**curve, 'score': 'michel', 'share': share, 'validation': 1 - share} for share in (0.25, 0.5)
  ]
  others = {'task': 'r8', 'seed': 0, 'steps': 20, 'chain': 'base', 'test': 0.1}
  lost = {'task': 'r8', 'seed': 1, 'steps': 300}
  records = [*records, others, {**lost, 'chain': 'curve', 'error': 'no room'}]
  records.append({**lost, 'chain': fast, 'error': 'made again since'})
  random.Random(0).shuffle(records)  # as several shards leave them
  text = made(folder, 'table.py', records)
  # The one that validation chooses among the fast ones, whatever test says of the others.
  assert (
    f'- r8: `{fast}` (s9_tune), 99.5 ± 0.0 % (95 % interval of the mean 99.5 to 99.5) at ' in text
  )
  assert 'at 2.10 ± 0.00 times the speed: reached.' in text
  assert verdict(text, 'layers_top: a teacher') == 'agrees'
  assert '+9.6 points (+9.6 to +9.6, n = 3)' in text
  assert 'units: a teacher' not in text
  assert (
    '| r8 | units-0.5 | s9_tune | 150 | 1.50 ± 0.00 | 1.35 ± 0.00 | 1.65 ± 0.00 | 90.1 ± 0.1 '
    '| 112.5 ± 0.0 | 25 ± 0 | 3 |' in text
  )
  assert 'units-0.9' not in text, 'nothing unpruned trained as long'
  (row,) = re.findall(r'^\| r8 \| block-5\+distil \|.*', text, re.M)
  assert row.split(' | ')[8] == '100.0 ± 0.0' and 'block: a teacher' not in text
  assert '| r8 | heads | michel | 75.0 (25%, 1.20), 50.0 (50%, 1.20) |' in text
  assert 'curve on r8, seed 1: no room' in text and 'made again since' not in text
  for name in ('speedup', 'scores'):
    assert (folder / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
