"""Run folders made without training: what would train has moved at random."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from efft import assemble, bundle, transfer, tree
from efft.models import hub

FIXTURES = Path(__file__).parent / 'fixtures'
LABELS = ('no', 'maybe', 'yes')


@functools.cache
def base(architecture: str = 'bert', num_labels: int = 3, pooling: str = 'cls') -> hub.Base:
  folder = str(FIXTURES / architecture)
  key = jax.random.key(0)
  return hub.load(folder, num_labels=num_labels, pooling=pooling, head='new', key=key)


@functools.cache
def start(name: str, options: str, seed: int = 0, architecture: str = 'bert', **model):
  """(network, variables, resolved config) before training; `options` as JSON."""
  resolved = tiny.settings(name, **json.loads(options))
  found = base(architecture, **model)
  net = assemble.network(found.cfg, resolved['method'], 'float32')
  return net, assemble.variables(net, found.params, jax.random.key(seed)), resolved


@functools.cache
def tokenizer(architecture: str) -> str:
  """tokenizer.json of an architecture; where it has none, that of BERT, cut to its vocabulary."""
  file = FIXTURES / architecture / 'tokenizer.json'
  found = json.loads((file if file.exists() else FIXTURES / 'bert' / 'tokenizer.json').read_text())
  size = base(architecture).cfg.vocab_size
  if not file.exists():
    vocab = {token: i for token, i in found['model']['vocab'].items() if i < size}
    found['model']['vocab'] = vocab
  return json.dumps(found)


def trained(
  folder, name: str, seed: int, options=None, about=None, move=0.1, architecture='bert', **model
) -> str:
  """A run folder whose trainable leaves have moved at random."""
  found = base(architecture, **model)
  net, values, resolved = start(name, json.dumps(options or {}), architecture=architecture, **model)
  parts = assemble.partition(values, resolved['rules'])
  rng = np.random.default_rng(seed)
  moved = tree.map_paths(lambda p, x: x + move * rng.normal(size=x.shape), parts.trainable)
  moved = jax.tree.map(jnp.float32, moved)
  leaves = transfer.handed_on(net.deltas, moved, parts.frozen, found.params)
  fields = {
    'leaves': leaves, 'tokenizer': tokenizer(architecture),
    'encoder': found.cfg.to_dict(), 'method': resolved['method'],
    'rules': tuple(map(tuple, resolved['rules'])), 'labels': LABELS, 'kind': 'single',
    'max_length': 24, 'dtype': 'float32', 'pooling': found.cfg.pooling,
    'columns': {'text': 'text', 'label': 'label'},
    'base': {
      'name': str(found.folder), 'path': str(found.folder), 'sha256': found.sha256,
    },
    'needs_base': transfer.needs_base(leaves, values), 'metrics': {'accuracy': 0.5}, 'versions': {},
  }  # fmt: skip
  bundle.save(folder / 'bundle', bundle.Bundle(**fields | (about or {})))
  return str(folder)
