"""Low-rank updates of the kernels."""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from efft.peft.base import Delta, product
from efft.peft.updates import QUERY_VALUE, kernel_shape, uniform

FAMILY = 'low rank'  # in `efft methods`


def lora(
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
  use_rslora: bool = False,
  lora_bias: bool = False,
  rank_pattern: Mapping | None = None,
  alpha_pattern: Mapping | None = None,
) -> Delta:
  """LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685): y + (alpha / rank) x A B.

  A [d_in, rank] starts uniform in +-1/sqrt(d_in), as in the authors' code and in HF PEFT (the
  paper says Gaussian); B [rank, d_out] starts at zero, so the model starts unchanged. Trains
  rank (d_in + d_out) numbers a kernel. Merges as W + (alpha / rank) A B.

  Variants that are rules of the config and not options: LoRA+ (a learning rate of its own for B,
  configs/loraplus.py), LoRA-FA (A frozen, configs/lora_fa.py), and PEFT's bias='lora_only', a
  rule for the biases of the same linears.

  Args:
    rank: r, at least 1.
    alpha: numerator of the scale.
    dropout: rate on x before A, while training.
    at: which kernels; the default is query and value of every layer.
    use_rslora: scale by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023,
      https://arxiv.org/abs/2312.03732).
    lora_bias: a trained bias behind B, scaled as it is; starts at zero.
    rank_pattern: {regex of whole site paths: rank}, the first that matches; where none does,
      `rank`. One that matches no site has no effect, as in PEFT. ml_collections refuses keys with
      dots, so a config file writes such a regex in a list of pairs: [('layer_.*', 4)].
    alpha_pattern: the same for alpha.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  ranks = _patterns('rank_pattern', rank_pattern, int)
  alphas = _patterns('alpha_pattern', alpha_pattern, (int, float))
  if alphas and not alpha:
    raise ValueError('alpha_pattern needs an alpha other than 0')

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    r = _first_match(ranks, site.path, rank)
    p = {'a': uniform(key, (d_in, r), d_in), 'b': jnp.zeros((r, d_out), jnp.float32)}
    return {**p, 'bias': jnp.zeros(d_out, jnp.float32)} if lora_bias else p

  def scale(rank):
    return alpha / (rank**0.5 if use_rslora else rank)

  def apply(p, site):
    factor = scale(p['a'].shape[1])
    low = product(site.dropout(site.x, dropout), p['a']).astype(site.x.dtype)
    update = product(low, p['b'])
    return site.y + factor * (update + p['bias'] if lora_bias else update)

  def merge(p, module):
    factor = scale(p['a'].shape[1])
    merged = {**module, 'kernel': module['kernel'] + factor * product(p['a'], p['b'])}
    if lora_bias:
      merged['bias'] = module['bias'] + factor * p['bias']
    return merged

  def expand(p, path, key):
    # Here and not in the scale: merge does not know its path.
    ratio = _first_match(alphas, path, alpha) / alpha
    return {leaf: x if leaf == 'a' else x * ratio for leaf, x in p.items()}

  return Delta(init, apply, at, merge, expand=expand if alphas else None, scale=scale)


def embedding(
  rank: int = 8, alpha: float = 16.0, use_rslora: bool = False, at: str = 'embed/words'
) -> Delta:
  """LoRA of the word embeddings, as in HF PEFT: words + (alpha / rank) A[ids] B.

  A [vocabulary, rank] starts at zero and B [rank, d] normal with standard deviation 1, the other
  way round than at kernels: only the rows of A that occur get a gradient. Trains
  rank (vocabulary + d) numbers. Merges into the table.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  scale = alpha / (rank**0.5 if use_rslora else rank)

  def init(key, site):
    if site.ids is None or site.w is None:
      raise ValueError('a site without a table of words')
    rows, width = site.w.shape
    return {
      'a': jnp.zeros((rows, rank), jnp.float32),
      'b': jax.random.normal(key, (rank, width), jnp.float32),
    }

  def apply(p, site):
    x, mask, token_types = site.y
    added = scale * product(jnp.take(p['a'], site.ids, axis=0), p['b'])
    # A prompt that acts before this stands in front of the words.
    added = jnp.pad(added, ((0, 0), (x.shape[1] - added.shape[1], 0), (0, 0)))
    return x + added, mask, token_types

  def merge(p, module):
    table = module['word']['embedding'] + scale * product(p['a'], p['b'])
    return {**module, 'word': {**module['word'], 'embedding': table}}

  return Delta(init, apply, at, merge)


def dora(
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  at: str = QUERY_VALUE,
  use_rslora: bool = False,
) -> Delta:
  """DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353): LoRA beside a trained magnitude.

  The kernel becomes m V / |V| with V = W + (alpha / rank) A B and |V| the norm of each output
  unit's column, detached from the gradient as in the paper's section 4.3; so
  y becomes m / |V| (y + (alpha / rank) x A B). m [d_out] starts at |W|, A and B as LoRA's: the
  model starts unchanged. Trains rank (d_in + d_out) + d_out numbers a kernel.

  |V| is that of the pretrained kernel: a delta that acts before this one at the same site is
  scaled, but does not enter the norm. Dropout acts on x before A alone; HF PEFT also drops from
  the part of x W that m / |V| - 1 multiplies. AdapterHub scales the linear's bias as well.
  """
  low = lora(rank, alpha, dropout, at, use_rslora)

  def init(key, site):
    p = low.init(key, site)
    return {**p, 'm': jnp.linalg.norm(site.w.astype(jnp.float32), axis=0)}

  def factor(p, w):
    v = low.merge(p, {'kernel': w.astype(jnp.float32)})['kernel']
    return p['m'] / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))

  def apply(p, site):
    return factor(p, site.w) * low.apply(p, site)

  def merge(p, module):
    return {**module, 'kernel': factor(p, module['kernel']) * low.merge(p, module)['kernel']}

  return Delta(init, apply, at, merge)


