"""Starting where other runs ended: leaves, heads, mixtures, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_bundle import make

from efft import bundle, compact, transfer, tree
from efft.errors import InputError

BATCH = tiny.batch()
SHA = make().base['sha256']


def world(name, **options):
  """A method in the small world, and its config.method; the delta has trained."""
  resolved = tiny.settings(name, **options)
  return tiny.world(resolved, tiny.SHORT), resolved['method']


def trained(here, seed, rate=1.0):
  """Variables after a run: what trains has moved, or a share `rate` of its numbers."""
  rng = np.random.default_rng(seed)

  def move(path, x):
    if path not in here.groups:
      return x
    step = rng.normal(0, 0.3, x.shape) * (rng.random(x.shape) < rate)
    return jnp.asarray(x + step, x.dtype)

  return tree.map_paths(move, here.variables)


def save(folder, here, method, values, **about):
  trainable, frozen = tree.split(values, here.groups.__contains__)
  leaves = transfer.handed_on(here.deltas, trainable, frozen, tiny.params(tiny.SHORT))
  about = {'labels': ('no', 'yes', 'maybe'), 'method': method, **about}
  bundle.save(folder, make(leaves=leaves, **about))
  return str(folder)


def inherit(here, method, runs, **options):
  options = {'params': tiny.params(tiny.SHORT), 'sha256': SHA, 'trains': here.groups, **options}
  options['pooling'] = 'cls'
  return transfer.inherit(here.variables, runs, method=method, **options)


@pytest.mark.parametrize(
  'name', ['lora', 'houlsby', 'prompt', 'bitfit', 'propetl_adapter', 'pissa']
)
def test_one_run_is_gone_on_with(name, tmp_path):
  """SPoT, or LoRA from MNLI: the same model but for its head, which is new or the run's."""
  here, method = world(name, **({'length': 5} if name == 'prompt' else {}))
  values = trained(here, 0)
  run = save(tmp_path / 'run', here, method, values)
  head = {'head': ('no', 'yes', 'maybe')}
  np.testing.assert_array_equal(
    here.logits(inherit(here, method, [run], **head), BATCH), here.logits(values, BATCH)
  )
  new = inherit(here, method, [run])
  jax.tree.map(
    np.testing.assert_array_equal, new['params']['head'], here.variables['params']['head']
  )
  assert np.abs(here.logits(new, BATCH) - here.logits(values, BATCH)).max() > 1e-3


def test_the_head_follows_its_labels_whatever_their_order(tmp_path):
  here, method = world('lora')
  values = trained(here, 0)
  run = save(tmp_path / 'run', here, method, values)
  turned = inherit(here, method, [run], head=('maybe', 'no', 'yes'))
  np.testing.assert_allclose(
    here.logits(turned, BATCH), here.logits(values, BATCH)[:, [2, 0, 1]], rtol=1e-6
  )


def test_several_runs_are_averaged_leaf_by_leaf(tmp_path):
  here, method = world('pfeiffer')
  runs = [trained(here, seed) for seed in range(3)]
  folders = [save(tmp_path / str(i), here, method, v) for i, v in enumerate(runs)]
  for weights in None, [0.5, 2.0, -1.0]:
    found = tree.flatten(inherit(here, method, folders, weights=weights)['delta'])
    flat = [tree.flatten(v['delta']) for v in runs]
    for path, x in found.items():
      expected = sum(w * v[path] for w, v in zip(weights or [1 / 3] * 3, flat, strict=True))
      np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'source, target, options, leaves',
  [
    ('pfeiffer', 'fusion', {}, ('down', 'down_bias', 'up', 'up_bias')),
    ('prompt', 'attempt', {'length': 5}, ('prompt',)),
  ],
)
def test_methods_that_mix_take_the_runs_as_a_stack(source, target, options, leaves, tmp_path):
  there, method = world(source, **options)
  runs = [trained(there, seed) for seed in range(2)]
  folders = [save(tmp_path / str(i), there, method, v) for i, v in enumerate(runs)]
  here, mixed = world(target, **options, n=2)
  found = tree.flatten(inherit(here, mixed, folders)['delta'])
  start, parts = tree.flatten(here.variables['delta']), [tree.flatten(v['delta']) for v in runs]
  stacked = 0
  for path, x in found.items():
    place = path.replace(f'_{target}/', f'_{source}/')
    if path.rpartition('/')[2] in leaves:
      stacked += 1
      np.testing.assert_array_equal(x, np.stack([p[place] for p in parts]))
    else:
      np.testing.assert_array_equal(x, start[path])
  assert stacked == len(leaves)


