"""AdapterHub's prefixes and prompts: adapters 1.3.0, methods/{prefix,prompt}_tuning.py.

A prefix is stored in a pool that every layer refers to, and so as often in a file of torch:

    prefix_tuning.prefix_tunings.<name>.self_prefix.wte.weight
    encoder.layer.0.attention.self.prefix_tuning.pool.prefix_tunings.<name>.self_prefix.wte.weight
"""

import numpy as np

from efft.errors import InputError
from efft.interop import adapterhub_parts as parts
from efft.interop.adapterhub_parts import Entry, Part, Source, Target
from efft.interop.foreign import Keys

PREFIX = {
  'architecture': 'prefix_tuning', 'bottleneck_size': 512, 'cross_prefix': True, 'dropout': 0.0,
  'encoder_prefix': True, 'flat': False, 'init_weights_seed': None, 'leave_out': [],
  'non_linearity': 'tanh', 'prefix_length': 30, 'shared_gating': True, 'use_gating': False,
}  # fmt: skip
PROMPT = {
  'architecture': 'prompt_tuning', 'combine': 'prefix', 'init_weights_seed': None,
  'prompt_init': 'random_uniform', 'prompt_init_text': None, 'prompt_length': 10,
}  # fmt: skip
_PROMPTS = (
  "with PyTorch's fused attention, AdapterHub lets prompts see the padding of a batch, so that its "
  "scores depend on the other texts; efft gives those of attn_implementation='eager'"
)
_DISTILBERT = (
  "with PyTorch's fused attention and padding, AdapterHub adds 1 to the scores of DistilBERT's "
  "prefixes; efft gives those of attn_implementation='eager'"
)


def read(source: Source, config: Keys) -> Part:
  """Of a PrefixTuningConfig."""
  cfg, d = source.cfg, source.cfg.hidden
  layers = parts.kept_layers(config, cfg)
  length, flat = parts.whole(config, 'prefix_length', 30), parts.flag(config, 'flat')
  hidden = parts.whole(config, 'bottleneck_size', 512)
  gated = parts.flag(config, 'use_gating')
  shared_gate = parts.flag(config, 'shared_gating', True)
  if gated and not shared_gate:
    raise parts.refuse(config.where, 'shared_gating=false', 'one gate for keys and values')
  act = parts.activation(config, 'tanh')
  if not flat and act != 'tanh':
    raise parts.refuse(config.where, f'non_linearity={act} of a prefix', 'tanh')
  config.ignore(('cross_prefix', 'encoder_prefix', 'init_weights_seed'))
  notes = parts.training_only(config, 'dropout')
  if cfg.architecture == 'distilbert':
    notes += (_DISTILBERT,)

  stem, leaves, pool = _stems(cfg, source.name)[0], {}, _pool(source)
  values = 2 * len(layers) * d
  if flat:
    kv = pool.take(f'{stem}.control_trans', length * values).reshape(length, -1, 2, d)
    found = [{'k': kv[:, n, 0], 'v': kv[:, n, 1]} for n in range(len(layers))]
  else:
    up = parts.kernel(pool.take(f'{stem}.control_trans.2.weight', values, hidden))
    up = up.reshape(hidden, -1, 2, d)
    bias = pool.take(f'{stem}.control_trans.2.bias', values).reshape(-1, 2, d)
    found = []
    for n in range(len(layers)):
      ups = {f'{name}_up': up[:, n, j] for j, name in enumerate('kv')}
      found.append(ups | {f'{name}_up_bias': bias[n, j] for j, name in enumerate('kv')})
    common = {
      'inputs': pool.take(f'{stem}.wte.weight', length, d),
      'down': parts.kernel(pool.take(f'{stem}.control_trans.0.weight', hidden, d)),
      'down_bias': pool.take(f'{stem}.control_trans.0.bias', hidden),
    }
    leaves |= {f'delta/shared_prefix/{leaf}': x for leaf, x in common.items()}
  pool.tensors.finish()
  for i, own in zip(layers, found, strict=True):
    if gated:
      at = f'{_attention(cfg, i)}.prefix_tuning.prefix_gates.{source.name}'
      own |= source.gate(at)
    own = {leaf: np.ascontiguousarray(x) for leaf, x in own.items()}
    leaves |= parts.delta(f'layer_{i}/attention/kv', 'prefix', own)
  options = {'length': length, 'hidden': 0 if flat else hidden}
  options['layers'] = parts.pattern(cfg, layers)
  return Part({'prefix': {'fn': 'prefix.prefix', **options}}, leaves, (), notes, gated)


def _attention(cfg, i: int) -> str:
  return f'{parts.layer(cfg, i)}.attention{"" if cfg.architecture == "distilbert" else ".self"}'


def _place(cfg) -> str:
  return 'self' if cfg.architecture == 'distilbert' else 'self_prefix'


