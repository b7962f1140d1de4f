"""What a finished run weighs: numbers, bytes, and what its model asks for when it is used."""

import dataclasses
import json

import jax
import jax.numpy as jnp

from efft import bundle, compact, files, merging, pipeline, quantize, tree
from efft.classifier import Classifier
from efft.peft import base as peft
from efft.programs import flops, memory


def parameters(content: bundle.Bundle, variables: dict) -> dict[str, int]:
  """{'stored', 'head', 'total'}, numbers.

  Args:
    content: the bundle; 'stored' counts in it what 32 bits hold (a number in int8 is a quarter of
      one, one that is stored beside its index two), the head included.
    variables: of its `Classifier`; 'total' is all of them, deltas included.
  """
  stored = sum(map(compact.nbytes, content.leaves.values())) / 4
  head = {path: x for path, x in content.leaves.items() if path.startswith('params/head/')}
  return {'stored': round(stored), 'head': tree.count(head), 'total': tree.count(variables)}


def inference(model: Classifier, length: int, batch: int = 1) -> dict[str, float | None]:
  """{'flops' of one example, 'memory': bytes of the program} for texts of `length` tokens.

  Args:
    model: loaded on one device; the memory holds its weights once, and what a batch needs.
    length, batch: tokens and texts.
  """
  shape = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  inputs = dict.fromkeys(('input_ids', 'token_types'), shape)
  inputs['mask'] = jax.ShapeDtypeStruct((batch, length), jnp.bool_)
  inputs['weights'] = jax.ShapeDtypeStruct((batch,), jnp.float32)
  compiled = model.apply.lower(model.variables, inputs).compile()
  return {'flops': flops(model.apply, model.variables, inputs) / batch, 'memory': memory(compiled)}


def standing_alone(content: bundle.Bundle) -> bundle.Bundle:
  """The bundle that needs no base: merged where its deltas fold into float weights, else with the
  deltas (of a base in few bits too, which merging would make float)."""
  whole = pipeline.alone(content)
  variables = {path: x for path, x in whole.leaves.items() if path.startswith('params/')}
  if not content.method or quantize.held(variables) or peft.fixed(peft.build(content.method)):
    return whole
  return merging.merged(content)


def written(content: bundle.Bundle) -> int:
  """Bytes of the folder that `bundle.save` would make of it, without making it."""
  about = {f.name: getattr(content, f.name) for f in dataclasses.fields(content)}
  tokenizer = about.pop('tokenizer').encode()
  leaves = about['leaves']
  about |= {
    'version': bundle.VERSION, 'digest': '0' * 64, 'leaves': compact.described(leaves),
    'files': dict.fromkeys(('tokenizer.json', 'weights.safetensors'), '0' * 64),
  }  # fmt: skip
  text = files.to_json(json.loads(files.to_json(about)), indent=2) + '\n'
  return _safetensors(compact.encode(leaves)) + len(tokenizer) + len(text.encode())


def _safetensors(arrays: dict) -> int:
  """Bytes of such a file: the length of its header, the header, the arrays."""
  header, start = {}, 0
  for name in sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)):
    x = arrays[name]
    places = [start, start + x.nbytes]
    kind = 'BOOL' if x.dtype == bool else f'{x.dtype.kind.upper()}{8 * x.dtype.itemsize}'
    header[name] = {'dtype': kind, 'shape': list(x.shape), 'data_offsets': places}
    start = places[1]
  length = len(json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode())
  return 8 + length + -length % 8 + start
