"""A run whose deltas are folded into the weights, with the proof that it still says the same."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efft import assemble, bundle, environment, files, quantize, starting, transfer, tree
from efft import config as configs
from efft.classifier import Classifier
from efft.errors import InputError
from efft.eval import evaluate as scoring
from efft.models import hub
from efft.peft import base as peft
from efft.training import losses

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of a logit; float32 sums in another order differ by 1e-5
_MADE_UP = 256  # texts, where a run has no task


def merge(
  run, output, *, tolerance: float = TOLERANCE, split: str = 'validation'
) -> dict[str, Any]:
  """Folds what a run has trained into the weights and leaves a run folder that needs no base.

  The sum of weights and update is computed once instead of at every step, in float32, and both
  forms are run over a split: what differs is reported, and refused above `tolerance`.

  Args:
    run: a run folder or a bundle.
    output: the run folder to make.
    tolerance: the largest difference of any logit.
    split: of the run's task; a run without one is compared on made-up texts.

  Returns:
    {'metrics': of the merged model, 'merged': what `proof` says}.

  Raises:
    InputError: a method that does not merge, or a difference above `tolerance`; nothing is written.
  """
  run, output = Path(run), Path(output)
  if output.exists():
    raise InputError('--output', f'{str(output)!r}, which exists', 'a new name', 'choose another')
  content = bundle.load(run)
  whole = merged(content)
  said = proof(run, content, whole, split)
  check(said, tolerance)
  metrics = said.pop('metrics', {})
  whole = dataclasses.replace(whole, metrics=metrics or content.metrics)
  results = {'metrics': whole.metrics, 'merged': {'run': str(run), **said}}
  with files.atomic_folder(output) as temp:
    bundle.save(temp / 'bundle', whole)
    if (run / 'config.json').exists():
      config = files.read_json(run / 'config.json')
      # What remains is full fine-tuning, at its own rate.
      config |= {'method': {}, 'rules': whole.rules, 'optim': {}}
      config['model']['quantize'] = ()
      files.write_json(temp / 'config.json', configs.resolve(config))
    files.write_json(temp / 'results.json', results)
    card = bundle.card(
      vars(whole),
      title=f'{run.name}, merged',
      machine={name: str(value) for name, value in said.items()},
      command=f'efft predict --run={output} --input=texts.csv --output=out.jsonl',
    )
    files.atomic_write(temp / 'README.md', card)
  return results


def merged(content: bundle.Bundle) -> bundle.Bundle:
  """The whole model of a bundle, without deltas and without a base.

  Raises InputError for methods that cannot be folded into the weights.
  """
  deltas = peft.build(content.method)
  params = starting.pretrained(content) if content.needs_base else {}
  variables = transfer.restored(deltas, content.leaves, params, content.quantize)
  params = peft.merge(deltas, variables['params'], variables.get('delta', {}))
  rules = tuple(map(tuple, quantize.beside({'params': params})))
  return dataclasses.replace(
    content, leaves=tree.flatten({'params': jax.device_get(params)}), method={}, rules=rules,
    needs_base=False, quantize=(), versions=environment.versions(),
  )  # fmt: skip


def proof(run: Path, before: bundle.Bundle, after: bundle.Bundle, split: str) -> dict[str, Any]:
  """How much two bundles differ on a split: {'on', 'examples', 'difference', 'flips', 'metrics'}.

  'difference' is the largest of any logit, both computed in float32; 'flips' counts the examples
  that are classified otherwise (regression: 0). 'metrics' are those of `after`, where there are
  labels.
  """
  part, data = _split(run, before, split)
  texts, pairs = (part.texts, part.pairs) if part else made_up(before)
  old, new = (
    Classifier.of(dataclasses.replace(b, dtype='float32'), str(run)).logits(texts, pairs)
    for b in (before, after)
  )
  said = {
    'on': split if part else 'made-up texts',
    'examples': len(texts),
    'difference': float(np.abs(old - new).max()),
    'flips': flips(old, new, before.kind),
  }
  if part and part.labels is not None:
    names = data.metrics
    said['metrics'] = scoring.score(names, losses.build(data.kind), part.labels, new, data.kind)
  log.info(
    'compared on %d of %s: logits differ by up to %.2g, %d predictions do',
    said['examples'], said['on'], said['difference'], said['flips'],
  )  # fmt: skip
  return said


def check(said: Mapping[str, Any], tolerance: float) -> None:
  """Raises InputError where a proof's difference is above the tolerance."""
  if not said['difference'] <= tolerance:
    raise InputError(
      '--tolerance', f'logits that differ by up to {said["difference"]:.3g}, and {said["flips"]} '
      f'predictions of {said["examples"]} that change', f'at most {tolerance:g}',
      'nothing was written; raise it if that is good enough, or keep the delta beside the base',
    )  # fmt: skip


def made_up(content: bundle.Bundle) -> tuple[list[str], list[str] | None]:
  """Texts of random tokens, for runs whose data is not at hand."""
  tokenizer = hub.tokenizer_from(content.tokenizer)
  draw = np.random.default_rng(0).integers
  size = tokenizer.get_vocab_size()

  def some():
    return [tokenizer.decode(draw(0, size, draw(1, 24)).tolist()) or 'a' for _ in range(_MADE_UP)]

  return some(), some() if 'pair' in content.columns else None


def _split(run: Path, content: bundle.Bundle, split: str):
  """(Split, Dataset) of a run's own task; (None, None) where it has none."""
  data = assemble.own_task(run, content.labels)
  if data is None:
    return None, None
  if split not in data.splits:
    raise InputError('--split', repr(split), f'one of {", ".join(data.splits)}', 'choose it')
  return data.splits[split], data


def flips(old: np.ndarray, new: np.ndarray, kind: str) -> int:
  """How many examples are classified otherwise by other logits [N, C]; of numbers, none are."""
  if kind == 'regression':
    return 0
  if kind == 'multi':
    return int(np.any((old > 0) != (new > 0), axis=-1).sum())
  return int(np.sum(old.argmax(-1) != new.argmax(-1)))
