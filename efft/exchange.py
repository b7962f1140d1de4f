"""Runs as other libraries hold them, and theirs as runs."""

import dataclasses
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from efft import bundle, environment, files, merging, starting, transfer, tree
from efft import config as configs
from efft.data import sources
from efft.errors import InputError
from efft.interop import adapterhub_format, containers, foreign, hf_format, peft_format, st_format
from efft.models import hub
from efft.models.encoder import EncoderConfig
from efft.peft import base as peft

log = logging.getLogger(__name__)

AUTO = 'auto'
_WHOLE = {'hf': hf_format, 'sentence-transformers': st_format}
_MODULES = {'peft': peft_format, 'adapterhub': adapterhub_format}
FORMATS = (AUTO, *_WHOLE, *_MODULES)
LAYOUTS = tuple(adapterhub_format.LAYOUTS)
_EXACT = 1e-4  # of a logit, between a run and what another library's file says of it


def export(
  run,
  output,
  format: str = AUTO,  # noqa: A002 - the flag's name
  *,
  tolerance: float = merging.TOLERANCE,
  split: str = 'validation',
  layout: str = 'safetensors',
  name: str = 'efft',
) -> dict[str, Any]:
  """Writes a run as a folder that another library loads.

  Args:
    run: a run folder or a bundle.
    output: the folder to make.
    format: 'hf', a whole model with the deltas merged, for transformers'
      AutoModelForSequenceClassification; 'sentence-transformers', the same where the mean of all
      tokens is pooled; 'auto', the one of these two that holds the run; 'peft' and 'adapterhub',
      the adapter with its head.
    tolerance: the largest difference of any logit that merging may make (see `merging.merge`), or
      that the other library's float base makes to an adapter that was trained beside a quantised
      one. Other adapters are exact.
    split: of the run's task, on which both forms are compared.
    layout: of AdapterHub's weights, 'safetensors' or 'bin'.
    name: of the adapter, in AdapterHub's files.

  Returns:
    {'format', 'files', 'difference', 'flips', 'on', 'examples', 'notes'}.

  Raises:
    InputError: what the library cannot compute exactly, with the formats that can hold it; nothing
      is written.
  """
  run, output = Path(run), Path(output)
  for flag, value, known in (('--format', format, FORMATS), ('--layout', layout, LAYOUTS)):
    if value not in known:
      raise InputError(flag, repr(value), f'one of {", ".join(known)}', 'choose one')
  if output.exists():
    raise InputError('--output', f'{str(output)!r}, which exists', 'a new name', 'choose another')
  content = bundle.load(run)
  if format == AUTO:
    format = 'sentence-transformers' if content.pooling == 'mean' else 'hf'  # noqa: A001
  if format in _WHOLE:
    contents, said, notes = _whole(run, content, format, tolerance, split)
  else:
    contents, said, notes = _adapter(run, content, format, layout, name, split, tolerance)
  said.pop('metrics', None)
  contents['README.md'] = _card(run.name, content, format, said, notes).encode()
  with files.atomic_folder(output) as temp:
    for file, data in contents.items():
      (temp / file).parent.mkdir(parents=True, exist_ok=True)
      files.atomic_write(temp / file, data)
  for note in notes:
    log.info('note: %s', note)
  return {'format': format, 'files': sorted(contents), **said, 'notes': notes}


def _whole(run: Path, content: bundle.Bundle, format: str, tolerance: float, split: str):
  """(files, proof, notes) of a merged checkpoint."""
  cfg = EncoderConfig.from_dict(content.encoder)
  _WHOLE[format].check(cfg)
  fixed = peft.fixed(peft.build(content.method))
  if fixed:
    able = [other for other in _MODULES if _holds(content, other)]
    raise InputError(
      f'--format={format}', f'{", ".join(fixed)}, which cannot be folded into the weights',
      'methods that merge (`efft methods` says which)',
      f'use --format={" or --format=".join(able)}' if able else 'keep the bundle',
    )  # fmt: skip
  whole = merging.merged(content)
  said = merging.proof(run, content, whole, split)
  merging.check(said, tolerance)
  folder = Path(content.base['path'])
  model = hf_format.Model(
    cfg, tree.unflatten(whole.leaves)['params'], content.labels, content.kind, content.tokenizer,
    content.max_length, folder if folder.is_dir() else None,
  )  # fmt: skip
  contents, notes = _WHOLE[format].write(model)
  return contents, said, notes


def _adapter(
  run: Path, content: bundle.Bundle, format: str, layout: str, name: str, split: str,
  tolerance: float,
):  # fmt: skip
  """(files, proof, notes) of an adapter: written, read again, and compared."""
  base = starting.base(content)
  _check_beside(content, base, format)
  contents = _written(content, base, format, layout, foreign.plain(name, '--name'))
  with tempfile.TemporaryDirectory() as scratch:
    for file, data in contents.items():
      (Path(scratch) / file).parent.mkdir(parents=True, exist_ok=True)
      (Path(scratch) / file).write_bytes(data)
    again = _MODULES[format].read(Path(scratch), base)
  # Another library puts it beside the float base.
  back = dataclasses.replace(content, **_of(again, base), quantize=())
  said = merging.proof(run, content, back, split)
  merging.check(said, tolerance if content.quantize else _EXACT)
  notes = list(again.notes)
  if content.quantize:
    notes.append('trained beside a quantised base, which no file of an adapter can say')
  return contents, said, notes


