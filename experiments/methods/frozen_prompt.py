"""Why prompts end below the head alone on stsb: what a prompt costs that does not train at all.

    python experiments/methods/frozen_prompt.py --data=FOLDER

configs/prompt.py with the prompt where it starts and the head at the rate of the head alone, on the
budget of run.py. Records go to frozen_prompt.jsonl.
"""

from pathlib import Path

import run
from absl import app, flags

HERE = Path(__file__).parent


def main(argv):
  del argv
  flags.FLAGS.output = str(HERE / 'frozen_prompt.jsonl')
  rate = head_rate()

  def settings(*args):
    config = run.settings(*args)
    config.optim.groups['delta'] = {'lr': 1e-30, 'weight_decay': 0.0}
    return config

  run.one('stsb', 'prompt', [(seed, 1.0, rate) for seed in run.SEEDS], settings)


def head_rate() -> float:
  """What records.jsonl has as the head's best rate."""
  records = [r for r in run.files.read_jsonl(HERE / 'records.jsonl') if r['task'] == 'stsb']
  best = run.search(records, 'stsb', run.HEAD)[1]
  return next(r['lr'] for r in records if (r['config'], r['factor']) == (run.HEAD, best))


if __name__ == '__main__':
  app.run(main)
