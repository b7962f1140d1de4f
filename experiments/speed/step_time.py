"""Times one training step on random weights; prints one JSON line.

    python experiments/speed/step_time.py --method=lora --precision=bf16 --size=base

Warm-up steps come first: they compile, and the heap grows to its final size.
"""

import json
import resource
import time

import numpy as np
from absl import app, flags

from efft import cpu

cpu.keep_heap()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from sizes import SIZES, encoder  # noqa: E402

from efft import config as configs  # noqa: E402
from efft import quantize, tree  # noqa: E402
from efft.models.encoder import Encoder, init_params  # noqa: E402
from efft.models.layers import Hooks  # noqa: E402
from efft.peft import base as peft  # noqa: E402
from efft.training import losses, optim, step  # noqa: E402

METHOD = flags.DEFINE_string('method', 'lora', 'a file of configs/')
PRECISION = flags.DEFINE_enum('precision', 'bf16', ['f32', 'bf16'], 'of the computation')
SIZE = flags.DEFINE_enum('size', 'base', list(SIZES), 'of the encoder')
BATCH = flags.DEFINE_integer('batch', 16, 'rows')
LENGTH = flags.DEFINE_integer('length', 128, 'tokens')
STEPS = flags.DEFINE_integer('steps', 6, 'timed steps')
WARMUP = flags.DEFINE_integer('warmup', 5, 'steps before')
QUANTIZE = flags.DEFINE_string('quantize', '', 'config.model.quantize: int8, nf4, ...')
REMAT = flags.DEFINE_bool('remat', False, 'recompute layers in the backward pass')


def main(argv):
  cfg = encoder(SIZE.value)
  config = configs.resolve(configs.load(f'configs/{METHOD.value}.py:task=sst2'))
  dtype = {'f32': jnp.float32, 'bf16': jnp.bfloat16}[PRECISION.value]
  deltas = peft.build(config['method'])
  model = Encoder(cfg, Hooks(tap=peft.attach(deltas)), dtype, REMAT.value)
  params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
  forms = QUANTIZE.value or config['model']['quantize']
  params = quantize.quantized({'params': params}, forms)['params']
  variables = {'params': params, 'delta': peft.init(model, deltas, params, jax.random.key(1))}
  variables = {name: value for name, value in variables.items() if value}
  groups = tree.labels(variables, config['rules'])
  trained = {path: group for path, group in groups.items() if group != 'frozen'}
  trainable, frozen = tree.split(variables, trained.__contains__)
  frozen = step.cast_frozen(frozen, dtype)
  del params, variables
  optimizer = optim.optimizer(config['optim'], trained, 1000)
  state = step.init_state(trainable, optimizer, seed=0)
  run = step.make_step(step.forward(model), losses.single(), optimizer)
  rng = np.random.default_rng(0)
  shape = BATCH.value, LENGTH.value
  batch = {
    'input_ids': rng.integers(0, 30000, shape, dtype=np.int32),
    'mask': np.ones(shape, bool),
    'token_types': np.zeros(shape, np.int32),
    'labels': rng.integers(0, 2, BATCH.value, dtype=np.int32),
    'weights': np.ones(BATCH.value, np.float32),
  }
  batch = jax.device_put(batch)
  begin = time.perf_counter()
  times = []
  for i in range(WARMUP.value + STEPS.value):
    before = time.perf_counter()
    state, metrics = run(state, frozen, batch)
    jax.block_until_ready(state)
    times.append(time.perf_counter() - before)
    if i == 0:
      compiled = time.perf_counter() - begin
  ms = float(np.median(times[WARMUP.value :])) * 1e3
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get('peak_bytes_in_use', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
  print(
    json.dumps(
      {
        'method': METHOD.value,
        'precision': PRECISION.value,
        'quantize': QUANTIZE.value,
        'size': SIZE.value,
        'batch': BATCH.value,
        'length': LENGTH.value,
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'trainable': tree.count(state.trainable),
        'first_step_s': round(compiled, 1),
        'ms_per_step': round(ms, 1),
        'examples_per_s': round(BATCH.value / ms * 1e3, 2),
        'peak_gb': round(peak / 1e9, 3),
        'loss': float(metrics['loss']),
      }
    )
  )


if __name__ == '__main__':
  app.run(main)
