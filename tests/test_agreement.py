"""What cannot be combined is refused in one line, and nothing is written."""

import dataclasses

import pytest
import test_end_to_end as runs
from test_combining import read, trained

from efft import bundle
from efft.combining import combine
from efft.errors import InputError


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
  folder = tmp_path_factory.mktemp('pair')
  return [trained(folder / str(i), 'bitfit', i) for i in range(2)]


@pytest.mark.parametrize(
  'options, words',
  [
    ({'how': 'tie'}, "--how: found 'tie', .* did you mean ties"),
    ({'head': 'mean'}, "--head: found 'mean'"),
    ({'how': 'ties', 'majority': 'most'}, "--majority: found 'most'"),
    ({'density': 0.5}, 'nothing with --how=linear'),
    ({'majority': 'total'}, 'nothing with --how=linear'),
    ({'rank': 4}, 'nothing with --how=linear'),
    ({'how': 'svd', 'rank': 0}, '--rank: found 0'),
    ({'how': 'ties', 'density': 0.0}, r'--density: found 0.0, expected a number in \(0, 1\]'),
    ({'how': 'ties', 'density': 1.5}, '--density: found 1.5'),
    ({'how': 'ties', 'density': float('nan')}, '--density: found nan'),
    ({'seed': -1}, '--seed: found -1'),
    ({'weights': (1,)}, '--weights: found 1 numbers, expected 2'),
    ({'weights': (1, float('inf'))}, 'expected finite numbers'),
    ({'weights': (2, -1), 'head': 'average'}, 'none below 0 with --head=average'),
    ({'runs': 1}, 'expected 2 or more run folders'),
    ({'runs': 0, 'how': 'svd'}, 'expected 1 or more run folders'),
    ({'output': '.'}, 'which exists'),
    ({'how': 'cat'}, r'no method, expected lora.lora and lora.embedding alone for --how=cat'),
  ],
)
def test_bad_options_are_refused(options, words, pair, tmp_path):
  options = dict(options)
  chosen, output = pair[: options.pop('runs', 2)], tmp_path / options.pop('output', 'out')
  with pytest.raises(InputError, match=words) as error:
    combine(chosen, output, **options)
  assert '\n' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'about, options, words',
  [
    ({'base': {'name': 'b', 'path': '', 'sha256': 'cd' * 32}}, {}, 'base model sha256 cdcd'),
    ({'encoder': {'mlp': (64, 32)}}, {}, r'encoder.mlp \[64, 32\], expected \[64, 64\] as in'),
    ({'pooling': 'mean'}, {}, 'pooling mean, expected cls'),
    ({'tokenizer': '{}'}, {}, 'another tokenizer'),
    ({'method': {'x': {'fn': 'lora.lora'}}}, {}, "methods {'x': 'lora.lora'}, expected {}"),
    ({'kind': 'multi'}, {'head': 'average'}, 'kind multi, expected single as in'),
    ({'kind': 'multi'}, {'head': 'union'}, 'kind multi, expected single as in'),
    ({'labels': ('no', 'maybe', 'never')}, {'head': 'average'}, 'labels no, maybe, never'),
  ],
)
def test_runs_that_do_not_fit_together_are_refused(about, options, words, pair, tmp_path):
  content = read(pair[1])
  if 'encoder' in about:
    about = {'encoder': content.encoder | about['encoder']}
  bundle.save(tmp_path / 'b' / 'bundle', dataclasses.replace(content, **about))
  with pytest.raises(InputError, match=words) as error:
    combine([pair[0], tmp_path / 'b'], tmp_path / 'out', **options)
  assert '\n' not in str(error.value) and [p.name for p in tmp_path.iterdir()] == ['b']
  if 'kind' in about:
    combine([pair[0], tmp_path / 'b'], tmp_path / 'out')  # the first head is kept: no matter


def test_methods_must_be_equal(tmp_path):
  one = trained(tmp_path / 'one', 'pfeiffer', 0)
  two = trained(tmp_path / 'two', 'pfeiffer', 0, {'reduction': 8})
  with pytest.raises(InputError, match='method.pfeiffer.reduction 8, expected 16 as in'):
    combine([one, two], tmp_path / 'out')
  with pytest.raises(InputError, match='the method adapter.pfeiffer, expected lora.lora and'):
    combine([one, one], tmp_path / 'out', 'ties_svd')
  ranks = [trained(tmp_path / str(r), 'lora', 0, {'rank': r}) for r in (2, 4)]
  with pytest.raises(InputError, match='rank 2 in .*, rank 4 in .* use --how=cat or --how=svd'):
    combine(ranks, tmp_path / 'out', 'dare_linear')
  numbers = {'kind': 'regression', 'labels': ('stars',)}
  sole = [trained(tmp_path / f'r{i}', 'bitfit', i, about=numbers) for i in range(2)]
  with pytest.raises(InputError, match='kind regression, expected classes for --head=union'):
    combine(sole, tmp_path / 'out', head='union')
  assert not (tmp_path / 'out').exists()


def test_flags_that_are_no_numbers_are_refused(capsys, tmp_path):
  for flag, words in (
    ('--weights=1,x', "--weights: found 'x', expected a number"),
    ('--rank=2.5', "--rank: found '2.5', expected a whole number"),
    ('--density=', '--density'),
    ('--how=mean', '--how'),
  ):
    out = tmp_path / 'out'
    assert words in runs.refuse(capsys, 'combine', '--runs=a,b', f'--output={out}', flag)