def _stems(cfg, name: str) -> list[str]:
  """The pool's name, and those that the layers have for it."""
  own = f'prefix_tunings.{name}.{_place(cfg)}'
  layers = [f'{_attention(cfg, i)}.prefix_tuning.pool.{own}' for i in range(cfg.layers)]
  return [f'prefix_tuning.{own}', *layers]


def _pool(source: Source) -> Source:
  """The pool alone, after all copies of it have been found to be alike and taken."""
  pool, *copies = (f'{stem}.' for stem in _stems(source.cfg, source.name))
  held = {n: source.tensors.take(n) for n in source.tensors if n.startswith(pool)}
  for stem in copies:
    for name in [name for name in source.tensors if name.startswith(stem)]:
      first = pool + name.removeprefix(stem)
      copy = source.tensors.take(name)
      if first not in held or not np.array_equal(held[first], copy):
        raise InputError(
          f'{source.tensors.where}: {name}', 'a copy that differs', f'the values of {first}',
          'the file is damaged: take another copy',
        )  # fmt: skip
  return source._replace(tensors=Keys(held, source.tensors.where))


def read_prompt(source: Source, config: Keys) -> Part:
  """Of a PromptTuningConfig."""
  length = parts.whole(config, 'prompt_length', 10)
  config.only('combine', 'prefix')
  config.ignore(('prompt_init', 'prompt_init_text', 'random_uniform_scale', 'init_weights_seed'))
  if source.cfg.embed_dim != source.cfg.hidden:
    raise parts.refuse(config.where, 'a prompt before a projection of embeddings')
  at = f'prompt_tuning.prompt_tunings.{source.name}.prompt_embedding.weight'
  leaves = parts.delta('embed', 'prompt', {'prompt': source.take(at, length, source.cfg.hidden)})
  options = {'length': length, 'init': 'random', 'at': 'embed', 'pooled': 'first'}
  return Part({'prompt': {'fn': 'prompt.prompt', **options}}, leaves, notes=(_PROMPTS,))


def write(entry: Entry, fn: str) -> Target:
  """Of prefix.prefix; the copies in the layers are one array."""
  options, cfg, d = entry.options, entry.cfg, entry.cfg.hidden
  if options['shift']:
    raise parts.refuse(entry.where, 'shift=True', 'positions of the text as they are')
  entry.known('attention/kv')
  layers = entry.common('attention/kv')
  length, hidden = options['length'], options['hidden']
  found, tensors = [entry.sites[f'layer_{i}/attention/kv'] for i in layers], {}
  if hidden:
    shared = entry.sites['shared']
    ups = [p.take(f'{name}_up') for p in found for name in 'kv']
    biases = [p.take(f'{name}_up_bias') for p in found for name in 'kv']
    own = {
      'wte.weight': shared.take('inputs'),
      'control_trans.0.weight': parts.kernel(shared.take('down')),
      'control_trans.0.bias': shared.take('down_bias'),
      'control_trans.2.weight': parts.kernel(np.concatenate(ups, 1)),
      'control_trans.2.bias': np.concatenate(biases),
    }
    shared.finish()
  else:
    kv = np.stack([p.take(name) for p in found for name in 'kv'], 1)
    own = {'control_trans': kv.reshape(length * 2 * len(layers) * d)}
  gated = 'gate' in found[0]
  for i, p in zip(layers, found, strict=True):
    if gated:
      at = f'{_attention(cfg, i)}.prefix_tuning.prefix_gates.{entry.name}'
      tensors[f'{at}.weight'] = parts.kernel(p.take('gate'))
      tensors[f'{at}.bias'] = p.take('gate_bias')
    p.finish()
  for stem in _stems(cfg, entry.name):
    tensors |= {f'{stem}.{name}': x for name, x in own.items()}
  config = {
    'flat': not hidden, 'prefix_length': length, 'use_gating': gated,
    'bottleneck_size': hidden or PREFIX['bottleneck_size'], 'leave_out': entry.left_out(layers),
  }  # fmt: skip
  return Target([PREFIX | config], tensors)


def write_prompt(entry: Entry, fn: str) -> Target:
  """Of prompt.prompt behind the embeddings, whose first vector is pooled."""
  for key, value in (('at', 'embed'), ('pooled', 'first')):
    if entry.options[key] != value:
      raise parts.refuse(entry.where, f'{key}={entry.options[key]!r}', f'{key}={value!r}')
  entry.known('embed')
  p = entry.sites['embed']
  rows = p.take('prompt')
  p.finish()
  at = f'prompt_tuning.prompt_tunings.{entry.name}.prompt_embedding.weight'
  return Target([PROMPT | {'prompt_length': len(rows)}], {at: rows})


def is_copy(name: str) -> bool:
  """Whether a tensor is a layer's copy of the pool's."""
  return '.prefix_tuning.pool.' in name
