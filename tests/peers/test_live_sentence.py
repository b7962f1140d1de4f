"""Exported runs in sentence-transformers itself. For the lane that has torch: `make peers`."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from moved import LABELS, trained
from sentence_transformers import SentenceTransformer
from test_hf_format import ARCHITECTURES

from efft import exchange
from efft.classifier import Classifier

TEXTS = ['a gorgeous, witty movie', 'a waste of time', 'boring', 'the plot was bad, i loved it']


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('method', ['lora', 'full'])
def test_sentence_transformers_gives_the_logits(architecture, method, tmp_path):
  trained(tmp_path / 'run', method, 1, architecture=architecture, pooling='mean')
  exchange.export(tmp_path / 'run', tmp_path / 'made', 'sentence-transformers')
  model = SentenceTransformer(str(tmp_path / 'made'), device='cpu')
  assert model.max_seq_length == 24
  labels = model[0].auto_model.config.id2label
  assert tuple(labels[i] for i in range(3)) == LABELS
  own = Classifier.load(tmp_path / 'run')
  np.testing.assert_allclose(model.encode(TEXTS), own.logits(TEXTS), rtol=0, atol=1e-5)
  pairs = [list(pair) for pair in zip(TEXTS, TEXTS[::-1], strict=True)]
  np.testing.assert_allclose(model.encode(pairs), own.logits(TEXTS, TEXTS[::-1]), rtol=0, atol=1e-5)
