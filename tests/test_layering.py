"""The import direction: a part imports only what stands below it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import efft

ROOT = Path(efft.__file__).parent
# From the bottom up. Parts of one row know nothing of each other.
LAYERS = (
  {'errors', 'cpu', 'formats', 'qtensor'},
  {'files', 'tree', 'fields', 'functions', 'compact', 'arithmetic', 'programs'},
  {'config', 'data', 'progress', 'trackers', 'quantize', 'report'},
  {'alike'},
  {'models', 'mesh', 'checkpoint', 'bundle'},
  {'peft'},
  {'training', 'transfer', 'interop', 'compress'},
  {'starting'},
  {'eval', 'assemble'},
  {'environment', 'catalogue', 'agreement'},
  {'classifier', 'combining'},
  {'teacher'},
  {'finetune'},
  {'merging', 'population'},
  {'exchange', 'pipeline'},
  {'bench'},
  {'sweep'},
  {'run'},
  {'demo'},
  {'command', 'verbs'},
  {'main'},
  {'__main__'},
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
MODULES = sorted(ROOT.rglob('*.py'))
# Imported before a verb is known, or by processes that prepare data: jax would cost seconds there.
WITHOUT_JAX = (
  'errors',
  'cpu',
  'files',
  'fields',
  'formats',
  'qtensor',
  'functions',
  'compact',
  'config',
  'alike',
  'data',
  'report',
  'sweep',
  'command',
  'verbs',
  'main',
)


def part_of(file: Path) -> str:
  return file.relative_to(ROOT).with_suffix('').parts[0]


def imports(file: Path, lazy: bool) -> set[str]:
  """Modules that a file imports, as dotted names; `lazy`: those inside functions too."""
  tree = ast.parse(file.read_text(encoding='utf-8'))
  names = set()
  for node in ast.walk(tree) if lazy else tree.body:
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file}:{node.lineno}: write imports in full'
      names |= {f'{node.module}.{alias.name}' for alias in node.names}
  return names


@pytest.mark.parametrize('file', MODULES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_only_from_below(file):
  part = part_of(file)
  if part == '__init__':
    return  # the public names, imported on first use
  assert part in RANK, f'{part} has no place in LAYERS'
  for name in imports(file, lazy=True):
    package, _, rest = name.partition('.')
    target = rest.split('.')[0]
    if package == 'efft' and target in RANK:
      below = target == part or RANK[target] < RANK[part]
      assert below, f'{file.relative_to(ROOT)} imports {name}, which does not stand below {part}'


@pytest.mark.parametrize('file', [f for f in MODULES if part_of(f) in WITHOUT_JAX], ids=str)
def test_no_jax_at_import(file):
  heavy = {name for name in imports(file, lazy=False) if name.split('.')[0] in ('jax', 'flax')}
  assert not heavy, f'{file} imports {heavy}'


def test_command_line_imports_nothing_heavy():
  code = 'import sys, efft.main, efft.config; print(*sys.modules)'
  loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  heavy = {'jax', 'flax', 'transformers', 'datasets', 'sklearn', 'numpy', 'rich'}
  assert not heavy & set(loaded.stdout.split())


def test_core_names_no_method():
  """A method that the model or the loop knows by name is a seam that failed."""
  names = ('lora', 'ia3', 'houlsby', 'pfeiffer', 'bitfit', 'fish', 'snip', 'galore', 'pafi')
  for file in MODULES:
    if part_of(file) in ('models', 'training', 'tree', 'checkpoint', 'mesh', 'eval'):
      text = file.read_text(encoding='utf-8').lower()
      assert not [name for name in names if name in text], file
