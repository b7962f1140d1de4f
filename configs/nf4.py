"""Tuned, then 4 bits a weight: 16 quantiles of the normal distribution (NF4, 2305.14314)

    efft train --config=configs/nf4.py:task=rotten_tomatoes --workdir=runs/nf4

Dettmers et al. 2023, https://arxiv.org/abs/2305.14314. A scale for 64 weights, which stays float32;
products are float. To train beside such a base, set config.model.quantize.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.stages = {
    's1_tune': {},
    's2_nf4': {'fn': 'quant.quantize', 'format': 'nf4'},
  }
  return config
