"""Xu et al. 2023 (arXiv 2312.12148): the thirteen rows of their GLUE table, on four tasks.

    export EFFT_DATA=FOLDER    # sst2/, mrpc/, cola/ and stsb/, where the hub is out of reach
    efft sweep --study=experiments/xu2023/study.py --workdir=experiments/xu2023

The survey tunes RoBERTa on eight tasks of GLUE; here all-MiniLM-L6-v2 on the four smaller ones, 250
steps (cola: 800), three seeds that train together. Of two learning rates, the one below and three
times that, the half of the validation split that is not reported chooses (and has chosen the lower
ones, in `experiments/methods`). In bfloat16, which saves a third of the time where processors have
it. For the paper's own models: change MODEL and TASKS.
"""

from efft.sweep import Run, grid, product, seeds

SPLITS = ('validation', 'report')  # of these tasks only mrpc and stsb have labels to test with
MODEL = 'all-MiniLM-L6-v2'
# task: (longest text, steps, batch); on cola nothing leaves the majority class before step 400.
TASKS = {'cola': (20, 800, 16), 'sst2': (40, 250, 8), 'mrpc': (64, 250, 8), 'stsb': (48, 250, 8)}
# row of the table: (config, the lower learning rate)
ROWS = {
  'FT': ('full', 1e-4),
  'Adapter^S': ('houlsby', 5e-4),
  'Prompt-tuning': ('prompt', 1e-2),
  'Prefix-tuning': ('prefix', 1e-3),
  '(IA)^3': ('ia3', 6e-3),
  'BitFit': ('bitfit', 1e-3),
  'Child-Tuning_D': ('child_d', 1e-4),
  'LoRA': ('lora', 1e-3),
  'AdaLoRA': ('adalora', 3e-3),
  'MAM': ('mam', 1e-4),
  'ProPELT_Adapter': ('propetl_adapter', 1e-3),
  'ProPELT_Prefix': ('propetl_prefix', 1e-3),
  'ProPELT_LoRA': ('propetl_lora', 1e-3),
}


def runs():
  for task, (length, steps, batch) in TASKS.items():
    for row, (config, rate) in ROWS.items():
      fixed = {
        'model.name': MODEL, 'model.max_length': length, 'train.batch_size': batch,
        'train.steps': steps, 'train.eval_steps': steps, 'train.save': 'last',
        'model.dtype': 'bfloat16', 'train.group_by_length': task == 'cola',
      }  # fmt: skip
      for overrides in product([fixed], grid({'optim.lr': [rate, 3 * rate]}), seeds(3)):
        yield Run(row, f'configs/{config}.py:task={task}', overrides)
