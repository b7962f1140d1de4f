r"""Full fine-tuning by a teacher's classes (Hinton et al. 2015, arXiv 1503.02531).

    efft train --config=configs/distil.py:task=rotten_tomatoes --workdir=runs/student \
      --config.distil.teacher=runs/large --config.model.name=distilbert-base-uncased

The teacher may be of any size and architecture. Hidden states, attention maps and embeddings of one
with the same tokens have weights of their own, 0 here (another width goes through a learnt
projection); `--config.distil.hidden=0.3 --config.distil.hidden_loss=cosine
--config.distil.layers=last` is DistilBERT's.
"""

from efft.config import default


def get_config(arg=''):
  config = default(arg)
  config.optim.lr = 5e-5
  config.distil.temperature = 2.0
  config.distil.logits = 0.9
  config.distil.labels = 0.1
  return config