def _check_beside(content: bundle.Bundle, base: hub.Base, format: str) -> None:
  """Refuses adapters that no checkpoint of another library could be the base of."""
  cfg = EncoderConfig.from_dict(content.encoder)
  sizes = ('heads', 'mlp', 'hidden', 'vocab_size')
  pruned = any(getattr(cfg, name) != getattr(base.cfg, name) for name in sizes)
  if pruned or bundle.is_there(base.folder):
    what = 'an encoder that was pruned' if pruned else f'{base.name}, a run of efft, as its base'
    raise InputError(
      f'--format={format}', what, 'an adapter beside a checkpoint as it was', 'use --format=auto'
    )


def _written(content: bundle.Bundle, base: hub.Base, format: str, layout: str, name: str):
  leaves = transfer.whole(content, lambda: base.params)
  adapter = foreign.Adapter(content.method, leaves, content.rules, content.labels, content.kind)
  if format == 'adapterhub':
    return adapterhub_format.write(adapter, base, layout=layout, name=name)
  return peft_format.write(adapter, base)


def _holds(content: bundle.Bundle, format: str) -> bool:
  try:
    _written(content, starting.base(content), format, 'safetensors', 'efft')
    return True
  except InputError:
    return False


def _of(adapter: foreign.Adapter, base: hub.Base) -> dict[str, Any]:
  """The fields of a bundle that an adapter decides."""
  return {
    'leaves': dict(adapter.leaves),
    'method': configs.resolve({'task': {'name': '-'}, 'method': adapter.method})['method'],
    'rules': tuple(adapter.rules),
    'encoder': base.cfg.to_dict(),
    'pooling': base.cfg.pooling,
    'needs_base': transfer.needs_base(adapter.leaves, {'params': base.params}),
  }


def import_adapter(
  source,
  base: str,
  output,
  *,
  task: str | None = None,
  labels: Sequence[str] | None = None,
  max_length: int = 128,
) -> dict[str, Any]:
  """Makes a run folder of an adapter that HF PEFT or AdapterHub wrote; which, is found by itself.

  Args:
    source: its folder, or a Hugging Face id.
    base: the encoder that it was trained on: a folder or a Hugging Face id.
    output: the run folder to make. `predict` and `export` take it; `evaluate` and
      `train --config=OUTPUT/config.json --workdir=...`, which goes on from it, need `task`.
    task: as after `--config=FILE.py:task=`: 'mrpc', 'reviews.csv,text=review,label=stars'.
    labels: class names in the order of its head, where it has none itself, or other ones than the
      task. Where head and task name the same classes in another order, the task's order is taken
      and the head's columns follow; a head without names is taken to be in that order.
    max_length: tokens.

  Returns:
    {'method', 'labels', 'kind', 'numbers', 'notes'}.

  Raises:
    InputError: an adapter that cannot be read whole and exactly; nothing is written.
  """
  output, source = Path(output), str(source)
  if output.exists():
    raise InputError('--output', f'{str(output)!r}, which exists', 'a new name', 'choose another')
  folder = resolve(source)
  form = find_format(folder)
  module = _MODULES[form]
  checkpoint = hub.load(
    base, num_labels=module.num_labels(folder), pooling='cls', head='new', key=jax.random.key(0)
  )
  adapter = module.read(folder, checkpoint)
  config, data = None, None
  if task:
    given = configs.default(f'task={task}')
    given.model.name = str(base)
    config = configs.resolve(given)
    data = sources.load(**config['task'], seed=config['seed'])
  own = _named(adapter, labels)
  names, kind = _labels(own, adapter, checkpoint, data)
  if own and names:
    adapter = adapter._replace(leaves=_ordered(adapter.leaves, own, names))
  fields = _of(adapter, checkpoint)
  tokenizer = hub.tokenizer(checkpoint.folder, checkpoint.cfg.vocab_size)
  content = bundle.Bundle(
    **fields, tokenizer=tokenizer.to_str(), labels=names, kind=kind,
    max_length=min(max_length, checkpoint.cfg.max_length), dtype='float32',
    columns=data.columns if data else {'text': 'text', 'label': 'label'},
    base={
      'name': checkpoint.name, 'path': str(checkpoint.folder), 'sha256': checkpoint.sha256,
    },
    metrics={}, versions=environment.versions(),
  )  # fmt: skip
  done = {
    'format': form, 'method': sorted(adapter.method), 'labels': list(names), 'kind': kind,
    'numbers': int(sum(np.size(x) for x in adapter.leaves.values())), 'notes': list(adapter.notes),
  }  # fmt: skip
  with files.atomic_folder(output) as temp:
    bundle.save(temp / 'bundle', content)
    if config:
      files.write_json(temp / 'config.json', _continuing(config, content, output))
    files.write_json(temp / 'results.json', {'metrics': {}, 'imported': done})
    card = bundle.card(
      vars(content), title=f'{source}, imported', machine={'from': f'{form}: {source}'},
      command=f'efft predict --run={output} --input=texts.csv --output=out.jsonl',
    )  # fmt: skip
    files.atomic_write(temp / 'README.md', card)
  for note in adapter.notes:
    log.info('note: %s', note)
  return done


