"""Configs: overrides, checks, what errors say, hashes and differences."""

import ast
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from efft import command, config, functions
from efft.errors import InputError
from efft.fields import FIELDS


def made(arg='task=t', **changes):
  cfg = config.default(arg)
  with cfg.unlocked():
    for name, value in changes.items():
      *groups, key = name.split('__')
      node = cfg
      for group in groups:
        node = node[group]
      node[key] = value
  return cfg


LORA = {'lora': {'fn': 'lora.lora', 'rank': 8}}


def test_every_default_but_the_task_passes_its_own_check():
  for name, field in FIELDS.items():
    if name != 'task.name':
      value = field.default
      assert field.check.test(value), name
    assert field.about and len(field.about) <= 70, name


def test_arg_sets_task_and_model():
  cfg = config.default('task=reviews.csv,text=review, label=stars,labels=bad|good,fraction=0.5')
  resolved = config.resolve(cfg)
  task = {k: v for k, v in resolved['task'].items() if v not in (None, 'auto', False)}
  assert task == {
    'name': 'reviews.csv',
    'text': 'review',
    'label': 'stars',
    'labels': ['bad', 'good'],
    'fraction': 0.5,
  }
  assert config.resolve(config.default('task=t,model=m'))['model']['name'] == 'm'


@pytest.mark.parametrize(
  'arg, part',
  [
    ('tsak=x', "unknown key 'tsak'"),
    ('tsak=x', 'did you mean task?'),
    ('rotten_tomatoes', "'rotten_tomatoes', expected key=value"),
    ('task=', "'task=', expected key=value"),
  ],
)
def test_bad_arg(arg, part):
  with pytest.raises(InputError, match='--config=FILE') as error:
    config.default(arg)
  assert part in str(error.value)


@pytest.mark.parametrize(
  'name, value, expected',
  [
    ('seed', True, 'an integer'),
    ('seed', 1.0, 'an integer'),
    ('seed', -1, 'an integer from 0'),
    ('optim__lr', math.nan, 'a number > 0'),
    ('optim__lr', math.inf, 'a number > 0'),
    ('optim__lr', 10**400, 'a number > 0'),
    ('optim__lr', 0, 'a number > 0'),
    ('optim__lr', True, 'a number > 0'),
    ('optim__lr', '1e-3', 'a number > 0'),
    ('optim__b1', 1.0, 'a number in [0, 1)'),
    ('task__fraction', 0, 'a number in (0, 1]'),
    ('optim__name', 'adam', 'one of adamw, adafactor, lion'),
    ('model__remat', 1, 'True or False'),
    ('model__max_length', 2, 'an integer from 3'),
    ('train__class_weights', 'equal', 'one of balanced or a list of numbers >= 0, or None'),
    ('train__class_weights', [1.0, math.nan], 'a list of numbers'),
    ('task__labels', ['a', 'a'], 'distinct names'),
    ('trackers', ('mlflow',), 'tensorboard, wandb'),
    ('rules', (('a', 'b', 'c'),), '(path regex, group) pairs'),
    ('rules', (('(', 'b'),), 'a regular expression'),
    ('rules', (('.*', 'frozen'),), "a group besides 'frozen'"),
  ],
)
def test_refuses(name, value, expected):
  with pytest.raises(InputError) as error:
    config.resolve(made(**{name: value}))
  message = str(error.value)
  assert message.startswith(f'config.{name.replace("__", ".")}: found ')
  assert expected in message and '\n' not in message


def test_none_only_where_it_means_something():
  assert config.resolve(made(optim__clip=None))['optim']['clip'] is None
  with pytest.raises(InputError, match='config.optim.lr: found None'):
    config.resolve(made(optim__lr=None))


def test_unknown_field_names_the_nearest():
  cfg = config.resolve(made())
  cfg['optim']['learning_rate'] = cfg['optim']['lrr'] = 1
  with pytest.raises(InputError, match='unknown field'):
    config.resolve(cfg)
  del cfg['optim']['learning_rate']
  with pytest.raises(InputError, match='did you mean optim.lr?'):
    config.resolve(cfg)
  with pytest.raises(InputError, match="unknown field 'optim'"):
    config.resolve({'optim': 3})


