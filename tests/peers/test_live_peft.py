"""Adapters between efft and HF PEFT, both ways. For the lane that has torch: `make peers`."""

import sys
from pathlib import Path

import jax
import numpy as np
import peft as library
import pytest
import safetensors.torch
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_peft_format import NATIVE, logits, native, written

from efft.interop import peft_format
from efft.models import hub

FIXTURES = Path(__file__).parents[1] / 'fixtures'
BASES = {
  'bert': FIXTURES / 'base' / 'bert',
  'roberta': FIXTURES / 'base' / 'roberta',
  'distilbert': FIXTURES / 'distilbert',
}
QV = ['query', 'value']
RNG = np.random.default_rng(0)


def config(kind, targets=QV, **options):
  make = getattr(library, f'{kind}Config')
  if targets:
    options['target_modules'] = targets
  return lambda: make(task_type='SEQ_CLS', **options)


def prompt(kind, **options):
  return config(kind, None, num_virtual_tokens=3, **options)


LAYER_1 = '.*layer.1.*(query|value)'
CONFIGS = {
  'lora': config('Lora', r=4, lora_alpha=6, lora_dropout=0.1),
  'lora all-linear': config('Lora', 'all-linear', r=3),
  'lora regex': config('Lora', LAYER_1, exclude_modules=['value'], use_rslora=True),
  'lora layers': config('Lora', layers_to_transform=1, layers_pattern='layer'),
  'lora patterns': config(
    'Lora', ['query', 'dense'], rank_pattern={'dense': 2, '0.attention.self.query': 3},
    alpha_pattern={r'layer.\d.output.dense': 5, 'query': 24},
  ),
  'lora saved': config('Lora', modules_to_save=['classifier', 'pooler', 'LayerNorm']),
  'lora bias': config('Lora', r=2, bias='lora_only', lora_bias=True),
  'lora bias all': config('Lora', r=2, bias='all'),
  'lora all and saved': config('Lora', bias='all', modules_to_save=['classifier', 'pooler']),
  'lora words': config('Lora', ['query', 'word_embeddings'], rank_pattern={'word_embeddings': 3}),
  'lora tokens': config('Lora', trainable_token_indices={'word_embeddings': [9, 5]}),
  'dora patterns': config('Lora', use_dora=True, rank_pattern={'query': 2}, use_rslora=True),
  'pissa': config('Lora', init_lora_weights='pissa', r=3, use_rslora=True),
  'olora': config('Lora', init_lora_weights='olora', r=3, lora_alpha=6, bias='lora_only'),
  'orthogonal': config('Lora', init_lora_weights='orthogonal', r=4),
  'adalora': config('AdaLora', init_r=4, target_r=2, total_step=5),
  'ia3': config('IA3', ['key', 'value', 'output.dense'], feedforward_modules=['output.dense']),
  'ia3 some': config(
    'IA3', '.*(1.attention.self.value|0.output.dense)', feedforward_modules='.*output.dense'
  ),
  'vera': config('Vera', ['query', 'intermediate.dense', 'output.dense'], r=5),
  'vera seed': config(
    'Vera', ['query', 'intermediate.dense'], r=70, save_projection=False, projection_prng_key=7
  ),
  'vera bias': config('Vera', r=5, bias='vera_only'),
  'norms': config('LNTuning', ['LayerNorm']),
  'some norms': config('LNTuning', r'.*1.output.LayerNorm'),
  'beft': config('Beft', ['value', 'dense']),
  'loha': config('LoHa', ['query', 'dense'], r=3, rank_pattern={'query': 2}, alpha=5),
  'lokr': config('LoKr', ['query', 'dense'], r=2, decompose_both=True, alpha_pattern={'query': 3}),
  'oft': config('OFT', ['query', 'output.dense'], oft_block_size=16, use_cayley_neumann=False),
  'oft count': config('OFT', ['query', 'output.dense'], r=4, oft_block_size=0),
  'oft shared': config('OFT', oft_block_size=8, block_share=True, num_cayley_neumann_terms=6),
  'boft': config('BOFT', boft_block_size=4, bias='boft_only'),
  'boft count': config('BOFT', ['query', 'output.dense'], boft_block_size=0, boft_block_num=4),
  'hra': config('HRA', ['query', 'dense'], r=4, bias='all'),
  'road 1': config('Road', group_size=8),
  'road 2': config('Road', ['query', 'dense'], variant='road_2', group_size=4),
  'road 4': config('Road', variant='road_4', group_size=8),
  'miss': config('Miss', ['query', 'output.dense'], r=5),
  'miss mini': config('Miss', r=4, mini_r=8, init_weights='mini', bias='all'),
  'vblora': config('VBLoRA', ['query', 'output.dense'], r=2, num_vectors=9, vector_length=8),
  'vblora best': config(
    'VBLoRA', r=2, num_vectors=9, vector_length=8, topk=3, save_only_topk_weights=True
  ),
  'randlora': config('RandLora', ['query', 'output.dense', 'intermediate.dense'], r=5),
  'randlora sparse': config('RandLora', r=4, very_sparse=True, randlora_alpha=32),
  'delora': config('Delora', r=4, rank_pattern={'query': 2}, lambda_pattern={'value': 3}),
  'shira': config('Shira', ['query', 'intermediate.dense'], r=2),
  'fourierft': config(
    'FourierFT', ['query', 'dense'], n_frequency=30, n_frequency_pattern={'query': 12},
    random_loc_seed=3, scaling=40.0,
  ),
  'c3a': config('C3A', ['query', 'output.dense'], block_size=8, block_size_pattern={'query': 16}),
  'prompt': prompt('PromptTuning'),
  'ptuning': prompt('PromptEncoder', encoder_hidden_size=8),
  'prefix': prompt('PrefixTuning'),
  'prefix network': prompt('PrefixTuning', prefix_projection=True, encoder_hidden_size=8),
}  # fmt: skip
DISTILBERT = {
  'lora': config('Lora', ['q_lin', 'v_lin', 'lin1'], r=4, bias='all'),
  'ia3': config('IA3', ['k_lin', 'v_lin', 'lin2'], feedforward_modules=['lin2']),
  'norms': config('LNTuning', ['sa_layer_norm', 'output_layer_norm']),
  'oft': config('OFT', ['q_lin', 'lin2'], oft_block_size=8),
  'prompt': prompt('PromptTuning', token_dim=32, num_layers=2, num_attention_heads=4),
}
CASES = [
  *(('bert', name, make) for name, make in CONFIGS.items()),
  *(('roberta', n, m) for n, m in CONFIGS.items() if 'prefix' not in n and 'saved' not in n),
  *(('distilbert', name, make) for name, make in DISTILBERT.items()),
]


