"""How long the blocks of an encoder take on this device, by their numbers of heads and units.

A speed-up is real only where it was measured: it depends on the device, the batch and the length
(ZipLM, Kurtic et al. 2023, https://arxiv.org/abs/2302.04089, section 3.2). B examples of T tokens.
"""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from efft import cpu, files, tree
from efft.data import packages
from efft.errors import InputError
from efft.models.encoder import Encoder, EncoderConfig, init_params
from efft.models.layers import Attention, Hooks, LayerNorm, Mlp

log = logging.getLogger(__name__)


class Table(NamedTuple):
  """Seconds of an encoder's parts, evaluating one batch.

  Attributes:
    attention: {heads: seconds} of an attention block with its residual and norm.
    mlp: {units: seconds} of a feed-forward block with its residual and norm.
    rest: seconds of all else: embeddings, pooler, head, and starting the program.
    batch, length: B and T.
    device: the kind of device it was measured on.
    dtype: of activations and products.
    hidden, head_dim: of the encoder, of which all blocks have to be.
  """

  attention: Mapping[int, float]
  mlp: Mapping[int, float]
  rest: float
  batch: int
  length: int
  device: str
  dtype: str
  hidden: int
  head_dim: int

  def to_dict(self) -> dict:
    """For JSON, whose keys are strings."""
    blocks = {name: {str(n): s for n, s in getattr(self, name).items()} for name in BLOCKS}
    return {**self._asdict(), **blocks}

  @classmethod
  def from_dict(cls, d: Mapping) -> 'Table':
    blocks = {name: {int(n): float(s) for n, s in d[name].items()} for name in BLOCKS}
    return cls(**{**d, **blocks})

  def seconds(self, block: str, size: int) -> float:
    """Of one block ('attention' or 'mlp'); linear between the sizes that were measured."""
    sizes = sorted(getattr(self, block))
    if not sizes[0] <= size <= sizes[-1]:
      raise InputError(
        'latency table', f'{block} of size {size}', f'sizes from {sizes[0]} to {sizes[-1]}',
        'measure this encoder',
      )  # fmt: skip
    return float(np.interp(size, sizes, [getattr(self, block)[n] for n in sizes]))

  def check(self, cfg: EncoderConfig) -> None:
    """Raises InputError where it was measured on blocks of another shape."""
    if (cfg.hidden, cfg.head_dim) != (self.hidden, self.head_dim):
      raise InputError(
        'latency table',
        f'blocks of hidden {self.hidden}, head_dim {self.head_dim}',
        f'{cfg.hidden}, {cfg.head_dim}, as this encoder has', 'measure this encoder',
      )  # fmt: skip

  def predict(self, cfg: EncoderConfig) -> float:
    """Seconds of a whole encoder with such blocks."""
    self.check(cfg)
    attention = sum(self.seconds('attention', n) for n in cfg.heads)
    return self.rest + attention + sum(self.seconds('mlp', n) for n in cfg.mlp)


BLOCKS = {'attention': Attention, 'mlp': Mlp}


def grid(width: int, ratio: float = 0.9, least: float = 0.01, multiple: int = 1) -> tuple[int, ...]:
  """Widths to choose among, descending: width * ratio^i, and 0.

  Args:
    width: of the dense block.
    ratio: ZipLM's 0.9.
    least: the smallest width but 0, as a share of `width` (ZipLM's 1%).
    multiple: what all widths but `width` are rounded to a multiple of, for devices whose products
      come in tiles.
  """
  if not (0 < ratio < 1 and 0 < least <= 1 and multiple > 0):
    raise ValueError(f'ratio {ratio}, least {least}, multiple {multiple}')
  widths, exact = {width, 0}, width * ratio
  while exact >= max(width * least, 1):
    widths.add(multiple * round(exact / multiple))
    exact *= ratio
  return tuple(sorted((n for n in widths if n <= width), reverse=True))


def seconds(
  fns: Mapping[Any, Callable], rounds: int = 20, clock: Callable = time.perf_counter
) -> dict[Any, float]:
  """Median seconds of functions that return arrays; each is called twice before it counts.

  They take turns, so that whatever else the machine does meets all of them alike, and each finds
  the caches as cold as the others do.
  """

  def once(fn):
    start = clock()
    jax.block_until_ready(fn())
    return clock() - start

  for fn in fns.values():
    once(fn)
    once(fn)
  taken = [[once(fn) for fn in fns.values()] for _ in range(rounds)]
  return dict(zip(fns, np.median(taken, axis=0).tolist(), strict=True))


class Block(nn.Module):
  """An attention or feed-forward block of a layer, with its residual and norm."""

  cfg: EncoderConfig
  kind: str
  size: int

  @nn.compact
  def __call__(self, x, mask):
    y = BLOCKS[self.kind](self.cfg, Hooks(), self.size, name=self.kind)(x, mask)
    return LayerNorm(self.cfg.eps, name='norm')(x + y.astype(x.dtype))


