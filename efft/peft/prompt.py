"""Learnt vectors before the tokens: prompts, prompts that are computed, and mixtures of prompts."""

import jax
import jax.numpy as jnp

from efft.models.layers import normalised
from efft.peft.base import Delta, Site, product
from efft.peft.updates import uniform

FAMILY = 'prompts'  # in `efft methods`

INITS = ('vocabulary', 'random', 'tokens')
PLACES = ('embed/words', 'embed')
POOLED = ('cls', 'first')


def prompt(
  length: int = 20,
  init: str = 'vocabulary',
  tokens: tuple = (),
  at: str = 'embed/words',
  pooled: str = 'cls',
) -> tuple[Delta, ...]:
  """Prompt tuning (Lester et al. 2021, https://arxiv.org/abs/2104.08691): x = [prompt; x].

  The mask is extended with ones and the token types with zeros. Trains length d numbers: nearly
  all that trains is the head. Not the identity at the start, whatever the initialisation. The
  paper draws from the 5,000 commonest words; here the whole table is drawn from, without
  replacement, because ids are not sorted by frequency in every vocabulary.

  A batch of T tokens fills T + length positions: `model.max_length` and `length` together must not
  exceed the encoder's position table (with at='embed', T alone).

  Args:
    length: vectors, at least 1.
    init: 'vocabulary': rows of the word table. 'random': uniform in +-0.5, as in the paper (HF
      PEFT draws a standard normal). 'tokens': the rows of `tokens`, then of the vocabulary.
    tokens: for init='tokens': token ids, such as those of the class names; an entry may be a list
      of ids, whose rows are averaged (a name of several tokens).
    at: 'embed/words': before positions are added, so that the text moves up by `length`, as in the
      paper and in HF PEFT. 'embed': after positions, norm and dropout, as in AdapterHub; has no
      words to start from.
    pooled: 'cls': the prompt is removed again from what is pooled. 'first': it stays, so that its
      first vector is pooled in place of [CLS], as in HF PEFT and AdapterHub, and a masked mean
      takes all of it in.
  """
  _check(length, at, pooled)
  if init not in INITS:
    raise ValueError(f'init {init!r} is none of {", ".join(INITS)}')
  if bool(tokens) != (init == 'tokens'):
    raise ValueError(f'init {init!r} with {len(tokens)} tokens')
  if len(tokens) > length:
    raise ValueError(f'{len(tokens)} tokens for a prompt of length {length}')
  words = [entry if isinstance(entry, list | tuple) else [entry] for entry in tokens]
  if not all(word and all(type(i) is int and i >= 0 for i in word) for word in words):
    raise ValueError(f'tokens {tokens!r}, which are not ids or lists of ids')
  if init != 'random' and at == 'embed':
    raise ValueError(f"init {init!r} at 'embed', which has no word table: take init 'random'")

  def start(key, site):
    if init == 'random':
      width = site.y[0].shape[-1]
      return {'prompt': jax.random.uniform(key, (length, width), jnp.float32, -0.5, 0.5)}
    table = site.w.astype(jnp.float32)
    top = max((i for word in words for i in word), default=0)
    if top >= len(table):
      raise ValueError(f'token {top} of a vocabulary of {len(table)}')
    named = [jnp.mean(table[jnp.array(word)], 0) for word in words]
    drawn = length - len(words)
    ids = jax.random.choice(key, len(table), (drawn,), replace=drawn > len(table))
    return {'prompt': jnp.concatenate([jnp.array(named).reshape(-1, table.shape[1]), table[ids]])}

  return _prepend(start, lambda p: p['prompt'], length, at, pooled)


