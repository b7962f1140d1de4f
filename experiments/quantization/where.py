"""Where an int8 forward pass of BERT-base spends its time, here and in OpenVINO; prints JSON lines.

    PYTHONPATH=.:experiments/speed python experiments/quantization/where.py --quantize=int8_static
    PYTHONPATH=experiments/speed python experiments/quantization/where.py --side=openvino

Efft's side is read from XLA's profile of the compiled program, OpenVINO's from its own counters;
both on one core, so that times add up: `taskset -c 0`.
"""

import argparse
import collections
import glob
import json
import re
import tempfile

import numpy as np

BATCH, LENGTH, CALLS = 16, 128, 5


def kind(name: str, line: str) -> str:
  """Of an instruction of the compiled program, NAME = LINE: what it is for."""
  op = re.search(r'op_name="([^"]*)"', line)
  op = op.group(1) if op else ''
  shape = line.split('[')[0]
  if 'dot_general' in op and 'ynn' in name or ' dot(' in line:
    return 'int8 products' if shape == 's32' else 'float products'
  if 'reduce' in op or 'ynn' in name:
    return 'sums of norms and softmax'
  if 'transpose' in name or 'copy' in name:
    return 'copies'
  return 'all else, fused: scaling, GELU, softmax, norms, rounding'


def efft(form: str) -> dict:
  from efft import cpu

  cpu.keep_heap()

  import infer_time
  import jax
  import jax.numpy as jnp
  from sizes import encoder

  from efft import quantize
  from efft.models.encoder import Encoder, init_params
  from efft.training import step

  cfg = encoder('base')
  params = jax.jit(lambda key: init_params(cfg, key))(jax.random.key(0))
  values = quantize.quantized({'params': params}, form or (), make=infer_time.make)
  ids = np.random.default_rng(0).integers(0, 30000, (BATCH, LENGTH), dtype=np.int32)
  batch = {'input_ids': ids, 'mask': np.ones(ids.shape, bool), 'token_types': np.zeros_like(ids)}
  values, batch = jax.device_put((values, batch))
  run = jax.jit(step.forward(Encoder(cfg, dtype=jnp.float32))).lower(values, batch).compile()
  lines = dict(re.findall(r'^ *(?:ROOT )?%(\S+) = (.*)$', run.as_text(), re.M))
  for _ in range(3):
    run(values, batch).block_until_ready()
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(CALLS):
        run(values, batch).block_until_ready()
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    profile = jax.profiler.ProfileData.from_file(path)
  spent = collections.Counter()
  for plane in profile.planes:
    for line in plane.lines:
      for event in line.events:
        if event.name in lines:
          spent[kind(event.name, lines[event.name])] += event.duration_ns / 1e6 / CALLS
  return {'side': 'efft', 'quantize': form, 'jax': jax.__version__, 'ms': dict(spent)}


def openvino() -> dict:
  import infer_peer
  import openvino as ov

  compiled, feed = infer_peer.compiled({'PERF_COUNT': True})
  request = compiled.create_infer_request()
  for _ in range(3):
    request.infer(feed)
  spent = collections.Counter()
  for _ in range(CALLS):
    request.infer(feed)
    for x in request.profiling_info:
      if x.status == ov.ProfilingInfo.Status.EXECUTED:
        spent[f'{x.node_type}, {x.exec_type}'] += x.real_time.total_seconds() * 1e3 / CALLS
  inference = str(compiled.get_property('INFERENCE_PRECISION_HINT'))
  return {'side': f'OpenVINO {ov.__version__}', 'floats': inference, 'ms': dict(spent)}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--side', default='efft', choices=['efft', 'openvino'])
  parser.add_argument('--quantize', default='int8_static')
  given = parser.parse_args()
  found = efft(given.quantize) if given.side == 'efft' else openvino()
  ms = sorted(found.pop('ms').items(), key=lambda x: -x[1])
  found['ms'] = {name: round(x, 1) for name, x in ms if x >= 0.05}
  print(json.dumps(found | {'total_ms': round(sum(found['ms'].values()), 1)}))


if __name__ == '__main__':
  main()
