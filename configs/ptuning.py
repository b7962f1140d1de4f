"""P-tuning: a prompt that a small network computes (Liu et al. 2021, arXiv 2103.10385).

The paper's network is encoder='lstm'. Only its output acts after training. The longest text and
the prompt share the encoder's positions: 512 - 20 with BERT.

    efft train --config=configs/ptuning.py:task=rotten_tomatoes --workdir=runs/ptuning
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'ptuning': {'fn': 'prompt.ptuning', 'length': 20, 'encoder': 'mlp', 'hidden': 128}
  }
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
