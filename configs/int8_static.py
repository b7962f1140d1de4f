"""Tuned, then int8 with calibrated ranges for groups of like inputs (PEG, 2109.12948)

    efft train --config=configs/int8_static.py:task=rotten_tomatoes --workdir=runs/int8

Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948: groups have to divide the layers' widths.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.stages = {
    's1_tune': {},
    's2_int8': {
      'fn': 'quant.quantize', 'format': 'int8_static', 'ranges': 'mse', 'symmetric': False,
      'groups': 4,
    },
  }  # fmt: skip
  return config
