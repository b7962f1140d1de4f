"""Heads, units and words removed, int8 what is left, and LoRA beside that, with a teacher

efft train --config=configs/prune_lora_int8.py:task=rotten_tomatoes --workdir=runs/small

efft compress --run=runs/full --config=configs/prune_lora_int8.py --workdir=runs/small
"""

from efft.config import default
from efft.fields import FULL


def get_config(arg=''):
  config = default(arg)
  config.optim.lr = 1e-3
  config.method = {'lora': {'fn': 'lora.lora', 'rank': 8}}
  config.rules = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('.*', 'frozen'))
  config.stages = {
    's1_tune': {'method': {}, 'rules': FULL, 'optim': {'lr': 1e-4}},
    's2_heads': {'fn': 'prune.heads', 'share': 0.33},
    's3_units': {'fn': 'prune.units', 'share': 0.5, 'multiple': 8},
    's4_words': {'fn': 'prune.words'},
    's5_int8': {'fn': 'quant.quantize'},
    's6_tune': {'distil': {'teacher': 'unpruned'}},
  }
  return config