def test_a_config_is_locked():
  with pytest.raises(AttributeError, match='Did you mean "lr"'):
    config.default().optim.lrr = 1


def test_task_is_asked_for():
  with pytest.raises(InputError, match='config.task.name: found .*task=rotten_tomatoes'):
    config.resolve(config.default())


def test_method_options_are_filled_in_and_checked():
  resolved = config.resolve(made(method=LORA))
  assert resolved['method']['lora']['rank'] == 8
  assert resolved['method']['lora']['alpha'] == 16.0
  for option, value, part in [
    ('rnak', 4, 'did you mean rank?'),
    ('rank', True, 'an integer'),
    ('rank', 4.5, 'a value like 8'),
    ('alpha', math.nan, 'a finite number'),
    ('alpha', 'big', 'a number'),
    ('at', 3, 'a value like'),
  ]:
    with pytest.raises(InputError, match='config.method.lora') as error:
      config.resolve(made(method={'lora': {**LORA['lora'], option: value}}))
    assert part in str(error.value) or option == 'rank'
  for fn, part in [
    ('lroa.lora', 'did you mean lora?'),
    ('lora.lara', 'did you mean lora.lora?'),
    ('../x.y', 'unknown module'),
    (None, 'unknown module'),
    ('lora.product', 'unknown function'),
  ]:
    with pytest.raises(InputError) as error:
      config.resolve(made(method={'x': {'fn': fn}}))
    assert part in str(error.value)


def test_signature_is_read_from_the_source(tmp_path):
  (tmp_path / 'm.py').write_text(
    "AT = r'x.*'\nBUILT = max(1, 2)\n"
    'def f(a, b=2, /, c=(1, 2), at=AT, *, d=None, e=-1.0): pass\ndef _hidden(): pass\n'
  )
  assert functions.signature('m.f', tmp_path) == {
    'a': functions.REQUIRED, 'b': 2, 'c': (1, 2), 'at': 'x.*', 'd': None, 'e': -1.0,
  }  # fmt: skip
  with pytest.raises(InputError, match='unknown function'):
    functions.signature('m._hidden', tmp_path)


def test_groups_override_known_groups_only():
  cfg = made(optim__groups=ConfigDict({'head': {'lr': 1, 'schedule': None}}))
  assert config.resolve(cfg)['optim']['groups'] == {'head': {'lr': 1.0}}
  for groups, part in [
    ({'haed': {'lr': 1e-3}}, 'did you mean head?'),
    ({'head': {'lrr': 1e-3}}, 'did you mean lr?'),
    ({'head': {'lr': -1}}, 'config.optim.groups.head.lr: found -1'),
    ({'head': 3}, 'found 3, expected a dict'),
  ]:
    with pytest.raises(InputError) as error:
      config.resolve(made(optim__groups=ConfigDict(groups)))
    assert part in str(error.value)


@given(
  st.fixed_dictionaries(
    {
      'seed': st.integers(0, 2**31 - 1),
      'optim__lr': st.floats(1e-9, 10) | st.integers(1, 9),
      'optim__clip': st.none() | st.floats(0.01, 10),
      'train__class_weights': st.none()
      | st.just('balanced')
      | st.lists(st.floats(0, 9), min_size=1),
      'task__text': st.none() | st.text(min_size=1),
    }
  )
)
def test_json_gives_back_what_was_resolved(changes):
  resolved = config.resolve(made(method=LORA, **changes))
  again = json.loads(json.dumps(resolved, allow_nan=False))
  assert again == resolved == config.resolve(again)
  assert config.config_hash(again) == config.config_hash(resolved)
  assert config.difference(resolved, again) == ''


