"""FourierFT: a thousand frequencies of each kernel (Gao et al. 2024, arXiv 2405.03003).

24,000 numbers in BERT-base, a twelfth of LoRA's, at positions that all kernels share. They
start at random, as in the paper. High rates: a coefficient is spread over a whole kernel.

    efft train --config=configs/fourierft.py:task=rotten_tomatoes --workdir=runs/fourierft
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {'fourierft': {'fn': 'spectral.fourierft', 'n_frequency': 1000, 'scaling': 150.0}}
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 3e-2
  return config
