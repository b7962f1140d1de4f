"""What HF PEFT 0.21 or AdapterHub 1.3 get wrong on encoders, or refuse, done right here.

Weighted sums of adapters with their heads are in test_combining.py; IA3 and DoRA that merge to the
same outputs in the contract table, test_methods.py.
"""

import re
import shutil

import jax
import numpy as np
import peer_files
import pytest
from moved import base, start, trained
from safetensors.numpy import load_file

from efft import bundle, exchange, merging, transfer, tree
from efft.classifier import Classifier
from efft.errors import InputError
from efft.interop import peft_format
from efft.models.encoder import Encoder
from efft.models.layers import Hooks
from efft.peft import base as peft

FIXTURES = peer_files.FIXTURES
TEXTS = ['a gorgeous, witty movie', 'a waste of time', 'boring']


@pytest.mark.parametrize(
  'method',
  [
    'ia3', 'vera', 'fourierft', 'oft', 'boft', 'loha', 'lokr', 'vblora', 'hra', 'miss', 'shira',
    'c3a', 'road', 'randlora', 'delora', 'beft',
  ],
)  # fmt: skip
def test_merging_works_beside_robertas_head(method, tmp_path):
  """PEFT: AttributeError, 'RobertaClassificationHead' object has no attribute 'weight'."""
  options = {'vblora': {'vector_length': 8}, 'road': {'group_size': 8}}.get(method)
  run = trained(tmp_path / 'run', method, 1, options, architecture='roberta', move=0.02)
  content = bundle.load(run)
  whole = merging.merged(content)
  before, after = (Classifier.of(b, run).logits(TEXTS) for b in (content, whole))
  np.testing.assert_allclose(after, before, rtol=0, atol=1e-4)
  untrained = trained(tmp_path / 'head', 'head', 1, architecture='roberta', move=0.0)
  assert np.abs(Classifier.load(untrained).logits(TEXTS) - before).max() > 1e-3


def test_prefixes_of_roberta_are_attended_to():
  """PEFT itself crashes on them: TypeError, '<' not supported between 'tuple' and 'int'."""
  folder = FIXTURES / 'peft' / 'roberta' / 'prefix'
  model, peer = peer_files.encoder('roberta'), peer_files.read('peft', 'roberta', 'lora_default')
  tensors = load_file(folder / 'adapter_model.safetensors')
  cfg, rows = model.cfg, tensors['prompt_embeddings']
  args = tuple(peer.batch[name] for name in ('input_ids', 'mask', 'token_types'))
  # By hand: PEFT's layout of keys and values, and text that stands behind the prefix.
  pairs = rows.reshape(len(rows), cfg.layers, 2, cfg.heads[0], cfg.head_dim)

  def tap(module, site, y, **context):
    if site != 'kv':
      return y
    k, v, mask = y
    layer = int(module.path[0].removeprefix('layer_'))
    added = (np.broadcast_to(x, (len(k), *x.shape)) for x in pairs[:, layer].swapaxes(0, 1))
    k, v = (np.concatenate(pair, 1) for pair in zip(added, (k, v), strict=True))
    return k, v, np.concatenate([np.ones((len(mask), len(rows)), bool), mask], 1)

  adapter = peft_format.read(folder, model)
  head = {path: x for path, x in adapter.leaves.items() if path.startswith('params/')}
  params = tree.flatten({'params': model.params}) | head
  place = 'params/embed/position/embedding'
  params[place] = np.roll(params[place], -len(rows), 0)
  by_hand = Encoder(cfg, Hooks(tap=tap)).apply(tree.unflatten(params), *args)

  deltas = peft.build(adapter.method)
  values = transfer.restored(deltas, adapter.leaves, model.params)
  net = Encoder(cfg, Hooks(tap=peft.attach(deltas)))
  found = net.apply({**values, 'delta': peft.expand(deltas, values['delta'])}, *args)
  np.testing.assert_allclose(found, by_hand, rtol=0, atol=1e-5)
  plain = Encoder(cfg).apply({'params': values['params']}, *args)
  assert np.abs(found - plain).max() > 1e-3


@pytest.mark.parametrize('architecture', ['roberta', 'distilbert'])
@pytest.mark.parametrize('method', ['prefix', 'prefix_mlp', 'prompt', 'ptuning', 'direft'])
def test_runs_of_any_encoder_come_back_from_their_folder(architecture, method, tmp_path):
  """PEFT: no prefixes on RoBERTa and DistilBERT. AdapterHub: a DiReFT that is read again is
  another one, because what tells it from LoReFT is not written."""
  run = trained(tmp_path / 'run', method, 1, architecture=architecture)
  content = bundle.load(run)
  net, values, _ = start(method, '{}', architecture=architecture)
  direct = tree.unflatten({**tree.flatten(values), **content.leaves})
  model = Classifier.load(run)
  rows = np.random.default_rng(0).integers(1, 60, (3, 9)).astype(np.int32)
  batch = {'input_ids': rows, 'mask': rows > 0, 'token_types': np.zeros_like(rows)}
  np.testing.assert_array_equal(
    model.apply(model.variables, batch), jax.jit(net.logits)(direct, batch)
  )


@pytest.mark.parametrize('method', ['prefix_mlp', 'ptuning'])
def test_prompts_are_trained_on_with_their_network(method, tmp_path):
  """PEFT: 'Cannot set a prompt learning adapter to trainable', and the network is not saved."""
  run = trained(tmp_path / 'run', method, 1)
  net, values, resolved = start(method, '{}')
  groups = tree.labels(values, resolved['rules'])
  trains = {path: group for path, group in groups.items() if group != 'frozen'}
  inherited = transfer.inherit(
    values, [run], method=resolved['method'], params=base().params, sha256=base().sha256,
    trains=trains, head=('no', 'maybe', 'yes'), pooling='cls',
  )  # fmt: skip
  found, kept = tree.flatten(inherited), bundle.load(run).leaves
  assert any(re.search('shared_|mlp_', path) for path in kept), 'the network is in it'
  for path, x in kept.items():
    np.testing.assert_array_equal(found[path], x)


def test_a_head_that_was_not_saved_is_an_error(tmp_path):
  """PEFT, with no task_type: the head is neither trained nor saved, and nobody says so."""
  folder = tmp_path / 'adapter'
  shutil.copytree(FIXTURES / 'peft' / 'bert' / 'lora_no_task_type', folder)
  with pytest.raises(InputError, match='without its classification head.*task_type'):
    exchange.import_adapter(folder, str(FIXTURES / 'base' / 'bert'), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
