"""Adapters between efft and AdapterHub itself, both ways. For the lane of it: `make peers`."""

import io
import sys
from pathlib import Path

import adapters as library
import jax
import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_adapterhub_format import METHODS, logits, trained, written

from efft.interop import adapterhub_format, torch_file
from efft.models import hub

FIXTURES = Path(__file__).parents[1] / 'fixtures'
BASES = {
  'bert': FIXTURES / 'base' / 'bert',
  'roberta': FIXTURES / 'base' / 'roberta',
  'distilbert': FIXTURES / 'distilbert',
  'electra': FIXTURES / 'electra',
  'xlm-roberta': FIXTURES / 'xlm-roberta',
}


def seq(**options):
  return library.SeqBnConfig(**{'reduction_factor': 8, **options})


CONFIGS = {
  'seq_bn': lambda: seq(),
  'seq_bn inv': lambda: library.SeqBnInvConfig(reduction_factor=4, non_linearity='gelu'),
  'seq_bn sizes': lambda: seq(reduction_factor={'0': 4, 'default': 16}, leave_out=[]),
  'seq_bn left out': lambda: seq(leave_out=[0], non_linearity='gelu_new'),
  'seq_bn attention': lambda: seq(mh_adapter=True, output_adapter=False),
  'double_seq_bn': lambda: library.DoubleSeqBnConfig(reduction_factor=3.0),
  'par_bn': lambda: library.ParBnConfig(reduction_factor=4, scaling=1.5),
  'par_bn attention': lambda: library.ParBnConfig(mh_adapter=True, scaling='learned'),
  'compacter': lambda: library.CompacterConfig(reduction_factor=4, phm_rank=2, phm_dim=2),
  'compacter++': lambda: library.CompacterPlusPlusConfig(reduction_factor=2, learn_phm=False),
  'lora': lambda: library.LoRAConfig(r=4, alpha=10, dropout=0.1, attn_matrices=['q', 'k', 'v']),
  'lora ffn': lambda: library.LoRAConfig(
    r=2, selfattn_lora=False, intermediate_lora=True, output_lora=True, leave_out=[1]
  ),
  'dora': lambda: library.DoRAConfig(r=4, alpha=4, output_lora=True),
  'dora alpha': lambda: library.DoRAConfig(r=4, alpha=10),
  'vera': lambda: library.VeraConfig(r=4, alpha=6),
  'dvora': lambda: library.DvoRAConfig(r=4, alpha=6),
  'ia3': lambda: library.IA3Config(output_lora=True),
  'ia3 kv': lambda: library.IA3Config(intermediate_lora=False, leave_out=[0]),
  'prefix': lambda: library.PrefixTuningConfig(prefix_length=3, bottleneck_size=6, leave_out=[0]),
  'prefix flat': lambda: library.PrefixTuningConfig(prefix_length=3, flat=True),
  'prompt': lambda: library.PromptTuningConfig(prompt_length=3),
  'loreft': lambda: library.LoReftConfig(r=3),
  'loreft ends': lambda: library.LoReftConfig(r=2, suffix_positions=2, tied_weights=True),
  'noreft': lambda: library.NoReftConfig(r=2, layers=[1]),
  'noreft last': lambda: library.NoReftConfig(r=2, prefix_positions=0, suffix_positions=2),
  'mam': lambda: library.MAMConfig(library.PrefixTuningConfig(bottleneck_size=6)),
  'unipelt': lambda: library.UniPELTConfig(
    library.PrefixTuningConfig(prefix_length=4, bottleneck_size=6), seq(), library.LoRAConfig(r=4)
  ),
  'union': lambda: library.ConfigUnion(
    library.LoReftConfig(), library.LoRAConfig(), seq(), library.PrefixTuningConfig(flat=True)
  ),
}
# Their embeddings are projected, or the library cannot run it.
NOT = {('electra', 'seq_bn inv'), ('electra', 'prompt')}
SOME = (
  'seq_bn left out',
  'double_seq_bn',
  'lora',
  'dora alpha',
  'ia3',
  'prefix',
  'noreft',
  'prompt',
)
CASES = [
  (architecture, name)
  for architecture in BASES
  for name in (CONFIGS if architecture in ('bert', 'distilbert') else SOME)
  if (architecture, name) not in NOT
]
# With PyTorch's fused attention, the library's masks of these are wrong where there is padding.
EAGER = {'prompt', *(('distilbert', n) for n in ('prefix', 'prefix flat', 'mam', 'union'))}