def measure(
  cfg: EncoderConfig,
  batch: int,
  length: int,
  dtype: str = 'float32',
  *,
  widths: Iterable[int] | None = None,
  depth: int = 3,
  seconds: Callable = seconds,
) -> Table:
  """Measures the parts of an encoder of `cfg`'s shape on this device, without dropout.

  Args:
    cfg: of the encoder before pruning.
    batch, length: B and T, all tokens real.
    dtype: 'float32' or 'bfloat16'.
    widths: of the feed-forward blocks; None: `grid` of the widest.
    depth: blocks that run one after the other in a program, each with its own weights; what it
      takes to start a program is subtracted before their time is shared among them.
    seconds: as `seconds` above.

  Raises:
    InputError: a length that the encoder has no positions for.
  """
  widest, most = max(cfg.mlp, default=0), max(cfg.heads, default=0)
  widths = {0, widest, *(grid(widest) if widths is None else widths)}
  sizes = {'attention': range(most + 1), 'mlp': sorted(widths)}
  rng = np.random.default_rng(0)
  shape = batch, length, cfg.hidden
  x = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
  mask = jnp.ones(shape[:2], bool)
  rest = dataclasses.replace(cfg, heads=(), mlp=())
  shapes = jax.eval_shape(lambda key: init_params(rest, key), jax.random.key(0))
  fns = {
    'start': _bound(jnp.negative, x[:1, :1]),
    'rest': forward(rest, _random(shapes, rng), batch, length, dtype),
  }
  for kind, numbers in sizes.items():
    for n in numbers:
      fns[kind, n] = _chain(Block(cfg, kind, n), x, mask, depth, rng)
  took = seconds(fns)
  blocks = {
    kind: {n: max(took[kind, n] - took['start'], 0.0) / depth for n in numbers}
    for kind, numbers in sizes.items()
  }
  device = jax.devices()[0].device_kind
  return Table(
    **blocks, rest=took['rest'], batch=batch, length=length, device=device, dtype=str(dtype),
    hidden=cfg.hidden, head_dim=cfg.head_dim,
  )  # fmt: skip


def known(cfg: EncoderConfig, batch: int, length: int, dtype: str = 'float32') -> Table:
  """`measure` on this device, once: the table is kept in the cache.

  It belongs to the processor, to how many of its cores are used and to jax; not to what else the
  machine was doing.
  """
  if (table := kept(cfg, batch, length, dtype)) is not None:
    return table
  log.info('measuring what blocks cost at %d x %d tokens', batch, length)
  table = measure(cfg, batch, length, dtype)
  found = json.dumps(table.to_dict()).encode()
  files.write_sealed(_entry(cfg, batch, length, dtype), found, 'latency')
  return table


def kept(cfg: EncoderConfig, batch: int, length: int, dtype: str = 'float32') -> Table | None:
  """What `known` need not measure."""
  found = files.read_sealed(_entry(cfg, batch, length, dtype))
  return None if found is None else Table.from_dict(json.loads(found))


def _entry(cfg: EncoderConfig, batch: int, length: int, dtype: str) -> Path:
  shape = cfg.hidden, cfg.head_dim, max(cfg.heads), max(cfg.mlp), cfg.vocab_size, cfg.embed_dim
  shape += cfg.architecture, cfg.activation
  device = jax.devices()[0].device_kind, jax.device_count(), jax.__version__
  device += cpu.name(), cpu.cores()  # jax calls every processor 'cpu'
  key = repr((shape, batch, length, dtype, device)).encode()
  return packages.cache_root() / 'latency' / hashlib.sha256(key).hexdigest()


def forward(
  cfg: EncoderConfig, params: Mapping, batch: int, length: int, dtype: str = 'float32'
) -> Callable:
  """() -> logits of a whole encoder for B made-up texts of T tokens each: what `seconds` takes."""
  ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length))
  model = Encoder(cfg, dtype=jnp.dtype(dtype))

  def apply(params, ids):
    return model.apply({'params': params}, ids, ids >= 0)

  return _bound(apply, _cast(params, dtype), jnp.asarray(ids, jnp.int32))


def whole(
  cfg: EncoderConfig,
  params: Mapping,
  batch: int,
  length: int,
  dtype: str = 'float32',
  seconds: Callable = seconds,
) -> float:
  """Seconds that a whole encoder takes for a batch of B texts of T tokens."""
  return seconds({'whole': forward(cfg, params, batch, length, dtype)})['whole']


def faster(
  old: EncoderConfig, new: EncoderConfig, batch: int, length: int, dtype: str = 'float32'
) -> float:
  """How many times as fast one encoder is as another, measured in turn; weights are made up."""
  rng, fns = np.random.default_rng(0), {}
  for name, cfg in (('old', old), ('new', new)):
    shapes = jax.eval_shape(lambda key, cfg=cfg: init_params(cfg, key), jax.random.key(0))
    params = jax.tree.map(lambda x: np.float32(0.02 * rng.standard_normal(x.shape)), shapes)
    fns[name] = forward(cfg, params, batch, length, dtype)
  took = seconds(fns, rounds=9)
  return took['old'] / took['new']


def _chain(block: Block, x, mask, depth: int, rng) -> Callable:
  """() -> x after `depth` such blocks."""
  shapes = jax.eval_shape(block.init, jax.random.key(0), x, mask)['params']
  weights = [_cast(_random(shapes, rng), str(x.dtype)) for _ in range(depth)]

  def run(weights, x, mask):
    for params in weights:
      x = block.apply({'params': params}, x, mask)
    return x

  return _bound(run, weights, x, mask)


def _bound(fn: Callable, *args) -> Callable:
  """() -> fn(*args), compiled; weights that were constants of the program would be folded."""
  fn, args = jax.jit(fn), jax.device_put(args)
  return lambda: fn(*args)


def _random(shapes: Mapping, rng) -> dict:
  """Weights of these shapes; equal numbers would take less power, and so less time."""

  def draw(path, x):
    centre = 1.0 if path.endswith('/scale') else 0.0
    return centre + 0.02 * rng.standard_normal(x.shape, np.float32)

  return tree.map_paths(draw, shapes)


def _cast(params: Mapping, dtype: str) -> dict:
  """Matrices of the encoder in the type that a classifier holds them in."""

  def cast(path, x):
    matrix = path.endswith(('kernel', 'embedding')) and not path.startswith(('head/', 'pooler/'))
    return x.astype(jnp.dtype(dtype)) if matrix else x

  return tree.map_paths(cast, params)