@pytest.mark.parametrize(
  'name', ['lora', 'full', 'fish', 'propetl_adapter', 'diff_pruning', 'shira']
)
def test_a_bundle_gives_the_trained_model_back_to_the_bit(name, tmp_path):
  here, method = world(name)
  values = trained(here, 0, rate=0.1)
  run = save(tmp_path / 'run', here, method, values)
  content = bundle.load(run)
  again = transfer.restored(here.deltas, content.leaves, tiny.params(tiny.SHORT))
  np.testing.assert_array_equal(here.logits(again, BATCH), here.logits(values, BATCH))
  assert transfer.needs_base(content.leaves, here.variables)
  sparse = {p for p, x in content.leaves.items() if isinstance(x, compact.Sparse)}
  assert sparse, 'a tenth of what trains has moved'
  assert not [path for path in sparse if path.startswith('params/head/')]


def test_a_model_that_has_moved_everywhere_stands_alone(tmp_path):
  here, method = world('full')
  content = bundle.load(save(tmp_path / 'run', here, method, trained(here, 0)))
  assert not transfer.needs_base(content.leaves, here.variables)
  assert all(isinstance(x, np.ndarray) for x in content.leaves.values())


@pytest.mark.parametrize('change', [{'alpha': 64.0}, {'use_rslora': True}])
def test_another_scale_is_refused(change, tmp_path):
  """The same numbers times another one are not where the run ended."""
  here, method = world('lora')
  run = save(tmp_path / 'run', here, method, trained(here, 0))
  other, spec = world('lora', **change)
  with pytest.raises(InputError, match='is not where that run ended'):
    inherit(other, spec, [run])


def test_other_options_that_differ_are_said(tmp_path, caplog):
  here, method = world('pfeiffer')
  run = save(tmp_path / 'run', here, method, trained(here, 0))
  other, spec = world('pfeiffer', activation='gelu')
  with caplog.at_level('WARNING'):
    inherit(other, spec, [run])
  assert "activation='relu'; here activation='gelu'" in caplog.text
  caplog.clear()
  inherit(here, method, [run])
  assert not caplog.text


def test_lora_is_no_start_for_what_takes_its_start_out_of_the_weights(tmp_path):
  here, method = world('lora')
  run = save(tmp_path / 'run', here, method, trained(here, 0))
  other, spec = world('pissa', rank=8, alpha=16.0)
  with pytest.raises(InputError, match='taken its start out of the weights'):
    inherit(other, spec, [run])


def test_what_cannot_be_gone_on_with_is_refused(tmp_path):
  here, method = world('lora')
  run = save(tmp_path / 'run', here, method, trained(here, 0))
  small, other = world('lora', rank=4)
  bias, rules = world('bitfit')
  biases = save(tmp_path / 'bias', bias, rules, trained(bias, 0))
  refused = [
    (small, other, [run], {}, r'matmul_lora/a .* in 1 of 1 runs, expected \(32, 4\)'),
    (bias, rules, [run], {}, 'has no place here'),
    (here, method, [biases], {}, 'does not train here'),
    (here, method, [run], {'weights': [1.0, 2.0]}, 'init_weights: found 2 numbers'),
    (here, method, [run], {'sha256': 'cd' * 32}, 'on which this bundle was trained'),
    (here, method, [run], {'head': ('no', 'yes', 'never')}, "'keep' with the labels no, yes"),
    (here, method, [str(tmp_path / 'nothing')], {}, 'no readable bundle.json'),
  ]
  for case, spec, runs, options, words in refused:
    with pytest.raises(InputError, match=words):
      inherit(case, spec, runs, **options)
  mean = save(tmp_path / 'mean', here, method, trained(here, 0), pooling='mean')
  with pytest.raises(InputError, match='model.pooling=mean'):
    inherit(here, method, [mean], head=('no', 'yes', 'maybe'))
