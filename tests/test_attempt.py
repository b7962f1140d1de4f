"""Prompts mixed for each text: the definition by loops, and where the mixed prompts come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from efft import tree
from efft.errors import InputError
from efft.peft import base, prompt
from efft.peft.base import Site

D = 24


def place(path='embed/words'):
  """The value of an 'embed' site: five texts of different lengths."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(5, 7, D)), jnp.float32)
  mask = jnp.asarray(np.arange(7) < np.array([[7], [3], [1], [5], [2]]))
  types = jnp.asarray(mask & (np.arange(7) > 1), jnp.int32)
  table = jnp.asarray(rng.normal(size=(50, D)), jnp.float32)
  return Site(path, (x, mask, types) if path == 'embed/words' else (x, mask), w=table)


def shifted(p):
  rng = np.random.default_rng(1)
  return {leaf: x + jnp.asarray(rng.normal(0, 1, x.shape), x.dtype) for leaf, x in p.items()}


def mixed(p, text, temperature):
  """The prompt of one text [T, D] without padding, by loops over its tokens and the prompts."""
  p = {leaf: np.float64(x) for leaf, x in p.items()}
  largest = [max(token[i] for token in text) for i in range(D)]
  hidden = largest @ p['down']
  h = (hidden / (1 + np.exp(-hidden))) @ p['up']
  h = (h - h.mean()) / np.sqrt(h.var() + 1e-5) * p['scale'] + p['bias']
  prompts = [*p['prompt'], p['target']]
  scores = []
  for rows in prompts:
    best = np.array([max(row[i] for row in rows) for i in range(D)])
    scores.append(np.exp(best @ h / (temperature * D)))
  total = p['target'].copy()
  for rows, score in zip(prompts, scores, strict=True):
    total += score / sum(scores) * rows
  return total, np.array(scores) / sum(scores)


@pytest.mark.parametrize('path', prompt.PLACES)
def test_each_text_has_the_prompt_of_the_loop(path):
  here = place(path)
  init = 'vocabulary' if path == 'embed/words' else 'random'
  delta, cut = prompt.attempt(3, 4, bottleneck=6, temperature=0.3, init=init, at=path)
  p = shifted(delta.init(jax.random.key(0), here))
  after, mask, *types = delta.apply(p, here)
  x, real = np.asarray(here.y[0]), np.asarray(here.y[1])
  weights = []
  for i in range(5):
    expected, a = mixed(p, x[i][real[i]], 0.3)
    np.testing.assert_allclose(after[i, :4], expected, rtol=1e-4, atol=1e-4)
    weights.append(a)
  assert np.ptp(weights, 0).max() > 0.1, 'texts differ in what they attend to'
  np.testing.assert_array_equal(after[:, 4:], x)
  assert mask[:, :4].all() and (mask[:, 4:] == real).all()
  assert all((t[:, :4] == 0).all() for t in types)
  # `pooled` takes them away again, as of any prompt.
  assert cut.at == 'output' and int(cut.init(None, None)['length']) == 4


def test_padding_is_not_read_and_a_row_of_it_does_no_harm():
  here = place()
  delta, _ = prompt.attempt(2, 4, bottleneck=6)
  p = shifted(delta.init(jax.random.key(0), here))
  x, mask, types = here.y
  noise = jnp.where(mask[..., None], x, 99.0)
  plain = delta.apply(p, here)[0][:, :4]
  np.testing.assert_array_equal(
    delta.apply(p, here._replace(y=(noise, mask, types)))[0][:, :4], plain
  )
  empty = here._replace(y=(x, mask.at[0].set(False), types))

  def total(p):
    return jnp.sum(delta.apply(p, empty)[0][:, :4] ** 2)

  assert all(np.isfinite(x).all() and x.any() for x in jax.grad(total)(p).values())


def test_sources_are_prompts_stacked_and_stay():
  """The leaf has the name and place of a prompt's own, with one axis more; the rules freeze it."""
  resolved = tiny.settings('attempt', n=3, length=5)
  here = tiny.world(resolved, tiny.SHORT)
  single = tiny.world(tiny.settings('prompt', length=5), tiny.SHORT)
  (path,) = [name for name in single.groups if name.startswith('delta/')]
  assert path == 'delta/embed/words_prompt/prompt'
  ours = path.replace('words_prompt', 'words_attempt')
  sources = tree.flatten(here.variables)[ours]
  assert sources.shape == (3, *tree.flatten(single.variables)[path].shape)
  assert ours not in here.groups
  assert sorted(name.rpartition('/')[2] for name in here.groups if name.startswith('delta/')) == [
    'bias', 'down', 'scale', 'target', 'up',
  ]  # fmt: skip
  table = np.asarray(tiny.params(tiny.SHORT)['embed']['word']['embedding'])
  rows = [*sources, tree.flatten(here.variables)[ours.replace('/prompt', '/target')]]
  assert all((table == row).all(1).any() for prompt in rows for row in prompt)
  assert len({prompt.tobytes() for prompt in map(np.asarray, rows)}) == 4


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'n': 0}, 'n 0'),
    ({'bottleneck': 0}, 'bottleneck 0'),
    ({'temperature': 0.0}, 'temperature 0.0'),
    ({'length': 0}, 'length 0'),
    ({'init': 'words'}, "init 'words'"),
    ({'init': 'tokens'}, 'with 0 tokens'),
    ({'at': 'embed'}, 'no word table'),
  ],
)
def test_bad_options_are_refused(options, message):
  with pytest.raises(InputError, match=message):
    base.build({'m': {'fn': 'prompt.attempt', **options}})
