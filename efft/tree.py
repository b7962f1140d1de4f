"""Nested dictionaries of arrays, addressed by paths such as 'params/layer_0/mlp/up/kernel'.

Masks, optimiser groups, checkpoints and conversions all speak of leaves by path; this module
is the only place that knows how a path and a tree relate.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from efft.errors import InputError
from efft.qtensor import QTensor

Rules = Sequence[tuple[str, str]]


def flatten(tree: Mapping, prefix: str = '') -> dict:
  """{'a': {'b': x}} -> {'a/b': x}, in the tree's own order; anything not a dict is a leaf."""
  flat = {}
  for key, value in tree.items():
    path = f'{prefix}{key}'
    flat.update(flatten(value, path + '/') if isinstance(value, Mapping) else {path: value})
  return flat


def unflatten(flat: Mapping) -> dict:
  """The inverse of `flatten` (empty dictionaries excepted, which have no path)."""
  tree = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
      if not isinstance(node, dict):
        raise ValueError(f'{path} lies below a leaf')
    if name in node:
      raise ValueError(f'{path} is a leaf and has leaves below it')
    node[name] = leaf
  return tree


def split(tree: Mapping, keep: Callable[[str], bool]) -> tuple[dict, dict]:
  """Cuts a tree in two by path: (leaves where `keep(path)`, the rest)."""
  flat = flatten(tree)
  kept = {path: x for path, x in flat.items() if keep(path)}
  return unflatten(kept), unflatten({p: x for p, x in flat.items() if p not in kept})


def join(*trees: Mapping) -> dict:
  """Puts trees with disjoint paths together again; the inverse of `split`."""
  joined = {}
  for tree in trees:
    for path, leaf in flatten(tree).items():
      if path in joined:
        raise ValueError(f'{path} is in more than one of the trees')
      joined[path] = leaf
  return unflatten(joined)


def map_paths(fn: Callable, tree: Mapping) -> dict:
  """Applies `fn(path, leaf)` to every leaf."""
  return unflatten({path: fn(path, leaf) for path, leaf in flatten(tree).items()})


def labels(
  tree: Mapping, rules: Rules, where: str = 'config.rules', default: str | None = None
) -> dict[str, str]:
  """Assigns each path of `tree` the group of the first rule whose regex matches all of it.

  Args:
    tree: the variables, {'params': ..., 'delta': ...}.
    rules: ordered (path regex, group) pairs.
    where: how errors name the rules.
    default: the group of paths that no rule covers; None: there must not be any.

  Returns:
    {path: group}, covering every path.

  Raises:
    InputError: a path that no rule covers, a rule that is first for no path, a broken regex.
  """
  try:
    compiled = [(re.compile(pattern), group) for pattern, group in rules]
  except re.error as error:
    raise InputError(
      where, f'{error.pattern!r} ({error})', 'regular expressions', 'mend the pattern'
    ) from None
  groups, used = {}, set()
  for path in flatten(tree):
    index = next((i for i, (p, _) in enumerate(compiled) if p.fullmatch(path)), None)
    if index is None:
      if default is not None:
        groups[path] = default
      continue
    groups[path] = compiled[index][1]
    used.add(index)
  uncovered = [path for path in flatten(tree) if path not in groups]
  if uncovered:
    raise InputError(
      where,
      f'no rule for {_some(uncovered)}',
      'every parameter covered',
      "end the list with ('.*', 'frozen')",
    )
  unused = [repr(rules[i][0]) for i in range(len(rules)) if i not in used]
  if unused:
    raise InputError(
      where,
      f'{_some(unused)} matching no parameter that an earlier rule has not taken',
      'every rule to match',
      f'remove it or correct it; paths look like {_some(list(groups), 4)}',
    )
  return groups


def count(tree: Mapping) -> int:
  """Number of parameters (elements, not leaves)."""
  leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, QTensor))
  return sum(int(np.prod(np.shape(x), dtype=np.int64)) for x in leaves)


def nbytes(tree: Mapping) -> int:
  """Bytes that the leaves occupy in their own types."""
  return sum(
    int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize
    for x in jax.tree.leaves(tree)
  )


def diff(expected: Mapping, found: Mapping) -> str:
  """Compares two trees by path and shape; empty where they agree.

  Lines begin with '-' (missing), '+' (unexpected) or '!' (another shape), sorted by path.
  """
  want, got = ({p: tuple(x.shape) for p, x in flatten(t).items()} for t in (expected, found))
  lines = []
  for path in sorted(want.keys() | got.keys()):
    if path not in got:
      lines.append(f'- {path} {list(want[path])}')
    elif path not in want:
      lines.append(f'+ {path} {list(got[path])}')
    elif want[path] != got[path]:
      lines.append(f'! {path} {list(got[path])}, expected {list(want[path])}')
  return '\n'.join(lines)


def _some(names: Sequence[str], most: int = 8) -> str:
  more = f' and {len(names) - most} more' if len(names) > most else ''
  return ', '.join(names[:most]) + more
