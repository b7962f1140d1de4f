"""HF PEFT's methods that add nothing to kernels: (IA)3, norms, biases, prompts, prefixes."""

from collections.abc import Mapping

import numpy as np

from efft import tree
from efft.errors import InputError
from efft.interop import foreign, peft_rows, peft_targets
from efft.interop.peft_rows import RULES, Part, Source, Written, refusal
from efft.models import hub
from efft.peft import base as peft

# Where (IA)3 acts: {(module's row, whether it is one of feedforward_modules): (site, leaf)}.
_IA3 = {
  ('attention/key', False): ('attention/kv', 'k'),
  ('attention/value', False): ('attention/kv', 'v'),
  ('mlp/down', True): ('mlp/act', 'ff'),
  ('attention/out', True): ('attention/heads', 'out'),
}


def read_ia3(source: Source) -> Part:
  """(IA)3; of the three scales of a layer, those that are not there are ones."""
  config, names = source.config, source.names
  targets = peft_targets.selected(config, names.linears, source.saved)
  forward = config.take('feedforward_modules', None) or []
  config.ignore(('init_ia3_weights', 'fan_in_fan_out'))
  found, origin = {}, {}
  for module in targets:
    layer, _, row = names.modules[module].partition('/')
    if isinstance(forward, str):
      inner = peft_targets.matches(forward, module, config.where)
    else:
      inner = any(module.endswith(ending) for ending in forward)
    if (row, inner) not in _IA3:
      what = 'feed-forward module' if inner else 'target'
      raise InputError(
        config.where, f'{module} as a {what} of IA3', "(IA)3 of keys, values and output.dense's "
        'inputs', foreign.REFUSED,
      )  # fmt: skip
    site, leaf = _IA3[row, inner]
    path = f'delta/{layer}/{site}_ia3/{leaf}'
    origin[path] = f'{module}.ia3_l'
    found[path] = np.ravel(source.tensors.take(origin[path]))
  cfg = source.base.cfg
  layers = sorted({path.split('/')[1] for path in found}, key=lambda name: int(name[6:]))
  heads = any(path.endswith('/out') for path in found)
  filled = {}
  for layer in layers:
    number = int(layer[6:])
    width = cfg.heads[number] * cfg.head_dim
    for (_, _), (site, leaf) in _IA3.items():
      path = f'delta/{layer}/{site}_ia3/{leaf}'
      if path not in found and (leaf != 'out' or heads):
        filled[path] = np.ones(cfg.mlp[number] if leaf == 'ff' else width, np.float32)
  at = peft_targets.regex((f'{layer}/x' for layer in layers), cfg.layers).removesuffix('/x')
  method = {'ia3': {'fn': 'scale.ia3', 'layers': at, 'attention_out': heads}}
  still = tuple((path, 'frozen') for path in filled)
  rules = (RULES[0], *still, *RULES[1:])
  return Part(method, found | filled, rules, (), tuple(targets), origin)


