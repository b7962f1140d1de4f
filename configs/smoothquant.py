"""Tuned, then int8 with calibrated ranges of smoothed inputs (SmoothQuant, 2211.10438)

    efft train --config=configs/smoothquant.py:task=rotten_tomatoes --workdir=runs/int8

Xiao et al. 2022, https://arxiv.org/abs/2211.10438, their O3: one static scale for all inputs of a
layer. With 'format': 'int8' it is their O1, a scale for each token.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.stages = {
    's1_tune': {},
    's2_int8': {'fn': 'quant.quantize', 'format': 'int8_static', 'smooth': 0.5},
  }
  return config