def test_hash_and_difference_leave_out_what_does_not_steer():
  a = config.resolve(made(method=LORA))
  b = config.resolve(made(method=LORA, train__log_every=1, trackers=('wandb',), mesh__devices=2))
  assert config.config_hash(a) == config.config_hash(b) and config.difference(a, b) == ''
  c = config.resolve(made(method={'lora': {'fn': 'lora.lora', 'rank': 4}}, optim__lr=1e-4))
  assert config.config_hash(a) != config.config_hash(c)
  assert config.difference(a, c) == 'method.lora.rank 8 -> 4, optim.lr 5e-05 -> 0.0001'
  assert config.difference(a, config.resolve(made())).startswith('method')


def test_load_opens_options_and_groups(tmp_path):
  cfg = config.load('configs/lora.py:task=t')
  assert cfg.is_locked
  assert {'method.lora.dropout', 'optim.groups.delta.lr', 'optim.lr'} <= config.paths(cfg).keys()
  cfg.method.lora.dropout = 0.1
  cfg.optim.groups.delta.lr = 1e-2
  resolved = config.resolve(cfg)
  assert resolved['method']['lora']['dropout'] == 0.1
  assert resolved['optim']['groups'] == {'delta': {'lr': 1e-2}}


def test_load_reads_what_a_run_left(tmp_path):
  resolved = config.resolve(config.load('configs/ia3.py:task=t,labels=a|b'))
  (tmp_path / 'config.json').write_text(json.dumps(resolved))
  assert config.resolve(config.load(str(tmp_path / 'config.json'))) == resolved
  (tmp_path / 'broken.json').write_text('{"seed": ')
  with pytest.raises(InputError, match='broken.json'):
    config.load(str(tmp_path / 'broken.json'))


def test_own_configs_come_first_and_bundled_ones_are_found(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert config.find('configs/lora.py').is_absolute()
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'lora.py').write_text(
    'from efft.config import default\n'
    'def get_config(arg):\n  config = default(arg)\n  config.seed = 7\n  return config\n'
  )
  assert config.load('configs/lora.py').seed == 7
  assert not (tmp_path / 'configs' / '__pycache__').exists()
  with pytest.raises(InputError, match='did you mean configs/lora.py?'):
    config.find('configs/lorra.py')


@pytest.mark.parametrize(
  'text, part',
  [
    ('def get_config(arg:', ':1: found SyntaxError'),
    ('x = 1\n', 'KeyError "\'get_config\'"'),
    ('def get_config(arg):\n  return 1 / 0\n', ':2: found ZeroDivisionError'),
    ('def get_config(arg):\n  return {}\n', 'get_config returning dict'),
    (
      'from efft.config import default\ndef get_config(arg):\n  c = default()\n  c.sed = 1\n',
      ':4: found AttributeError',
    ),
    ('import ml_collections as m\ndef get_config(arg):\n  return m.ConfigDict()\n', 'no field'),
    (
      'from efft.config import default\ndef get_config(arg):\n  c = default()\n'
      '  c.method = {"x": 3}\n  return c\n',
      'config.method.x: found 3',
    ),
    (
      'from efft.config import default\ndef get_config(arg):\n  c = default()\n'
      '  c.rules = (("a",),)\n  return c\n',
      'config.rules: found',
    ),
  ],
)
def test_broken_config_files(tmp_path, text, part):
  (tmp_path / 'broken.py').write_text(text)
  with pytest.raises(InputError) as error:
    config.load(str(tmp_path / 'broken.py'))
  assert part in str(error.value) and '\n' not in str(error.value)


def test_an_example_of_a_list_is_one():
  shown = [name for name, field in FIELDS.items() if field.check.example]
  assert {'trackers', 'task.labels', 'model.init_from', 'rules', 'distil.layers'} <= set(shown)
  for name in shown:
    check = FIELDS[name].check
    assert check.test(ast.literal_eval(check.example)), name


def test_help_names_every_field():
  text = command.fields()
  assert all(f'--config.{name}=' in text for name in FIELDS)