def ptuning(
  length: int = 20,
  encoder: str = 'mlp',
  hidden: int = 128,
  layers: int = 2,
  at: str = 'embed/words',
  pooled: str = 'cls',
) -> tuple[Delta, ...]:
  """P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): the prompt of a small network.

  prompt = mlp(E) with E [length, d] and two hidden layers, d -> hidden -> hidden -> d with ReLU,
  or mlp(lstm(E)) with `layers` bidirectional LSTMs of `hidden` units a direction and then
  2 hidden -> 2 hidden -> d: HF PEFT's two encoders (its dropout between LSTMs is left out, as it
  is 0 there; the paper's is the LSTM). E starts standard normal, weights and biases uniform in
  +-1/sqrt(fan in) (LSTM: +-1/sqrt(hidden)), as in torch. The network is run once a step, and not
  at all once the delta is expanded. With E, trains length d + 2 d hidden + hidden^2 + 2 hidden + d
  numbers (MLP); an LSTM layer that reads n has 2 (4 hidden (n + hidden) + 4 hidden), with one bias
  where torch has two that only act through their sum.

  Args:
    length: vectors, at least 1.
    encoder: 'mlp' or 'lstm'.
    hidden: its width.
    layers: of the LSTM.
    at, pooled: as in `prompt`, and with the same bound on the length.
  """
  _check(length, at, pooled)
  if encoder not in ('mlp', 'lstm'):
    raise ValueError(f"encoder {encoder!r} is neither 'mlp' nor 'lstm'")
  if hidden < 1 or layers < 1:
    raise ValueError(f'hidden {hidden} and layers {layers} are not both at least 1')

  def start(key, site):
    width = site.y[0].shape[-1]
    keys = iter(jax.random.split(key, 16 * layers + 16))

    sizes = [width, hidden, hidden, width]
    p = {'inputs': jax.random.normal(next(keys), (length, width))}
    if encoder == 'lstm':
      sizes = [2 * hidden, 2 * hidden, width]
      for i in range(layers):
        for way in ('forward', 'backward'):
          reads = 2 * hidden if i else width
          p[f'lstm_{i}_{way}_w'] = uniform(next(keys), (reads, 4 * hidden), hidden)
          p[f'lstm_{i}_{way}_u'] = uniform(next(keys), (hidden, 4 * hidden), hidden)
          p[f'lstm_{i}_{way}_b'] = uniform(next(keys), (4 * hidden,), hidden)
    for i, (fan, out) in enumerate(zip(sizes, sizes[1:], strict=False)):
      p[f'mlp_{i}_w'] = uniform(next(keys), (fan, out), fan)
      p[f'mlp_{i}_b'] = uniform(next(keys), (out,), fan)
    return p

  def encode(p):
    if 'prompt' in p:
      return p['prompt']
    x = p['inputs']
    if encoder == 'lstm':
      for i in range(layers):
        ways = [
          _lstm(x, *(p[f'lstm_{i}_{way}_{leaf}'] for leaf in 'wub'), reverse=way == 'backward')
          for way in ('forward', 'backward')
        ]
        x = jnp.concatenate(ways, -1)
    last = 2 if encoder == 'mlp' else 1
    for i in range(last + 1):
      x = x @ p[f'mlp_{i}_w'] + p[f'mlp_{i}_b']
      x = x if i == last else jax.nn.relu(x)
    return x

  first, *rest = _prepend(start, encode, length, at, pooled)
  return first._replace(expand=lambda p, path, key: {'prompt': encode(p)}), *rest


