"""Parameters that HF PEFT keeps in place of the base's, beside deltas of any method.

Biases (bias='all', '..._only'), whole modules (modules_to_save) and rows of the word table
(trainable_token_indices).
"""

from typing import Any

import numpy as np

from efft import tree
from efft.errors import InputError
from efft.interop import foreign, peft_rows, peft_targets
from efft.interop.peft_rows import Source
from efft.models import hub

WORDS = 'params/embed/word/embedding'


def biases(source: Source, value: Any, modules: tuple[str, ...]) -> dict[str, np.ndarray]:
  """The biases that train besides, in place of the base's."""
  names = source.names
  if value == 'none':
    return {}
  if value == 'all':
    wanted = [n for n, p in names.parameters.items() if p.endswith('/bias') and 'head/' not in p]
  elif isinstance(value, str) and value.endswith('_only'):
    wanted = [f'{m}.bias' for m in modules if f'{m}.bias' in names.parameters]
  else:
    found, known = f'bias={value!r:.100}', "'none', 'all' or '..._only'"
    raise InputError(source.config.where, found, known, 'correct it')
  return {
    names.parameters[name]: source.tensors.take(name)
    for name in wanted
    if not peft_targets.is_saved(name, source.saved)
  }


def saved(source: Source) -> dict[str, np.ndarray]:
  """The other parameters of modules_to_save, in place of the base's, and a word table beside."""
  found, words = {}, tree.flatten({'params': source.base.params})[WORDS]
  for name, path in source.names.parameters.items():
    besides = path == WORDS and name in source.tensors
    if path.startswith('params/head/'):
      continue
    if besides or peft_targets.is_saved(name, source.saved):
      x = foreign.turned(path, source.tensors.take(name))
      if not (besides and np.array_equal(x, words)):  # the base's own, of save_embedding_layers
        found[path] = x
  return found


def token_rows(source: Source, tokens: Any) -> dict[str, np.ndarray]:
  """The word table with the rows of trainable_token_indices in place of its own."""
  module = next(m for m, path in source.names.modules.items() if path == 'embed/word')
  name, where = f'{module}.token_adapter.trainable_tokens_delta', source.config.where
  if tokens is None:
    return {}
  if isinstance(tokens, dict):
    if len(tokens) != 1 or not module.endswith(next(iter(tokens))):
      found = f'trainable_token_indices of {", ".join(map(str, tokens))}'
      raise InputError(where, found, 'those of word_embeddings alone', foreign.REFUSED)
    tokens = next(iter(tokens.values()))
  rows = source.tensors.take(name)
  table = tree.flatten({'params': source.base.params})[WORDS].copy()
  whole = isinstance(tokens, list) and all(type(i) is int for i in tokens)
  whole = whole and len(set(tokens)) == len(tokens)
  if not whole or rows.shape != (len(tokens), table.shape[1]) or not all(
    0 <= i < len(table) for i in tokens
  ):  # fmt: skip
    found = f'trainable_token_indices={tokens!r:.100} and rows {rows.shape}'
    raise InputError(where, found, f'a row of {table.shape[1]} for each', 'use the base it is for')
  table[np.array(tokens, int)] = rows
  return {WORDS: table}


def write(
  adapter: foreign.Adapter,
  leaves: foreign.Keys,
  base: hub.Base,
  names: peft_targets.Names,
  kind: str,
  bias: str,
  modules: tuple[str, ...],
) -> tuple[dict, dict, list[str]]:
  """(tensors, config keys, modules_to_save) of parameters in place of the base's, beside deltas."""
  flat = tree.flatten({'params': base.params})
  own = {name: path for name, path in names.parameters.items() if path in leaves}
  config: dict[str, Any] = {'bias': 'none'} if bias else {}
  tensors: dict[str, np.ndarray] = {}
  extra: list[str] = []

  def value(name):
    path = names.parameters[name]
    leaves.take(path, None)
    return foreign.turned(path, adapter.leaves.get(path, flat[path]))

  biases = [n for n, p in names.parameters.items() if p.endswith('/bias') and 'head/' not in p]
  words = next(name for name, path in names.parameters.items() if path == WORDS)
  if words in own and kind == 'LORA' and words.removesuffix('.weight') not in modules:
    table = np.asarray(adapter.leaves[WORDS])
    changed = np.flatnonzero((table != flat[WORDS]).any(1))
    if len(changed) <= len(table) // 2:
      leaves.take(own.pop(words))
      if len(changed):
        config['trainable_token_indices'] = [int(i) for i in changed]
        name = f'{words.removesuffix(".weight")}.token_adapter.trainable_tokens_delta'
        tensors[name] = table[changed]
  at_targets = [name for name in own if name.rpartition('.')[0] in modules]
  if at_targets and not (bias and set(at_targets) <= set(biases)):
    raise peft_rows.refusal(f'{at_targets[0]} beside the {kind} there', adapter.method)
  everywhere = bool(bias and own and set(biases) <= set(own))
  if everywhere:
    config['bias'] = 'all'
  elif at_targets:
    config['bias'] = bias
    known = [f'{m}.bias' for m in modules]
    own |= {name: names.parameters[name] for name in known if name in names.parameters}
  for name in own:
    module = name.rpartition('.')[0]
    if module in modules:
      tensors[f'{module}.base_layer.bias'] = value(name)
    elif everywhere and name in biases:
      tensors[name] = value(name)
    elif module not in extra:
      extra.append(module)
      tensors |= {n: value(n) for n in names.parameters if n.rpartition('.')[0] == module}
  return tensors, config, extra
