"""Tuned, then int8 products: a scale for each output of a kernel and for each token

    efft train --config=configs/int8.py:task=rotten_tomatoes --workdir=runs/int8

or, of a run that is there (deltas stay float beside the integers):

    efft compress --run=runs/lora --config=configs/int8.py --workdir=runs/int8

No example is needed; the log says by how much each layer's output is off on some of them.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.stages = {
    's1_tune': {},
    's2_int8': {'fn': 'quant.quantize', 'format': 'int8'},
  }
  return config
