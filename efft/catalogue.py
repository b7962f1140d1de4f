"""What each method costs on BERT-base: counted on shapes, nothing of that size is allocated.

python -m efft.catalogue      # writes methods.json anew, which `efft methods` prints
"""

import ast
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efft import assemble, compact, files, programs, tree
from efft import config as configs
from efft.models.encoder import Encoder, EncoderConfig, init_params
from efft.peft import base, build, transform

FILE = Path(__file__).with_name('methods.json')
BERT_BASE = EncoderConfig(
  architecture='bert',
  vocab_size=30_522,
  hidden=768,
  heads=(12,) * 12,
  head_dim=64,
  mlp=(3072,) * 12,
  max_positions=512,
  token_types=2,
  embed_dim=768,
)
TOKENS = 128


def describe(file: Path) -> dict:
  """The entry of one config file.

  Returns:
    title and paper (of the docstring's first line), family, the numbers trained in BERT-base
    (without the head), stored beside the base (without the head) and in the head, whether it
    merges, and `flops`: the operations that the unmerged delta adds to the forward pass of one text
    of 128 tokens, relative to the encoder's own.
  """
  resolved = configs.resolve(configs.load(f'{file}:task=sst2'))
  for spec in resolved['method'].values():
    if isinstance(spec.get('layers'), int):  # s4's, which a config has of another encoder
      spec['layers'] = BERT_BASE.layers
  net = assemble.network(BERT_BASE, resolved['method'], 'float32')
  key = jax.random.key(0)
  params = jax.eval_shape(lambda key: init_params(BERT_BASE, key), key)
  variables = {'params': params}
  if net.deltas:
    variables['delta'] = jax.eval_shape(
      lambda params, key: base.init(net.model, net.deltas, params, key), params, key
    )
  parts = assemble.partition(variables, resolved['rules'])
  counts = {path: int(np.prod(x.shape)) for path, x in tree.flatten(variables).items()}
  head = sum(n for path, n in counts.items() if path.startswith('params/head/'))
  trained = sum(counts[path] for path in parts.groups)
  plain = Encoder(BERT_BASE)
  own = flops(lambda v, *batch: plain.apply({'params': v['params']}, *batch), variables)
  with_delta = flops(
    lambda v, ids, mask: net.logits(v, {'input_ids': ids, 'mask': mask, 'token_types': ids}),
    variables,
  )
  title = (ast.get_docstring(ast.parse(file.read_text(encoding='utf-8'))) or '').splitlines()[0]
  return {
    'title': title,
    'paper': (re.search(r'\d{4}\.\d{5}', title) or [''])[0],
    'family': family(resolved),
    'trained': trained - head,
    'stored': stored(net.deltas, variables, resolved['optim'], parts.groups),
    'head': head,
    'merges': not base.fixed(net.deltas),
    'flops': round(with_delta / own - 1, 6),
  }


def family(resolved: Mapping) -> str:
  """FAMILY of the module that has the method, or the transform of a group; else 'rules'."""
  groups = resolved['optim']['groups'].values()
  specs = [*resolved['method'].values(), *(g['transform'] for g in groups if 'transform' in g)]
  if not specs:
    return 'rules'
  return build.family(specs[0]['fn'])


def stored(deltas, variables: Mapping, optim: Mapping, groups: Mapping) -> int:
  """Numbers of 32 bits that a bundle holds of the encoder: see `efft.compact`."""
  shares = {group: change.share for group, change in transform.build(optim).items()}
  delta = jax.eval_shape(lambda delta: base.pack(deltas, delta), variables.get('delta', {}))
  flat = tree.flatten({**variables, 'delta': delta})
  total = 0
  for path, x in flat.items():
    if path.startswith('params/head/') or not (path in groups or path.startswith('delta/')):
      continue
    # An index beside each value, where that is shorter.
    share = min(1.0, 2 * shares.get(groups.get(path), 1.0))
    total += share * compact.nbytes(x) / 4
  return round(total)


def flops(fn, variables: Mapping) -> int:
  """Operations of a forward pass over one text, see `efft.programs`."""
  ids = jax.ShapeDtypeStruct((1, TOKENS), jnp.int32)
  mask = jax.ShapeDtypeStruct((1, TOKENS), jnp.bool_)
  return programs.flops(fn, variables, ids, mask)


def describe_all() -> dict[str, dict]:
  """{config name: entry} of all configs of one stage that come with efft."""
  found = sorted(file for folder in configs.folders()[1:] for file in folder.glob('*.py'))
  single = [file for file in found if not configs.load(f'{file}:task=sst2').stages]
  return {file.stem: describe(file) for file in single}


def main():
  files.write_json(FILE, describe_all())


if __name__ == '__main__':
  main()
