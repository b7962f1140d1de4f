"""Records of runs that never were, by the schema: for the tests of reports."""

import json
import random
from pathlib import Path

# arm: (quality, trained parameters, milliseconds of one example of 128 tokens)
ARMS = {
  'full': (0.86, 22_700_000, 9.0),
  'lora': (0.855, 74_000, 10.0),
  'bitfit': (0.83, 27_000, 9.0),
  'head': (0.76, 770, 9.0),
  'pruned + int8': (0.82, 11_000_000, 3.0),
  'houlsby': (0.85, 600_000, 12.0),
}


def record(arm='full', seed=0, value=0.8, validation=None, task='sst2', **changes) -> dict:
  """One record; `value` is its score on the report half, `changes` replace whole keys."""
  _, trained, ms = ARMS.get(arm, (0.8, 100_000, 8.0))
  whole = 23_000_000 if 'int8' in arm else 90_850_000
  made = {
    'schema': 1,
    'study': 'trial',
    'run': '',
    'arm': arm,
    'overrides': {'seed': seed},
    'seed': seed,
    'task': task,
    'metric': 'accuracy',
    'higher_is_better': True,
    'status': 'ok',
    'error': None,
    'config': {'seed': seed, 'task': {'name': task, 'fraction': 1.0}, 'optim': {'lr': 0.001}},
    'config_hash': f'{arm}-{task}-{seed}',
    'data': {'sha256': task, 'examples': {'train': 1000, 'validation': 436, 'report': 436}},
    'model': {'name': 'all-MiniLM-L6-v2', 'sha256': 'abc'},
    'versions': {'jax': '0.10.2'},
    'device': {'cpu': 'Some CPU', 'cores': 2, 'devices': '1 x cpu', 'versions': {'jax': '0.10.2'}},
    'metrics': {
      'validation': {'accuracy': value if validation is None else validation, 'loss': 0.4},
      'report': {'accuracy': value, 'loss': 0.4},
      'test': {'accuracy': value - 0.01, 'loss': 0.5},
    },
    'parameters': {'trained': trained, 'stored': trained, 'head': 770, 'total': 22_713_601},
    'flops': {'step': 1.2e9, 'example': 3.4e8},
    'memory_mb': {'step': 300.0 + trained / 1e5, 'inference': 120.0, 'peak': 890.1},
    'train': {'steps': 400, 'seconds': 30.0 + trained / 1e6, 'step_ms': 72.6},
    'latency': [
      latency(1, 32, 0.4 * ms), latency(1, 128, ms), latency(8, 128, 6.0 * ms),
      latency(1, 128, 0.5 * ms, 'int4' if 'int8' in arm else 'int8'),
    ],
    'bytes': {'bundle': 4 * trained, 'whole': whole},
    'time': '2026-11-22T07:30:00Z',
  }  # fmt: skip
  if 'int8' in arm:
    made['config']['model'] = {'quantize': 'int8'}
    made['latency'] = [{**row, 'precision': 'int8'} for row in made['latency'][:3]]
  return made | changes


def latency(batch: int, length: int, ms: float, precision: str = 'f32') -> dict:
  return {
    'batch': batch, 'length': length, 'precision': precision, 'p50_ms': ms, 'p95_ms': 1.1 * ms,
    'p99_ms': 1.3 * ms, 'examples_per_second': 1000 * batch / ms, 'compile_seconds': 2.0,
  }  # fmt: skip


def failure(arm='full', seed=0, status='failed', error='out of memory', **changes) -> dict:
  """A record of a run that has no result, and so not even a metric."""
  kept = ('schema', 'study', 'run', 'arm', 'overrides', 'seed', 'task', 'config', 'config_hash')
  whole = record(arm, seed)
  return {key: whole[key] for key in kept} | {'status': status, 'error': error} | changes


def study(
  arms=tuple(ARMS), tasks=('sst2', 'mrpc'), seeds=range(5), rates=(1e-3, 3e-4), fractions=(1.0,)
) -> list[dict]:
  """Every arm with every rate and seed; the lower rate is a little worse."""
  made = []
  for task in tasks:
    for fraction in fractions:
      for arm in arms:
        for rate in rates:
          for seed in seeds:
            draw = random.Random(f'{task} {fraction} {arm} {rate} {seed}')
            quality = ARMS[arm][0] - 0.05 * (task != 'sst2') - 0.12 * (1 - fraction)
            quality -= 0.01 * (rate < 1e-3)
            value, other = (round(draw.gauss(quality, 0.006), 4) for _ in range(2))
            config = {
              'seed': seed, 'task': {'name': task, 'fraction': fraction}, 'optim': {'lr': rate},
              **({'model': {'quantize': 'int8'}} if 'int8' in arm else {}),
            }  # fmt: skip
            overrides = {'optim.lr': rate, 'seed': seed}
            if fraction < 1:
              overrides['task.fraction'] = fraction
            made.append(
              record(
                arm, seed, value, other, task, config=config, overrides=overrides,
                config_hash=f'{task}-{fraction}-{arm}-{rate}-{seed}',
              )
            )  # fmt: skip
  return made


def write(folder: Path, made: list[dict]) -> Path:
  """folder/records.jsonl, its folder made too."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / 'records.jsonl'
  path.write_text(''.join(json.dumps(line) + '\n' for line in made), encoding='utf-8')
  return path
