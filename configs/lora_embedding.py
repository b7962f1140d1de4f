"""LoRA of the words: query, value and embeddings (Hu et al. 2021, arXiv 2106.09685).

For texts whose words mean something else than where the encoder was trained. Both fold into the
weights.

    efft train --config=configs/lora_embedding.py:task=rotten_tomatoes --workdir=runs/lora_embedding
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.method = {
    'lora': {'fn': 'lora.lora', 'rank': 8, 'alpha': 16.0},
    'words': {'fn': 'lora.embedding', 'rank': 8, 'alpha': 16.0},
  }
  config.rules = (
    ('params/head/.*', 'head'),
    ('delta/.*', 'delta'),
    ('params/.*', 'frozen'),
  )
  config.optim.lr = 1e-3
  return config
