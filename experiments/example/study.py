"""Three ways to fine-tune on film reviews, two seeds each: a study of a few minutes.

    efft sweep --study=experiments/example/study.py --workdir=runs/example

Half of the validation split chooses checkpoints, the other half is reported.
"""

from efft.sweep import Run, grid, product, seeds

LATENCY = [(1, 32, 'f32')]
# Little enough to wait for, and a rate high enough to learn something in so few steps.
SHORT = {
  'task.fraction': [0.1],
  'train.batch_size': [16],
  'train.steps': [40],
  'train.eval_steps': [40],
  'model.max_length': [32],
  'optim.lr': [3e-3],
}


def runs():
  for method in ('head', 'bitfit', 'lora'):
    for overrides in product(grid(SHORT), seeds(2)):
      yield Run(method, f'configs/{method}.py:task=rotten_tomatoes', overrides)
