"""Laws of trees and paths, and what the rules say when they do not fit."""

import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efft import tree
from efft.errors import InputError

quick = settings(max_examples=60, deadline=None)

KEYS = st.text('abc_01', min_size=1, max_size=3)
TREES = st.recursive(
  st.integers(), lambda node: st.dictionaries(KEYS, node, min_size=1, max_size=4), max_leaves=12
).filter(lambda t: isinstance(t, dict))
RULES = st.lists(
  st.tuples(st.sampled_from(['a.*', 'b/.*', '.*/a', '[ab]', '.*_.*', 'c']), st.sampled_from('xyz')),
  max_size=4,
)


@quick
@given(TREES)
def test_unflatten_inverts_flatten(t):
  flat = tree.flatten(t)
  assert tree.unflatten(flat) == t
  assert not any(isinstance(leaf, dict) for leaf in flat.values())
  assert len(flat) == len(jax.tree.leaves(t))


@quick
@given(TREES, st.sets(KEYS))
def test_join_inverts_split(t, letters):
  kept, rest = tree.split(t, lambda path: path.split('/')[-1] in letters)
  assert tree.join(kept, rest) == tree.join(rest, kept) == t
  assert not tree.flatten(kept).keys() & tree.flatten(rest).keys()
  assert all(path.split('/')[-1] in letters for path in tree.flatten(kept))


@quick
@given(TREES)
def test_join_refuses_a_path_twice(t):
  path = next(iter(tree.flatten(t)))
  with pytest.raises(ValueError, match=re.escape(path)):
    tree.join(t, tree.unflatten({path: 0}))


@quick
@given(TREES)
def test_map_paths_sees_every_leaf_by_its_path(t):
  assert tree.flatten(tree.map_paths(lambda path, x: (path, x), t)) == {
    path: (path, x) for path, x in tree.flatten(t).items()
  }


@quick
@given(TREES, RULES)
def test_labels_are_those_of_the_first_rule(t, rules):
  rules = [*rules, ('.*', 'rest')]
  first = {
    path: next(i for i, (pattern, _) in enumerate(rules) if re.fullmatch(pattern, path))
    for path in tree.flatten(t)
  }
  if set(first.values()) == set(range(len(rules))):
    assert tree.labels(t, rules) == {path: rules[i][1] for path, i in first.items()}
  else:
    with pytest.raises(InputError, match='matching no parameter'):
      tree.labels(t, rules)


T = {'params': {'head': {'kernel': 1, 'bias': 2}, 'layer_0': {'bias': 3}}}


def test_labels_match_whole_paths():
  rules = (('params/head', 'head'), ('.*', 'frozen'))
  with pytest.raises(InputError) as error:
    tree.labels(T, rules)
  assert "'params/head'" in str(error.value) and 'params/head/kernel' in str(error.value)


def test_labels_name_what_no_rule_covers():
  with pytest.raises(InputError) as error:
    tree.labels(T, (('.*/bias', 'bias'),))
  assert 'no rule for params/head/kernel' in str(error.value)


def test_labels_name_the_rule_that_an_earlier_one_hides():
  with pytest.raises(InputError) as error:
    tree.labels(T, (('.*', 'all'), ('.*/bias', 'bias')))
  assert "'.*/bias'" in error.value.found


def test_labels_name_a_broken_pattern():
  with pytest.raises(InputError) as error:
    tree.labels(T, (('params/(', 'x'),), where='the rules')
  assert str(error.value).startswith("the rules: found 'params/('")


def test_long_lists_are_cut():
  with pytest.raises(InputError, match='and 92 more'):
    tree.labels({f'p{i}': i for i in range(100)}, ())


def test_count_and_nbytes_of_arrays_and_of_shapes():
  t = {'a': np.zeros((3, 4), np.float32), 'b': {'c': np.zeros((), np.int8), 'd': np.zeros((0, 5))}}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), t)
  assert tree.count(t) == tree.count(shapes) == 13
  assert tree.nbytes(t) == tree.nbytes(shapes) == 49


def test_diff_names_each_kind_of_difference():
  expected = {'a': np.zeros(2), 'b': {'c': np.zeros((2, 3)), 'd': np.zeros(1)}}
  found = {'b': {'c': np.zeros((3, 2)), 'd': np.zeros(1)}, 'e': np.zeros(())}
  assert tree.diff(expected, found).splitlines() == [
    '- a [2]',
    '! b/c [3, 2], expected [2, 3]',
    '+ e []',
  ]
  assert tree.diff(expected, expected) == ''
