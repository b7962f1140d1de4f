"""Tuned, then 4 bits a weight, each making up for those before it (GPTQ, 2210.17323)

    efft train --config=configs/int4.py:task=rotten_tomatoes --workdir=runs/int4

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. A scale for 32 weights; products are float.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.stages = {
    's1_tune': {},
    's2_int4': {
      'fn': 'quant.quantize', 'format': 'int4', 'weights': 'mse', 'rounding': 'gptq',
    },
  }  # fmt: skip
  return config
