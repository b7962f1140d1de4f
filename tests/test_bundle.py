"""Bundles: what goes in comes out, and what was damaged or changed is refused in words."""

import json
import subprocess
import sys

import disk
import numpy as np
import pytest

from efft import bundle, environment, files
from efft.errors import Diverged, EnvironmentProblem, InputError


def make(**changes):
  fields = {
    'leaves': {
      'params/head/out/kernel': np.arange(6, dtype=np.float64).reshape(3, 2),
      'delta/layer_0/attention/query/lora/a': np.full((2, 3), 0.1, np.float16).T,
      'params/scalar': np.float32(1.5),
    },
    'tokenizer': '{"model": "Zürich"}',
    'encoder': {'architecture': 'bert', 'heads': [2, 2], 'eps': 1e-12},
    'method': {'lora': {'fn': 'lora.lora', 'rank': 8}},
    'rules': (('delta/.*', 'delta'), ('.*', 'frozen')),
    'labels': ('bad', 'gu\nt|"'),
    'kind': 'single',
    'max_length': 128,
    'dtype': 'float32',
    'pooling': 'cls',
    'columns': {'text': 'text', 'label': 'label'},
    'base': {'name': 'tiny', 'path': '/models/tiny', 'sha256': 'ab' * 32},
    'needs_base': True,
    'metrics': {'accuracy': 0.1 + 0.2, 'matthews': float('nan')},
    'versions': {'jax': '0.10.2'},
  }
  return bundle.Bundle(**fields | changes)


@pytest.fixture
def saved(tmp_path):
  bundle.save(tmp_path / 'bundle', make())
  return tmp_path / 'bundle'


def test_what_goes_in_comes_out(saved):
  made, found = make(), bundle.load(saved)
  assert list(found.leaves) == sorted(made.leaves)
  for path, leaf in found.leaves.items():
    assert leaf.dtype == np.float32
    np.testing.assert_array_equal(leaf, np.asarray(made.leaves[path], np.float32))
  assert found.metrics == {'accuracy': 0.1 + 0.2, 'matthews': None}
  for name in set(vars(made)) - {'leaves', 'metrics'}:
    assert getattr(found, name) == getattr(made, name), name
  assert sorted(p.name for p in saved.iterdir()) == [
    'bundle.json',
    'tokenizer.json',
    'weights.safetensors',
  ]
  assert {oct(p.stat().st_mode & 0o777) for p in saved.iterdir()} == {oct(0o666 & ~_umask())}


def _umask():
  import os

  mask = os.umask(0)
  os.umask(mask)
  return mask


def test_a_bundle_is_replaced_whole(saved):
  bundle.save(saved, make(labels=('a', 'b')))
  assert bundle.load(saved).labels == ('a', 'b')
  assert [p.name for p in saved.parent.iterdir()] == ['bundle']


NAMES = ('bundle.json', 'tokenizer.json', 'weights.safetensors')


@pytest.mark.parametrize('name', NAMES)
def test_every_flipped_bit_and_every_truncation_is_refused(saved, name):
  path = saved / name
  good = path.read_bytes()
  rng = np.random.default_rng(0)
  harmless = 0
  for at in rng.integers(0, len(good), 60):
    data = bytearray(good)
    data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
      found = bundle.load(saved)
    except InputError as error:
      assert name in str(error) or 'version' in str(error)
    else:  # white space between the words of bundle.json
      harmless += 1
      assert name == 'bundle.json' and found.metrics == {'accuracy': 0.1 + 0.2, 'matthews': None}
  assert harmless < 20
  for size in 0, 1, len(good) // 2, len(good) - 2:
    path.write_bytes(good[:size])
    with pytest.raises(InputError, match=name):
      bundle.load(saved)
  path.unlink()
  with pytest.raises(InputError, match=name):
    bundle.load(saved)


def rewrite(folder, change):
  """Edits bundle.json and seals it anew, as a careful hand would."""
  about = json.loads((folder / 'bundle.json').read_text())
  del about['digest']
  change(about)
  files.write_json(folder / 'bundle.json', about | {'digest': bundle._digest(about)})


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda about: about.update(version=1), 'found bundle version 1, expected version 3'),
    (lambda about: about.pop('version'), 'found bundle version None'),
    (lambda about: about.pop('labels'), 'lacks labels'),
    (lambda about: about['files'].pop('tokenizer.json'), 'lists no tokenizer.json'),
    (lambda about: about['leaves'].pop('params/scalar'), 'differ in params/scalar'),
    (lambda about: about['leaves'].update({'params/scalar': [1]}), 'differ in params/scalar'),
  ],
)
def test_what_a_bundle_says_must_be_whole_and_true(saved, change, words):
  rewrite(saved, change)
  with pytest.raises(InputError, match=words) as error:
    bundle.load(saved)
  assert error.value.exit_code == 2 and '\n' not in str(error.value)


def test_what_is_no_bundle_is_said(tmp_path):
  with pytest.raises(InputError, match='no readable bundle.json'):
    bundle.load(tmp_path / 'nothing')
  (tmp_path / 'bundle.json').write_text('[]')
  with pytest.raises(InputError, match='not a JSON object'):
    bundle.load(tmp_path)


def test_a_changed_base_is_refused_with_both_hashes():
  bundle.check_base(make(), 'ab' * 32)
  with pytest.raises(InputError) as error:
    bundle.check_base(make(), 'cd' * 32)
  assert 'ab' * 32 in str(error.value) and 'cd' * 32 in str(error.value)
  bundle.check_base(make(needs_base=False), 'cd' * 32)


def test_a_failed_save_leaves_what_was_there(saved):
  before = files.digests(saved)
  with pytest.raises(Diverged, match='params/x is not finite'):
    bundle.save(saved, make(leaves={'params/x': np.array([np.nan])}))
  with disk.full(10_000):
    with pytest.raises(EnvironmentProblem, match='bundle: cannot write: File too large'):
      bundle.save(saved, make(leaves={'params/x': np.zeros(9000)}))
  assert files.digests(saved) == before and [p.name for p in saved.parent.iterdir()] == ['bundle']


def test_the_card_shows_labels_metrics_machine_and_the_command(saved):
  text = bundle.card(
    bundle.read_about(saved),
    title='run',
    machine={'cpu': 'Xeon | 2'},
    command='efft predict --run=runs/lora',
  )
  for line in (
    '| 1 | gu t\\|" |',
    '| accuracy | 0.3000 |',
    '| matthews | not finite |',
    '| cpu | Xeon \\| 2 |',
    '    efft predict --run=runs/lora',
  ):
    assert line in text.splitlines()
  assert 'lora on `tiny`' in text and 'needs its base model' in text


def test_reading_a_bundle_imports_no_jax():
  code = 'import sys, efft.bundle; sys.exit("jax" in sys.modules)'
  assert subprocess.run([sys.executable, '-c', code]).returncode == 0


def test_the_environment_is_described():
  about = environment.describe()
  assert about['versions']['jax'] and about['devices'].startswith('8 x ') and about['cores'] > 0
  json.dumps(about)
