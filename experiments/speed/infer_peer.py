"""Times a forward pass of BERT-base in other runtimes; prints one JSON line.

    python experiments/speed/infer_peer.py --backend=onnxruntime    # torch, onnx, onnxruntime
    python experiments/speed/infer_peer.py --backend=openvino       # torch, onnx, openvino, nncf

Random weights, all tokens real. onnxruntime: `quantize_dynamic` with int8 weights, a range a
tensor for inputs at run time. OpenVINO: `nncf.quantize` for transformers, ranges from a few
batches; what stays float is bfloat16 where the processor has it, as is its default.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH, LENGTH = 16, 128


def exported(folder: str) -> tuple[str, dict]:
  """(an ONNX file, what it takes)."""
  import torch
  from transformers import BertConfig, BertForSequenceClassification

  torch.manual_seed(0)
  model = BertForSequenceClassification(BertConfig(num_labels=2)).eval()
  ids = torch.randint(0, 30000, (BATCH, LENGTH))
  given = {'ids': ids, 'mask': torch.ones_like(ids)}
  path = str(Path(folder) / 'model.onnx')
  # Of any batch and length, as one deploys it; with fixed ones onnxruntime is slower.
  axes = {0: 'batch', 1: 'length'}
  torch.onnx.export(
    model, tuple(given.values()), path, input_names=list(given), output_names=['logits'],
    dynamic_axes=dict.fromkeys(given, axes), dynamo=False, opset_version=17,
  )  # fmt: skip
  return path, {name: x.numpy() for name, x in given.items()}


def onnxruntime():
  """(its name, () -> logits)."""
  import onnxruntime as ort
  from onnxruntime.quantization import QuantType, quantize_dynamic

  with tempfile.TemporaryDirectory() as folder:
    path, feed = exported(folder)
    quantize_dynamic(path, f'{path}.int8', weight_type=QuantType.QInt8)
    session = ort.InferenceSession(f'{path}.int8')
  return f'onnxruntime {ort.__version__}, quantize_dynamic', lambda: session.run(None, feed)


def compiled(options: dict):
  """(OpenVINO's compiled int8 model, what it takes)."""
  import nncf
  import openvino as ov

  with tempfile.TemporaryDirectory() as folder:
    path, feed = exported(folder)
    net = ov.Core().read_model(path)
  rng, sample = np.random.default_rng(0), []
  for _ in range(8):
    sample.append(feed | {'ids': rng.integers(0, 30000, (BATCH, LENGTH))})
  kind = nncf.ModelType.TRANSFORMER
  net = nncf.quantize(net, nncf.Dataset(sample), model_type=kind, subset_size=len(sample))
  return ov.Core().compile_model(net, 'CPU', options), feed


def openvino():
  """(its name, () -> logits)."""
  import openvino as ov

  model, feed = compiled({})
  request = model.create_infer_request()
  return f'OpenVINO {ov.__version__}, nncf.quantize', lambda: request.infer(feed)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  backends = {'onnxruntime': onnxruntime, 'openvino': openvino}
  parser.add_argument('--backend', default='onnxruntime', choices=list(backends))
  parser.add_argument('--runs', type=int, default=8)
  given = parser.parse_args()
  name, run = backends[given.backend]()
  for _ in range(3):
    run()
  times = []
  for _ in range(given.runs):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  p50, p95 = (round(1e3 * float(np.percentile(times, q)), 2) for q in (50, 95))
  found = {'side': name, 'backend': given.backend, 'batch': BATCH, 'length': LENGTH}
  print(json.dumps({**found, 'runs': given.runs, 'p50_ms': p50, 'p95_ms': p95}))


if __name__ == '__main__':
  main()