def plain(architecture):
  transformers.set_seed(0)
  auto = transformers.AutoModelForSequenceClassification
  return auto.from_pretrained(BASES[architecture], num_labels=3).eval()


def moved(model):
  """Trained by chance: every number that trains is somewhere else."""
  generator = torch.Generator().manual_seed(1)
  with torch.no_grad():
    for name, x in model.named_parameters():
      if x.requires_grad:
        spread = 0.02 if 'ranknum' in name else 0.1
        x += spread * torch.randn(x.shape, generator=generator)
  return model.eval()


def scores(model, batch):
  ids, mask, types = (torch.tensor(np.asarray(x)).long() for x in batch)
  more = {'token_type_ids': types} if model.config.model_type == 'bert' else {}
  with torch.no_grad():
    return model(input_ids=ids, attention_mask=mask, **more).logits.numpy()


def batch():
  ids = RNG.integers(5, 40, (3, 8)).astype(np.int32)
  ids[1, 5:] = 1
  ids[0, 2:4] = 5, 9
  mask = np.arange(8) < np.array([[8], [5], [8]])
  types = (np.arange(8) > 4).astype(np.int32) * np.ones((3, 1), np.int32)
  return ids, mask, types


@pytest.mark.parametrize(
  ('architecture', 'make'), [(a, m) for a, _, m in CASES], ids=[f'{a}-{n}' for a, n, _ in CASES]
)
def test_both_libraries_compute_the_same(architecture, make, tmp_path):
  model = moved(library.get_peft_model(plain(architecture), make()))
  data = batch()
  if architecture != 'bert':
    data = (data[0], data[1], data[2] * 0)
  expected = scores(model, data)
  model.save_pretrained(tmp_path / 'theirs')
  labels = peft_format.num_labels(tmp_path / 'theirs')
  base = hub.load(str(BASES[architecture]), num_labels=labels, head='new', key=jax.random.key(0))
  adapter = peft_format.read(tmp_path / 'theirs', base)
  np.testing.assert_allclose(logits(adapter, base, data), expected, rtol=0, atol=1e-5)
  ours = written(adapter, base, tmp_path / 'ours')
  again = library.PeftModel.from_pretrained(plain(architecture), ours)
  np.testing.assert_allclose(scores(again.eval(), data), expected, rtol=0, atol=1e-5)
  assert np.abs(scores(plain(architecture), data) - expected).max() > 1e-3


@pytest.mark.parametrize(('kind', 'method', 'also', 'frozen'), NATIVE)
def test_the_library_computes_what_efft_trained(kind, method, also, frozen, tmp_path):
  base = hub.load(str(BASES['bert']), num_labels=3, head='new', key=jax.random.key(0))
  adapter = native(kind, method, base, also, frozen)
  data = batch()
  expected = logits(adapter, base, data)
  folder = written(adapter, base, tmp_path / 'ours')
  model = library.PeftModel.from_pretrained(plain('bert'), folder)
  np.testing.assert_allclose(scores(model.eval(), data), expected, rtol=0, atol=1e-5)


def test_old_files_of_pickles_and_names_are_read(tmp_path):
  """adapter_model.bin, the head by its wrapper's name, tensors with the adapter's."""
  model = moved(library.get_peft_model(plain('bert'), CONFIGS['lora']()))
  model.save_pretrained(tmp_path)
  file = tmp_path / 'adapter_model.safetensors'
  old = {}
  for name, x in safetensors.torch.load_file(file).items():
    name = name.replace('classifier.', 'classifier.modules_to_save.')
    old[name.replace('lora_A.', 'lora_A.default.')] = x
  torch.save(old, tmp_path / 'adapter_model.bin')
  place = str(BASES['bert'])
  base = hub.load(
    place, num_labels=peft_format.num_labels(tmp_path), head='new', key=jax.random.key(0)
  )
  new = peft_format.read(tmp_path, base)
  file.unlink()
  again = peft_format.read(tmp_path, base)
  assert new.leaves.keys() == again.leaves.keys()
  assert all(np.array_equal(x, again.leaves[path]) for path, x in new.leaves.items())