def write_ia3(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """(IA)3, less the scales that are ones in all layers."""
  names = peft_targets.names(base.cfg)
  (name,) = _only_one(adapter.method)
  module_of = {path: module for module, path in names.modules.items()}
  found = {}
  for (row, inner), (site, leaf) in _IA3.items():
    own = {}
    for number in range(base.cfg.layers):
      path = f'delta/layer_{number}/{site}_{name}/{leaf}'
      if path in leaves:
        own[module_of[f'layer_{number}/{row}']] = np.asarray(leaves.take(path))
    found[row, inner] = own
  acting = {key: own for key, own in found.items() if any((x != 1).any() for x in own.values())}
  acting = acting or found
  tensors = {
    f'{module}.ia3_l': x.reshape(1, -1) if inner else x.reshape(-1, 1)
    for (_, inner), own in acting.items()
    for module, x in own.items()
  }
  targets = [module for own in acting.values() for module in own]
  forward = [module for (_, inner), own in acting.items() if inner for module in own]
  config = {'feedforward_modules': peft_targets.endings(forward, names.linears)}
  return Written(config, tensors, targets=tuple(targets))


def read_norms(source: Source) -> Part:
  """LN_TUNING: norms in place of the base's."""
  names = source.names
  norms = [module for module, path in names.modules.items() if path.endswith('norm')]
  targets = peft_targets.selected(source.config, norms, source.saved)
  leaves, origin = {}, {}
  for module in targets:
    for suffix in ('weight', 'bias'):
      path = names.parameters[f'{module}.{suffix}']
      origin[path] = f'{module}.ln_tuning_layers.{suffix}'
      leaves[path] = source.tensors.take(origin[path])
  return Part({}, leaves, _params_rules(leaves, 'norm', source), (), tuple(targets), origin)


def read_biases(source: Source) -> Part:
  """BEFT: what is added to linear layers' outputs, in their biases."""
  names = source.names
  targets = peft_targets.selected(source.config, names.linears, source.saved)
  source.config.ignore(('init_weights',))
  flat, leaves, origin = tree.flatten(source.base.params), {}, {}
  for module in targets:
    path = names.parameters[f'{module}.bias']
    origin[path] = f'{module}.beft_bias'
    leaves[path] = flat[path.removeprefix('params/')] + source.tensors.take(origin[path]).ravel()
  return Part({}, leaves, _params_rules(leaves, 'bias', source), (), tuple(targets), origin)


def _params_rules(leaves: Mapping, group: str, source: Source) -> tuple:
  paths = [path.removeprefix('params/') for path in leaves]
  regex = peft_targets.regex(paths, source.base.cfg.layers)
  return (RULES[0], (f'params/({regex})', group), RULES[-1])


def write_params(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base):
  """(peft_type, Written) of parameters that train without any delta: norms, or linear biases."""
  names = peft_targets.names(base.cfg)
  flat = tree.flatten({'params': base.params})
  paths = [p for p in leaves if p.startswith('params/') and not p.startswith('params/head/')]
  modules = {p.rpartition('/')[0].removeprefix('params/') for p in paths}
  by_path = {path: module for module, path in names.modules.items()}
  if paths and all(module.endswith('norm') for module in modules):
    targets = [module for path, module in by_path.items() if path in modules]
    tensors = {}
    for module in targets:
      for suffix in ('weight', 'bias'):
        path = names.parameters[f'{module}.{suffix}']
        tensors[f'{module}.ln_tuning_layers.{suffix}'] = leaves.take(path, flat[path])
    return 'LN_TUNING', Written({}, tensors, targets=tuple(targets))
  targets = [module for path, module in by_path.items() if path in modules]
  if paths and all(p.endswith('/bias') for p in paths) and set(targets) <= set(names.linears):
    tensors = {}
    for module in targets:
      path = names.parameters[f'{module}.bias']
      tensors[f'{module}.beft_bias'] = (leaves.take(path) - flat[path]).reshape(1, -1)
    return 'BEFT', Written({}, tensors, targets=tuple(targets))
  found = 'no delta, and trained parameters other than norms, or biases of linear layers'
  raise InputError('--format=peft', found, 'a method of HF PEFT', 'try --format=auto')


_SIZES = {'token_dim': 'embed_dim', 'num_layers': 'layers'}
_PROMPT_IDLE = (
  'prompt_tuning_init', 'prompt_tuning_init_text', 'tokenizer_name_or_path', 'tokenizer_kwargs',
  'encoder_reparameterization_type', 'encoder_hidden_size', 'encoder_num_layers',
  'encoder_dropout', 'prefix_projection', 'init_weights', 'num_attention_heads',
)  # fmt: skip


def _virtual(source: Source) -> tuple[int, np.ndarray]:
  """(length, prompt_embeddings) of a prompt method."""
  config, cfg = source.config, source.base.cfg
  length = config.take('num_virtual_tokens')
  for key, field in _SIZES.items():
    config.only(key, getattr(cfg, field), None)
  config.only('num_transformer_submodules', 1, None)
  config.ignore(_PROMPT_IDLE)
  rows = source.tensors.take('prompt_embeddings')
  if rows.ndim != 2 or len(rows) != length:
    found, expected = f'prompt_embeddings {rows.shape}', f'{length} rows'
    raise InputError(source.tensors.where, found, expected, 'the checkpoint is damaged')
  return length, rows


def read_prompt(source: Source) -> Part:
  """PROMPT_TUNING, and P_TUNING, of which the library keeps the prompt alone."""
  length, rows = _virtual(source)
  method = {'prompt': {'fn': 'prompt.prompt', 'length': length, 'pooled': 'first'}}
  path = 'delta/embed/words_prompt/prompt'
  return Part(method, {path: rows}, RULES, (), (), {path: 'prompt_embeddings'})


def read_prefix(source: Source) -> Part:
  """PREFIX_TUNING, the prefixes themselves; the text's positions begin behind them."""
  cfg = source.base.cfg
  if cfg.architecture == 'distilbert':
    raise InputError(source.config.where, 'a prefix for distilbert', 'an encoder that the library '
                     'can put one before', foreign.REFUSED)  # fmt: skip
  length, rows = _virtual(source)
  if rows.shape[1] != 2 * cfg.layers * cfg.hidden:
    found, expected = f'prompt_embeddings {rows.shape}', f'{2 * cfg.layers * cfg.hidden} columns'
    raise InputError(source.tensors.where, found, expected, 'use the base it is for')
  parts = rows.reshape(length, cfg.layers, 2, cfg.hidden)
  leaves, gone = {}, np.int32(length)
  for i in range(cfg.layers):
    for j, leaf in enumerate('kv'):
      leaves[f'delta/layer_{i}/attention/kv_prefix/{leaf}'] = parts[:, i, j].copy()
  leaves |= {f'delta/embed{site}_prefix/length': np.asarray(gone) for site in ('/words', '')}
  method = {'prefix': {'fn': 'prefix.prefix', 'length': length, 'shift': True}}
  notes = () if cfg.architecture == 'bert' else (
    'HF PEFT fails to compute with this prefix today; here it acts as before BERT',
  )  # fmt: skip
  return Part(method, leaves, RULES, notes)


def _prompt_config(cfg, rows: np.ndarray) -> dict:
  return {
    'num_attention_heads': cfg.heads[0], 'num_layers': cfg.layers,
    'num_transformer_submodules': 1, 'num_virtual_tokens': len(rows), 'token_dim': cfg.embed_dim,
  }  # fmt: skip


def write_prompt(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """A prompt as PROMPT_TUNING, whatever made it."""
  (name,) = _only_one(adapter.method)
  options = peft_rows.full(adapter.method[name])
  for key, value in (('at', 'embed/words'), ('pooled', 'first')):
    if options[key] != value:
      raise refusal(f'a prompt with {key}={options[key]!r}, not {value!r}', adapter.method)
  grown = _expanded(adapter, leaves)
  rows = np.asarray(grown.pop(f'embed/words_{name}/prompt'))
  config = {**_prompt_config(base.cfg, rows), 'prompt_tuning_init': 'RANDOM'}
  return Written(config, {}, {'prompt_embeddings': rows})


def write_prefix(adapter: foreign.Adapter, leaves: foreign.Keys, base: hub.Base) -> Written:
  """Prefixes as PREFIX_TUNING, which shifts positions, and fails but with BERT."""
  (name,) = _only_one(adapter.method)
  cfg, options = base.cfg, peft_rows.full(adapter.method[name])
  if cfg.architecture != 'bert':
    raise refusal(f'a prefix for {cfg.architecture}, with which PEFT fails', adapter.method)
  if not options['shift']:
    raise refusal('a prefix with shift=False', adapter.method)
  grown = _expanded(adapter, leaves)
  paths = [f'layer_{i}/attention/kv_{name}/{leaf}' for i in range(cfg.layers) for leaf in 'kv']
  if any(path not in grown for path in paths):
    raise refusal('prefixes in some of the layers', adapter.method)
  rows = np.concatenate([np.asarray(grown[path]) for path in paths], 1)
  config = {**_prompt_config(cfg, rows), 'encoder_hidden_size': cfg.hidden}
  return Written({**config, 'prefix_projection': False}, {}, {'prompt_embeddings': rows})


def _expanded(adapter: foreign.Adapter, leaves: foreign.Keys) -> dict[str, np.ndarray]:
  own = {p.removeprefix('delta/'): leaves.take(p) for p in leaves if p.startswith('delta/')}
  return tree.flatten(peft.expand(peft.build(adapter.method), tree.unflatten(own)))


def _only_one(method: Mapping) -> list[str]:
  if len(method) != 1:
    raise refusal(f'{" beside ".join(method)}', method)
  return list(method)
