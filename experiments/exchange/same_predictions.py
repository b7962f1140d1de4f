"""Exports a run and compares what the libraries themselves predict with it, on a whole split.

    python experiments/exchange/same_predictions.py --run=runs/mrpc [--split=validation]

Writes the run in every format that can hold it, loads each with the library that it is for
(transformers, sentence-transformers, HF PEFT, AdapterHub; those that are installed), classifies the
split of the run's own task, and prints how many predictions and how much of the logits differ.
Needs torch.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from absl import app, flags

from efft import assemble, bundle, exchange
from efft.classifier import Classifier
from efft.errors import InputError

RUN = flags.DEFINE_string('run', None, 'run folder', required=True)
SPLIT = flags.DEFINE_string('split', 'validation', 'split of its task')
SENTENCES = 'sentence-transformers'
AUTO = transformers.AutoModelForSequenceClassification


def whole(folder, base, labels):
  del base, labels
  return AUTO.from_pretrained(folder)


def peft(folder, base, labels):
  from peft import PeftModel

  return PeftModel.from_pretrained(AUTO.from_pretrained(base, num_labels=labels), folder)


def adapterhub(folder, base, labels):
  import adapters

  model = AUTO.from_pretrained(base, num_labels=labels)
  adapters.init(model)
  name = model.load_adapter(str(folder), with_head=True, use_safetensors=True)
  model.set_active_adapters(name)
  return model


LOADERS = {'hf': whole, 'peft': peft, 'adapterhub': adapterhub}


def by_sentence_transformers(folder, part) -> np.ndarray:
  from sentence_transformers import SentenceTransformer

  pairs = part.pairs and list(map(list, zip(part.texts, part.pairs, strict=True)))
  return SentenceTransformer(str(folder), device='cpu').encode(pairs or part.texts)


def by_transformers(model, tokenizer, part, length: int) -> np.ndarray:
  found = []
  with torch.no_grad():
    for i in range(0, len(part), 32):
      pairs = None if part.pairs is None else part.pairs[i : i + 32]
      rows = tokenizer(
        part.texts[i : i + 32], pairs,
        padding=True, truncation=True, max_length=length, return_tensors='pt',
      )  # fmt: skip
      found.append(model(**rows).logits.numpy())
  return np.concatenate(found)


def main(argv):
  del argv
  content = bundle.load(RUN.value)
  part = assemble.own_task(Path(RUN.value), content.labels).splits[SPLIT.value]
  expected = Classifier.load(RUN.value).logits(part.texts, part.pairs)
  accuracy = np.mean(expected.argmax(-1) == part.labels)
  print(f'efft: {len(part)} rows, accuracy {accuracy:.4f}')
  for form in (*LOADERS, SENTENCES):
    with tempfile.TemporaryDirectory() as scratch:
      try:
        exchange.export(RUN.value, Path(scratch) / form, form, split=SPLIT.value)
      except InputError as error:
        print(f'{form}: refused: {error}')
        continue
      try:
        folder, base = Path(scratch) / form, content.base['path']
        if form == SENTENCES:
          found = by_sentence_transformers(folder, part)
        else:
          model = LOADERS[form](folder, base, len(content.labels)).eval()
          tokenizer = transformers.AutoTokenizer.from_pretrained(base)
          found = by_transformers(model, tokenizer, part, content.max_length)
      except ImportError as error:
        print(f'{form}: not compared: {error}')
        continue
    same = int(np.sum(found.argmax(-1) == expected.argmax(-1)))
    print(
      f'{form} (transformers {transformers.__version__}): {same} of {len(part)} predictions are '
      f'the same, logits differ by up to {np.abs(found - expected).max():.1e}'
    )


if __name__ == '__main__':
  app.run(main)
