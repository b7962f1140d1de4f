"""LoRA beside an int8 base against LoRA beside the float one: what the integers cost in accuracy.

    export EFFT_DATA=FOLDER    # mrpc/ and cola/, where the hub is out of reach; r8 is a package
    efft sweep --study=experiments/lora_int8/study.py --workdir=experiments/lora_int8

The same rate, steps and seeds for both, so that nothing is chosen and both halves of the validation
split and, where it has labels, the test split may be read. Kernels and large tables of the base are
int8; products forward and for the gradient of the inputs are of integers.
"""

from efft.sweep import Run, product, seeds

# task: (longest text, steps of 16)
TASKS = {'mrpc': (64, 300), 'cola': (24, 1200), 'r8': (64, 300)}
ARMS = {'float': 'float', 'int8': 'int8', 'int8, gradients rounded at random': 'int8_stochastic'}


def runs():
  for task, (length, steps) in TASKS.items():
    for arm, quantize in ARMS.items():
      fixed = {
        'model.max_length': length, 'train.batch_size': 16, 'train.steps': steps,
        'train.eval_steps': steps, 'train.save': 'last', 'optim.lr': 1e-3,
        'model.quantize': () if quantize == 'float' else quantize,
      }  # fmt: skip
      for overrides in product([fixed], seeds(5)):
        yield Run(arm, f'configs/lora.py:task={task}', overrides)
