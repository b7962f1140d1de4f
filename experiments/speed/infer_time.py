"""Times a forward pass on random weights; prints one JSON line.

    python experiments/speed/infer_time.py --quantize=int8 --precision=f32 --size=base

Static ranges are made up here (their values do not change the time), where a run calibrates them.
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

from efft import qtensor, quantize, tree  # noqa: E402
from efft.models.encoder import Encoder, init_params  # noqa: E402
from efft.training import step  # noqa: E402

FORMS = ['', 'int8', 'int8_static', 'int8_weight', 'int4', 'nf4']
FORM = flags.DEFINE_enum('quantize', '', FORMS, 'format of the encoder')
PRECISION = flags.DEFINE_enum('precision', 'f32', ['f32', 'bf16'], 'of all else')
SIZE = flags.DEFINE_enum('size', 'base', list(SIZES), 'of the encoder')
BATCH = flags.DEFINE_integer('batch', 16, 'rows')
LENGTH = flags.DEFINE_integer('length', 128, 'tokens')
RUNS = flags.DEFINE_integer('runs', 20, 'timed')


def make(path, w, form):
  fields = {'x_scale': np.float32([0.05])} if form.inputs == 'static' else {}
  if fields:
    return qtensor.quantize(w, form.codes, inputs=form.inputs, **fields)
  return quantize.plain(path, w, form)


def main(argv):
  cfg = encoder(SIZE.value)
  dtype = {'f32': jnp.float32, 'bf16': jnp.bfloat16}[PRECISION.value]
  params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
  values = quantize.quantized({'params': params}, FORM.value or (), make=make)
  values = jax.device_put(step.cast_frozen(values, dtype))
  del params
  model = Encoder(cfg, dtype=dtype)
  ids = np.random.default_rng(0).integers(0, 30000, (BATCH.value, LENGTH.value), dtype=np.int32)
  batch = jax.device_put(
    {'input_ids': ids, 'mask': np.ones(ids.shape, bool), 'token_types': np.zeros_like(ids)}
  )
  run = jax.jit(step.forward(model))
  for _ in range(3):
    run(values, batch).block_until_ready()
  times = []
  for _ in range(RUNS.value):
    start = time.perf_counter()
    run(values, batch).block_until_ready()
    times.append(time.perf_counter() - start)
  p50, p95 = (float(np.percentile(times, q)) * 1e3 for q in (50, 95))
  print(
    json.dumps(
      {
        'quantize': FORM.value,
        'precision': PRECISION.value,
        'size': SIZE.value,
        'batch': BATCH.value,
        'length': LENGTH.value,
        'jax': jax.__version__,
        'device': jax.devices()[0].device_kind,
        'weights_mb': round(tree.nbytes(values) / 1e6, 1),
        'p50_ms': round(p50, 2),
        'p95_ms': round(p95, 2),
        'examples_per_s': round(BATCH.value / p50 * 1e3, 2),
        'peak_gb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
      }
    )
  )


if __name__ == '__main__':
  app.run(main)
