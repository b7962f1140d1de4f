"""What runs must have in common to be combined; each refusal is one InputError."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from efft import arithmetic, compact
from efft.bundle import Bundle
from efft.errors import InputError, nearest
from efft.qtensor import QTensor

LOW_RANK = ('lora.lora', 'lora.embedding')
# What does something to one run.
_ALONE = ('svd', *(h + end for h in ('magnitude_prune', 'dare_linear') for end in ('', '_svd')))
# Of an encoder, and of no consequence after training.
_RATES = ('num_labels', 'dropout', 'attention_dropout', 'head_dropout')


def factored(how: str) -> bool:
  """Whether `how` wants low-rank factors, of any rank."""
  return how == 'cat' or how.endswith('svd')


def prunes(how: str) -> bool:
  return how not in ('linear', 'cat', 'svd')


def elects(how: str) -> bool:
  return 'ties' in how


def check_options(runs, output, how, density, majority, rank, head, seed) -> None:
  """Refuses what can be refused without reading a run."""
  for flag, value, names in (
    ('--how', how, arithmetic.HOWS),
    ('--head', head, arithmetic.HEADS),
    ('--majority', majority or 'total', arithmetic.MAJORITIES),
  ):
    if value not in names:
      close = nearest(str(value), names)
      fix = f'did you mean {close}?' if close else 'choose one'
      raise InputError(flag, repr(value), f'one of {", ".join(names)}', fix)
  for flag, value, matters in (
    ('--density', density, prunes(how)),
    ('--majority', majority, elects(how)),
    ('--rank', rank, how.endswith('svd')),
  ):
    if value is not None and not matters:
      raise InputError(flag, repr(value), f'nothing with --how={how}', f'leave {flag} out')
  if density is not None and not 0 < density <= 1:
    raise InputError('--density', repr(density), 'a number in (0, 1]', 'correct it')
  if rank is not None and rank < 1:
    raise InputError('--rank', repr(rank), 'at least 1', 'correct it')
  if seed < 0:
    raise InputError('--seed', repr(seed), 'at least 0', 'correct it')
  least = 1 if how in _ALONE else 2
  if len(runs) < least:
    expected = f'{least} or more run folders for --how={how}'
    raise InputError('--runs', repr(','.join(runs)), expected, 'as in --runs=runs/a,runs/b')
  if Path(output).exists():
    raise InputError('--output', f'{str(output)!r}, which exists', 'a new name', 'choose another')


def weights(given, count: int, how: str, head: str) -> list[float]:
  """One a run: those given, or the default of `how`."""
  if given is None:
    return [1.0 if elects(how) else 1 / count] * count
  given = [float(w) for w in given]
  if len(given) != count:
    raise InputError('--weights', f'{len(given)} numbers', f'{count}, one a run', 'correct it')
  if not all(map(math.isfinite, given)):
    raise InputError('--weights', repr(given), 'finite numbers', 'correct it')
  if head != 'keep' and min(given) < 0:
    expected = f'none below 0 with --head={head}'
    raise InputError('--weights', repr(given), expected, 'use --head=keep')
  return given


def check_alike(runs: Sequence[str], contents: Sequence[Bundle], how: str, head: str) -> None:
  """Refuses runs whose leaves do not mean the same."""
  first = contents[0]

  def alike(what, here, there, fix):
    if here != there:
      raise InputError(run, f'{what} {there}', f'{here} as in {runs[0]}', fix)

  for run, content in zip(runs, contents, strict=True):
    base, other = first.base['sha256'], content.base['sha256']
    alike('base model sha256', base, other, 'combine runs of one base model')
    for key in sorted(first.encoder.keys() - set(_RATES) | content.encoder.keys() - set(_RATES)):
      here, there = first.encoder.get(key), content.encoder.get(key)
      alike(f'encoder.{key}', here, there, 'combine runs of one encoder and pooling')
    alike('pooling', first.pooling, content.pooling, 'combine runs of one pooling')
    if first.tokenizer != content.tokenizer:
      fix = 'combine runs that share one'
      raise InputError(run, 'another tokenizer', f'the one of {runs[0]}', fix)
    if held := [path for path, x in content.leaves.items() if isinstance(x, QTensor)]:
      raise InputError(
        run, f'{held[0]}, held in {content.leaves[held[0]].codes}', 'runs of float numbers',
        'combine the runs as they were trained, then quantise',
      )  # fmt: skip
    alike('quantize', first.quantize, content.quantize, 'combine runs beside one form of the base')
    functions = [{name: spec['fn'] for name, spec in c.method.items()} for c in (first, content)]
    alike('methods', *functions, 'combine runs of one method')
    for name, spec in content.method.items():
      if spec['fn'] not in LOW_RANK:
        for key in sorted(spec.keys() | first.method[name].keys()):
          here, there = repr(first.method[name].get(key)), repr(spec.get(key))
          alike(f'method.{name}.{key}', here, there, 'combine runs of one method')
    _check_heads(runs[0], run, first, content, head)
  others = [spec['fn'] for spec in first.method.values() if spec['fn'] not in LOW_RANK]
  if factored(how) and (others or not first.method):
    raise InputError(
      runs[0], f'the method {others[0]}' if others else 'no method',
      f'{" and ".join(LOW_RANK)} alone for --how={how}', 'use --how=linear or one without svd',
    )  # fmt: skip


def _check_heads(name: str, run: str, first: Bundle, content: Bundle, head: str) -> None:
  delta = [path for path in content.leaves if path.startswith('delta/head/')]
  if delta and content.labels != first.labels:
    raise InputError(
      run, f'{delta[0]} and the labels {", ".join(content.labels)}',
      f'{", ".join(first.labels)} as in {name}', 'combine runs of one task',
    )  # fmt: skip
  if head == 'keep':
    return
  if content.kind != first.kind or (head == 'union' and first.kind == 'regression'):
    wanted = 'classes' if content.kind == first.kind else f'{first.kind} as in {name}'
    raise InputError(run, f'kind {content.kind}', f'{wanted} for --head={head}', 'use --head=keep')
  if head == 'average' and sorted(content.labels) != sorted(first.labels):
    raise InputError(
      run, f'the labels {", ".join(content.labels)}', f'{", ".join(first.labels)} as in {name}',
      'use --head=union or --head=keep',
    )  # fmt: skip


def fixed(
  runs: Sequence[str], contents: Sequence[Bundle], leaves: Sequence[Mapping], how: str
) -> set[str]:
  """Paths of what no run trains in its deltas: frozen by the rules, integers, masks.

  Raises InputError where they differ between the runs, and `how` would have to keep them.
  """

  def trained(content, path):
    group = next((group for regex, group in content.rules if re.fullmatch(regex, path)), 'frozen')
    x = content.leaves[path]
    return group != 'frozen' and (isinstance(x, compact.Sparse) or x.dtype == np.float32)

  found = set()
  for path in sorted({path for own in leaves for path in own if path.startswith('delta/')}):
    owners = [i for i, own in enumerate(leaves) if path in own]
    if any(trained(contents[i], path) for i in owners):
      continue
    found.add(path)
    for i in owners[1:]:
      if not factored(how) and not np.array_equal(leaves[i][path], leaves[owners[0]][path]):
        raise InputError(
          runs[i], f'{path}, which does not train and differs from that of {runs[owners[0]]}',
          'runs that share what is frozen', 'train them with one seed; for LoRA use --how=cat',
        )  # fmt: skip
  return found


def check_shapes(runs: Sequence[str], leaves: Sequence[Mapping]) -> None:
  """Refuses runs that do not have the same leaves."""
  shapes = [{path: x.shape for path, x in own.items()} for own in leaves]
  for run, own in zip(runs, shapes, strict=True):
    for path in sorted(own.keys() | shapes[0].keys()):
      if own.get(path) != shapes[0].get(path):
        raise InputError(
          run, f'{path} {own.get(path, "missing")}',
          f'{shapes[0].get(path, "no such leaf")} as in {runs[0]}', 'combine runs of one method',
        )  # fmt: skip


def check_ranks(path: str, ranks: Mapping[str, int]) -> None:
  """Refuses factors of several ranks, {run: rank}, that would have to be added up."""
  if len(set(ranks.values())) > 1:
    found = ', '.join(f'rank {rank} in {run}' for run, rank in ranks.items())
    raise InputError(path, found, 'one rank', 'use --how=cat or --how=svd')