def resolve(source: str) -> Path:
  """The folder of an adapter: one that is there, or a Hugging Face id's, downloaded once."""
  folder = Path(source).expanduser()
  if folder.is_dir():
    return folder
  if folder.exists():
    raise InputError('--source', f'{source!r}, a file', 'a folder', 'pass its folder')
  if not re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', source) or '..' in source:
    fix = 'check the path; a Hugging Face id looks like owner/name'
    raise InputError('--source', f'no folder {source!r}', 'a folder or a Hugging Face id', fix)
  return hub.snapshot(source, containers.PATTERNS, '--source')


def find_format(folder: Path) -> str:
  """'peft' or 'adapterhub', by what adapter_config.json says."""
  if (folder / 'adapter_fusion_config.json').exists():
    return 'adapterhub'
  config = containers.config(folder, 'adapter_config.json')
  if 'peft_type' in config:
    return 'peft'
  if 'config' in config or 'model_type' in config:
    return 'adapterhub'
  raise InputError(
    str(folder / 'adapter_config.json'), 'neither peft_type nor config',
    "an adapter of HF PEFT ('peft_type') or AdapterHub ('config')", 'pass its folder',
  )  # fmt: skip


def _labels(own: tuple[str, ...], adapter: foreign.Adapter, base: hub.Base, data):
  """(class names in the order that the outputs are to have, kind); `own` as `_named` says."""
  count = base.cfg.num_labels
  kind = data.kind if data else adapter.kind or ('regression' if count == 1 else 'single')
  if kind == 'regression' and count == 1:
    return (), kind
  names = (data.labels if data else None) or own or base.labels or adapter.labels or ()
  if len(names) != count:
    raise InputError(
      '--labels', f'{len(names)} names ({", ".join(names)})' if names else 'no class names',
      f'{count}, one an output of the head', 'pass --labels=NAME,NAME,... in its order',
    )  # fmt: skip
  if own and sorted(own) != sorted(names):
    raise InputError(
      '--labels', f'the head of {", ".join(own)}', f'{", ".join(names)} as in the task',
      "pass the task's names in the order of the head",
    )  # fmt: skip
  return names, kind


def _named(adapter: foreign.Adapter, given) -> tuple[str, ...]:
  """The classes of an adapter's head in its order; () where it has none or numbers for names."""
  names = tuple(adapter.labels or ())
  return tuple(given or ()) or (() if names == tuple(map(str, range(len(names)))) else names)


def _ordered(leaves: Mapping, own: tuple[str, ...], names: tuple[str, ...]) -> Mapping:
  """The leaves with the head's columns in the order of `names`."""
  if own == names:
    return leaves
  if beside := [path for path in leaves if path.startswith('delta/head/')]:
    raise InputError(
      '--labels', f'{beside[0]} and the order {", ".join(own)}', f'{", ".join(names)}',
      'import it without --task',
    )  # fmt: skip
  return transfer.reordered(leaves, own, names)


def _continuing(config: Mapping, content: bundle.Bundle, output: Path) -> dict:
  """The config that evaluates an imported run, and with another --workdir trains it on."""
  config = dict(config)
  config['method'], config['rules'] = content.method, [list(rule) for rule in content.rules]
  config['model'] = config['model'] | {
    'pooling': content.pooling, 'max_length': content.max_length, 'head': 'keep',
    'init_from': [str(output)],
  }  # fmt: skip
  config['optim'] = config['optim'] | {'lr': 1e-3} if content.method else config['optim']
  return configs.resolve(config)


def _card(title: str, content: bundle.Bundle, format: str, said: Mapping, notes: Sequence) -> str:
  """README.md of an exported folder, with the front matter that the hub reads."""
  libraries = {'hf': 'transformers', 'adapterhub': 'adapter-transformers'}
  machine = {name: str(value) for name, value in said.items()}
  machine |= {f'note {i}': note for i, note in enumerate(notes, 1)}
  front = [
    '---',
    f'library_name: {libraries.get(format, format)}',
    f'base_model: {content.base["name"]}',
  ]
  front += ['pipeline_tag: text-classification', '---', '']
  use = {
    'hf': 'AutoModelForSequenceClassification.from_pretrained(FOLDER)',
    'sentence-transformers': 'SentenceTransformer(FOLDER).encode(texts)  # the logits',
    'peft': 'PeftModel.from_pretrained(base, FOLDER)',
    'adapterhub': 'model.load_adapter(FOLDER, with_head=True)',
  }
  card = bundle.card(vars(content), title=title, machine=machine, command=use[format])
  return '\n'.join(front) + card