def attempt(
  n: int = 2,
  length: int = 20,
  bottleneck: int = 100,
  temperature: float = 2.718281828459045,
  init: str = 'vocabulary',
  at: str = 'embed/words',
  pooled: str = 'cls',
) -> tuple[Delta, ...]:
  """ATTEMPT (Asai et al. 2022, https://arxiv.org/abs/2205.11961): prompts of other tasks, mixed.

  Each text gets its own prompt, of n source prompts and the task's own target prompt:

      P = target + sum_j a_j P_j over the sources and the target
      a = softmax_j(max(P_j) . h / (temperature d))
      h = norm(silu(max(x) down) up) scale + bias

  with max over a prompt's vectors and over a text's real tokens, where the authors' code takes
  padding in. The sources are stacked along the first axis of `prompt`, the leaf that
  `prompt.prompt` has; they start as so many prompts. The paper's come from other tasks and stay
  frozen, which is to overwrite this leaf and a rule ('delta/.*_attempt/prompt', 'frozen') for a
  method named 'attempt'. The target starts as a prompt too, down [d, bottleneck] and up
  [bottleneck, d] normal with standard deviation 0.01, scale 1 and bias 0. Sharing them among
  several target tasks is left out. Not the identity at the start.

  With frozen sources, trains length d + 2 d bottleneck + 2 d numbers.

  Args:
    n: source prompts.
    length: vectors of each, at least 1; the paper's T5 takes 100.
    bottleneck: width of the network that reads the text.
    temperature: of the softmax, in widths d; the paper's is e.
    init: 'vocabulary' or 'random', as in `prompt`.
    at, pooled: as in `prompt`, and with the same bound on the length. What is read of the text is
      what the prompt is put before.
  """
  if n < 1 or bottleneck < 1:
    raise ValueError(f'n {n} and bottleneck {bottleneck} are not both at least 1')
  if temperature <= 0:
    raise ValueError(f'temperature {temperature} is not above 0')
  single, *rest = prompt(length, init, at=at, pooled=pooled)

  def start(key, site):
    d = site.y[0].shape[-1]
    own, down, up, key = jax.random.split(key, 4)
    sources = jax.vmap(lambda key: single.init(key, site)['prompt'])(jax.random.split(key, n))
    return {
      'prompt': sources,
      'target': single.init(own, site)['prompt'],
      'down': 0.01 * jax.random.normal(down, (d, bottleneck)),
      'up': 0.01 * jax.random.normal(up, (bottleneck, d)),
      'scale': jnp.ones(d),
      'bias': jnp.zeros(d),
    }

  def apply(p, site: Site):
    x, mask = site.y[0].astype(jnp.float32), site.y[1][..., None]
    # A row of padding alone has no largest token.
    text = jnp.where(mask.any(1), jnp.max(jnp.where(mask, x, -jnp.inf), 1), 0)
    h = product(jax.nn.silu(product(text, p['down'])), p['up'])
    h = normalised(h, 1e-5) * p['scale'] + p['bias']
    prompts = jnp.concatenate([p['prompt'], p['target'][None]])
    a = jax.nn.softmax(product(h, jnp.max(prompts, 1).T) / (temperature * h.shape[-1]), -1)
    rows = p['target'] + jnp.einsum('bp,pld->bld', a, prompts, precision='highest')
    return prepend(rows, site.y)

  return single._replace(init=start, apply=apply), *rest


def prepend(rows, value):
  """`rows` [P, D] or [B, P, D] before the tokens of an 'embed' value: (x, mask[, types])."""
  x, *others = value
  rows = jnp.broadcast_to(rows.astype(x.dtype), (len(x), *rows.shape[-2:]))
  ahead = (len(x), rows.shape[1])
  fills = (jnp.ones(ahead, bool), jnp.zeros(ahead, jnp.int32))
  return (
    jnp.concatenate([rows, x], 1),
    *(
      jnp.concatenate([fill.astype(other.dtype), other], 1)
      for fill, other in zip(fills, others, strict=False)
    ),
  )


def remove(length: int, at: str) -> Delta:
  """Takes the first `length` of the tokens away again at a site whose value is (x, mask).

  Its one parameter, an integer and hence frozen, says that something was put there.
  """

  def init(key, site):
    return {'length': jnp.array(length, jnp.int32)}

  def apply(p, site):
    return tuple(part[:, length:] for part in site.y)

  return Delta(init, apply, at)


def _prepend(init, encode, length, at, pooled) -> tuple[Delta, ...]:
  def apply(p, site: Site):
    return prepend(encode(p), site.y)

  first = Delta(init, apply, at)
  return (first,) if pooled == 'first' else (first, remove(length, 'output'))


def _check(length: int, at: str, pooled: str) -> None:
  if length < 1:
    raise ValueError(f'length {length} is below 1')
  if at not in PLACES:
    raise ValueError(f'at {at!r} is none of {", ".join(PLACES)}')
  if pooled not in POOLED:
    raise ValueError(f'pooled {pooled!r} is none of {", ".join(POOLED)}')


def _lstm(x, w, u, b, reverse: bool):
  """Hidden states [T, H] over x [T, K]; gates in the order input, forget, cell, output."""

  def step(state, inputs):
    h, c = state
    i, f, g, o = jnp.split(inputs + h @ u, 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h

  zero = jnp.zeros(len(u), x.dtype)
  return jax.lax.scan(step, (zero, zero), x @ w + b, reverse=reverse)[1]