def adalora(
  rank: int = 12,
  alpha: float = 16.0,
  dropout: float = 0.0,
  orth_reg_weight: float = 0.1,
  at: str = QUERY_VALUE,
) -> Delta:
  """AdaLoRA's update (Zhang et al. 2023, https://arxiv.org/abs/2303.10512), at its first rank.

  y + (alpha / rank) x P diag(lambda) Q, with P = a [d_in, rank], lambda = e [rank] and
  Q = b [rank, d_out]. P and Q start normal with standard deviation 0.02, lambda at zero: the
  model starts unchanged. Trains rank (d_in + d_out + 1) numbers a kernel. Which entries of lambda
  stay is the optimiser's part; what is cut is zero, and the scale keeps the first rank, as in HF
  PEFT (whose lora_alpha / init_r this is).

  The loss grows by orth_reg_weight (|P'P - 1|^2 + |QQ' - 1|^2), summed over kernels as in the
  paper; its code and PEFT take the mean of norms that are not squared.

  Args:
    rank: before any entry is cut; the paper starts at 1.5 times the mean that it ends with.
    alpha: numerator of the scale.
    dropout: rate on x before P, while training.
    orth_reg_weight: gamma.
    at: which kernels.
  """
  if rank < 1:
    raise ValueError(f'rank {rank} is below 1')
  if orth_reg_weight < 0:
    raise ValueError(f'orth_reg_weight {orth_reg_weight} is below 0')
  scale = alpha / rank

  def init(key, site):
    d_in, d_out = kernel_shape(site)
    key_a, key_b = jax.random.split(key)
    return {
      'a': 0.02 * jax.random.normal(key_a, (d_in, rank), jnp.float32),
      'e': jnp.zeros(rank, jnp.float32),
      'b': 0.02 * jax.random.normal(key_b, (rank, d_out), jnp.float32),
    }

  def apply(p, site):
    low = product(site.dropout(site.x, dropout), p['a']) * (scale * p['e'])
    return site.y + product(low.astype(site.x.dtype), p['b'])

  def merge(p, module):
    return {**module, 'kernel': module['kernel'] + scale * product(p['a'] * p['e'], p['b'])}

  def penalty(p, path):
    def distance(gram):
      return jnp.sum((gram - jnp.eye(rank)) ** 2)

    return orth_reg_weight * (
      distance(product(p['a'].T, p['a'])) + distance(product(p['b'], p['b'].T))
    )

  return Delta(init, apply, at, merge, penalty=penalty)


def dylora(
  rank: int = 8,
  alpha: float = 16.0,
  dropout: float = 0.0,
  eval_rank: int = 0,
  at: str = QUERY_VALUE,
) -> Delta:
  """DyLoRA (Valipour et al. 2022, https://arxiv.org/abs/2210.07558): LoRA of every rank at once.

  Each training step draws r uniformly from 1 .. rank, the same at every site, and applies
  (alpha / r) x A[:, :r] B[:r], so that the leading columns learn to do without the others. Starts
  and counts as LoRA does. The paper's variant that updates the r-th column alone is not here: the
  gradient reaches all of the first r. Micro-batches of one step draw for themselves.

  Args:
    rank: the largest.
    alpha: numerator of the scale.
    dropout: rate on x before A, while training.
    eval_rank: r when evaluating and in the merged weights; 0 for all of them.
    at: which kernels.
  """
  low = lora(rank, alpha, dropout, at)
  if not 0 <= eval_rank <= rank:
    raise ValueError(f'eval_rank {eval_rank} is not between 0 and the rank, {rank}')

  def expand(p, path, key):
    # Not folded with the path: the paper draws one rank for the whole model.
    r = (eval_rank or rank) if key is None else jax.random.randint(key, (), 1, rank + 1)
    return {**p, 'b': jnp.where(jnp.arange(rank)[:, None] < r, p['b'] * (rank / r), 0.0)}

  # Filled up, its draws would be of more ranks.
  return low._replace(expand=expand, scale=None)


def _patterns(name: str, given, kinds) -> list[tuple[re.Pattern, float]]:
  if isinstance(given, Mapping):
    given = given.items()
  pairs = [tuple(pair) for pair in given or ()]
  for pair in pairs:
    if len(pair) != 2 or not isinstance(pair[1], kinds) or pair[1] <= 0:
      raise ValueError(f'{name} holds {pair!r}, which is not a regex and a positive number')
  try:
    return [(re.compile(regex), value) for regex, value in pairs]
  except re.error as error:
    raise ValueError(f'{name} holds {error.pattern!r}: {error}') from None


def _first_match(patterns, path: str, otherwise):
  return next((value for regex, value in patterns if regex.fullmatch(path)), otherwise)