def padded(architecture, name):
  """Whether texts of other lengths may be in the batch: gates average over the padding too."""
  return name != 'unipelt' and (architecture, name) != ('distilbert', 'prompt')


def plain(architecture, name=''):
  transformers.set_seed(0)
  auto = transformers.AutoModelForSequenceClassification
  eager = {name, (architecture, name)} & EAGER and padded(architecture, name)
  attention = 'eager' if eager else None  # the library's own choice
  model = auto.from_pretrained(BASES[architecture], num_labels=3, attn_implementation=attention)
  library.init(model)
  return model.eval()


def moved(model):
  """Trained by chance: adapters and head are somewhere else, the signs of LoReFT's excepted."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, x in model.named_parameters():
      head = 'classifier' in name
      if (head or 'mytask' in name or 'fusion' in name) and 'parametrizations' not in name:
        x += 0.1 * torch.randn(x.shape, generator=generator)
      if 'weight.original' in name:
        x += 0.3 * torch.randn(x.shape, generator=generator).tril(-1) * (x == 0)
  return model.eval()


def scores(model, batch):
  ids, mask, types = (torch.tensor(np.asarray(x)).long() for x in batch)
  more = {'token_type_ids': types} if model.config.model_type in ('bert', 'electra') else {}
  with torch.no_grad():
    return model(input_ids=ids, attention_mask=mask, **more).logits.numpy()


def batch(architecture, name=''):
  ids = np.random.default_rng(0).integers(5, 40, (3, 8)).astype(np.int32)
  mask = np.arange(8) < np.array([[8], [5], [7]] if padded(architecture, name) else [[8]] * 3)
  pad = 1 if 'roberta' in architecture else 0
  ids = np.where(mask, ids, pad).astype(np.int32)
  types = (np.arange(8) > 4).astype(np.int32) * np.ones((3, 1), np.int32)
  return ids, mask, types * (architecture in ('bert', 'electra'))


def base_of(architecture):
  return hub.load(str(BASES[architecture]), num_labels=3, head='new', key=jax.random.key(0))


def close(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def loaded(model, folder, safe=True):
  name = model.load_adapter(str(folder), with_head=True, use_safetensors=safe)
  model.set_active_adapters(name)
  return model.eval()


@pytest.mark.parametrize(('architecture', 'name'), CASES)
def test_both_libraries_compute_the_same(architecture, name, tmp_path):
  model = plain(architecture, name)
  model.add_adapter('mytask', config=CONFIGS[name]())
  model.set_active_adapters('mytask')
  moved(model)
  data = batch(architecture, name)
  expected = scores(model, data)
  # Nothing but the library's default writes prefixes.
  model.save_adapter(str(tmp_path / 'theirs'), 'mytask', with_head=True)
  base = base_of(architecture)
  adapter = adapterhub_format.read(tmp_path / 'theirs', base)
  close(logits(adapter, base, data), expected)
  for layout in ('safetensors', 'bin'):
    ours = written(adapter, base, tmp_path / layout, layout=layout, name='again')
    again = loaded(plain(architecture, name), ours, layout == 'safetensors')
    close(scores(again, data), expected)
  again.set_active_adapters(None)
  assert np.abs(scores(again, data) - expected).max() > 1e-4


@pytest.mark.parametrize('name', METHODS)
@pytest.mark.parametrize('architecture', ['roberta', 'distilbert'])
def test_the_library_computes_what_efft_trained(architecture, name, tmp_path):
  base = base_of(architecture)
  adapter = trained(METHODS[name], base)
  unlike = {'prefix network': 'prefix', 'four': 'union'}  # of whose attention is the same
  like = unlike.get(name, name)
  data = batch(architecture, like)
  expected = logits(adapter, base, data)
  for layout in ('safetensors', 'bin'):
    ours = written(adapter, base, tmp_path / layout, layout=layout)
    back = adapterhub_format.read(ours, base)
    close(logits(back, base, data), expected)
    model = loaded(plain(architecture, like), ours, layout == 'safetensors')
    close(scores(model, data), expected)
  model.set_active_adapters(None)
  assert np.abs(scores(model, data) - expected).max() > 1e-4


def test_fusion_both_ways(tmp_path):
  """Of three adapters; the library's own, and efft's."""
  model = plain('bert')
  names = ['a', 'b', 'c']
  for name in names:
    model.add_adapter(name, config=seq())
  model.add_adapter_fusion(names)
  model.set_active_adapters(library.composition.Fuse(*names))
  with torch.no_grad():
    for name, x in model.named_parameters():
      if 'adapters.' in name or 'fusion' in name or 'classifier' in name:
        x += 0.1 * torch.randn(x.shape)
  data = batch('bert')
  expected = scores(model.eval(), data)
  model.save_all_adapters(str(tmp_path / 'theirs'), with_head=True)
  model.save_adapter_fusion(str(tmp_path / 'theirs'), library.composition.Fuse(*names))
  base = base_of('bert')
  adapter = adapterhub_format.read(tmp_path / 'theirs', base)
  close(logits(adapter, base, data), expected)
  ours = written(adapter, base, tmp_path / 'ours', layout='bin', name='x')
  again = plain('bert')
  for k in range(3):
    again.load_adapter(str(ours / f'x_{k}'), with_head=True)
  again.load_adapter_fusion(str(ours), set_active=True)
  close(scores(again.eval(), data), expected)
  assert again.active_adapters is not None


@pytest.mark.parametrize('architecture', ['bert', 'roberta', 'distilbert', 'electra'])
@pytest.mark.parametrize('kind', ['flexible', 'multi'])
def test_flexible_heads(architecture, kind, tmp_path):
  transformers.set_seed(0)
  model = library.AutoAdapterModel.from_pretrained(BASES[architecture])
  model.add_adapter('mytask', config=seq())
  labels = {0: 'no', 1: 'maybe', 2: 'yes'}
  act = {'distilbert': 'relu', 'electra': 'gelu'}.get(architecture, 'tanh')
  add = model.add_classification_head
  add('mytask', num_labels=3, id2label=labels, activation_function=act, multilabel=kind == 'multi')
  model.set_active_adapters('mytask')
  moved(model.eval())
  data = batch(architecture)
  expected = scores(model, data)
  model.save_adapter(str(tmp_path / 'theirs'), 'mytask', with_head=True)
  base = base_of(architecture)
  adapter = adapterhub_format.read(tmp_path / 'theirs', base)
  assert adapter.labels == ('no', 'maybe', 'yes')
  assert adapter.kind == (None if kind == 'flexible' else 'multi')
  close(logits(adapter, base, data), expected)
  ours = written(adapter, base, tmp_path / 'ours', layout='bin', name='x')
  again = library.AutoAdapterModel.from_pretrained(BASES[architecture])
  again.load_adapter(str(ours), with_head=True, set_active=True)
  close(scores(again.eval(), data), expected)


def test_torch_reads_what_is_written():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, 5)).astype(np.float32)
  tensors = {'x': x, 'again': x, 'turned': x.T, 'half': x.astype(np.float16), 'long': np.arange(3)}
  tensors |= {'scalar': np.float32(3).reshape(()), 'empty': np.zeros((0, 2), np.float32)}
  found = torch.load(io.BytesIO(torch_file.write(tensors)), weights_only=True)
  assert list(found) == list(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(found[name].numpy(), value)
  assert found['x'].data_ptr() == found['again'].data_ptr()
