"""What HF PEFT and AdapterHub wrote for tiny random encoders, read for tests of their numbers.

`fixtures/<library>/<architecture>/<method>`, with the logits that the library gave. Containers that
were pickles are safetensors here; names and values are as written.
"""

import functools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file

from efft.models import convert, hub
from efft.models.encoder import Encoder, EncoderConfig
from efft.models.layers import Hooks
from efft.peft import base

FIXTURES = Path(__file__).parent / 'fixtures'
LIBRARIES = {
  'peft': ('adapter_model.safetensors',),
  'adapters': ('adapter.safetensors', 'model_head.safetensors'),
}


@functools.cache
def plain(cfg):
  """The jitted forward pass without deltas."""
  return jax.jit(Encoder(cfg).apply)


@functools.cache
def encoder(architecture: str) -> hub.Base:
  """The encoder that all checkpoints of an architecture are of."""
  folder = FIXTURES / 'base' / architecture
  return hub.load(str(folder), num_labels=3, head='keep', key=jax.random.key(0))


class Peer(NamedTuple):
  """A checkpoint of another library.

  Attributes:
    tensors: by name, without 'base_model.', 'base_model.model.' and the encoder's prefix; what is
      the encoder's own (its head, tuned norms) is in `params` already.
    config: adapter_config.json; AdapterHub's, what is below 'config'.
  """

  cfg: EncoderConfig
  params: dict
  tensors: dict[str, np.ndarray]
  config: dict
  batch: dict
  logits: np.ndarray

  def agrees(self, deltas: dict, delta: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Asserts that the deltas with these parameters give the library's logits."""
    args = tuple(self.batch[name] for name in ('input_ids', 'mask', 'token_types'))
    model = Encoder(self.cfg, Hooks(tap=base.attach(deltas)))
    variables = {'params': self.params, 'delta': base.expand(deltas, delta)}
    logits = jax.jit(model.apply)(variables, *args)
    np.testing.assert_allclose(logits, self.logits, rtol=0, atol=tolerance)
    if delta:
      without = plain(self.cfg)({'params': self.params}, *args)
      assert np.abs(without - self.logits).max() > 100 * tolerance, 'the delta does something'


def read(library: str, architecture: str, method: str) -> Peer:
  folder = FIXTURES / library / architecture / method
  found = encoder(architecture)
  prefix = convert.NAMES[architecture][0]
  own = convert.to_hf(found.params, found.cfg)
  tensors = {}
  for file in LIBRARIES[library]:
    for name, x in load_file(folder / file).items():
      name = re.sub(r'^base_model\.(model\.)?', '', name)
      hf = name.replace('.ln_tuning_layers', '')
      if hf in own:
        own[hf] = x
      else:
        tensors[name.removeprefix(prefix)] = x
  params = convert.from_hf(own, found.cfg, head='keep', key=jax.random.key(0))
  config = json.loads((folder / 'adapter_config.json').read_text())
  with np.load(folder / 'expected.npz') as expected:
    ids = expected['input_ids'].astype(np.int32)
    # Drawn for all, given to those that have more than one.
    types = expected['token_type_ids'] if found.cfg.token_types > 1 else ids * 0
    batch = {
      'input_ids': ids,
      'mask': expected['attention_mask'].astype(bool),
      'token_types': types.astype(np.int32),
    }
    logits = expected['logits']
  return Peer(found.cfg, params, tensors, config.get('config', config), batch, logits)


def kernels(tensors: dict) -> dict[str, dict]:
  """{'layer_0/attention/query': {name: tensor}} of HF PEFT's names: of queries, keys and values."""
  found = {}
  for name, x in tensors.items():
    match = re.fullmatch(r'encoder\.layer\.(\d+)\.attention\.self\.(\w+)\.(.+)', name)
    if match:
      found.setdefault(f'layer_{match[1]}/attention/{match[2]}', {})[match[3]] = x
  assert found
  return found
