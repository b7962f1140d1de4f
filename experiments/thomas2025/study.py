"""Thomas 2025 (ESP-IJACT 3(3):1-7): fine-tuning, adapters, pruning, quantisation, and all at once.

    export EFFT_DATA=FOLDER    # sst2/, where the hub is out of reach; the others are packages
    efft sweep --study=experiments/thomas2025/study.py --workdir=experiments/thomas2025

The paper compares adapters and LoRA, the removal of layers, and quantisation on sentiment and topic
classification, by training and inference speed, memory and score; it names neither models nor
numbers, so directions are compared. Here: all-MiniLM-L6-v2, two tasks of each kind, three seeds.
Short texts and few steps, so that it ends within hours on two cores. Runs are trained one by one,
because their speed and memory are what is compared: one core each, with nothing else on the machine
but, at the most, another shard on another core:

    taskset -c 0 efft sweep --study=... --workdir=... --shard=0/2
    taskset -c 1 efft sweep --study=... --workdir=... --shard=1/2

`paper.py` asks for a larger encoder.
"""

from efft.sweep import Run, product, seeds

POPULATIONS = False
LATENCY = [(1, 64, 'f32'), (32, 64, 'f32')]
SPLITS = ('validation', 'report')  # the test splits are long
# All arms train as long; those that prune spend the last AFTER of it on what is left.
STEPS, AFTER, BATCH = 375, 125, 8
TASKS = {'sst2': 48, 'rotten_tomatoes': 48, 'r8': 64, '20newsgroups': 96}
LORA = {'method': {'lora': {'fn': 'lora.lora'}}, 'optim': {'lr': 2e-3}}
LORA['rules'] = (('params/head/.*', 'head'), ('delta/.*', 'delta'), ('.*', 'frozen'))
LAYERS = {'fn': 'prune.layers', 'remove': 0.5, 'how': 'spread'}
TRIPLE = {'distil': {'teacher': 'unpruned', 'hidden': 0.3, 'hidden_loss': 'cosine'}}
TRIPLE['distil']['layers'] = 'last'
AGAIN = {'train': {'steps': AFTER, 'eval_steps': AFTER}}
INT8 = {'fn': 'quant.quantize', 'format': 'int8'}

# config, what it changes, stages
ARMS = {
  'head': ('head', {'optim.lr': 3e-3}, {}),
  'full': ('full', {'optim.lr': 1e-4}, {}),
  'adapter': ('pfeiffer', {'optim.lr': 1e-3}, {}),
  'lora': ('lora', {'optim.lr': 2e-3}, {}),
  'layers': ('full', {'optim.lr': 1e-4}, {'s1': {}, 's2': LAYERS, 's3': {**TRIPLE, **AGAIN}}),
  'int8': ('full', {'optim.lr': 1e-4}, {'s1': {}, 's2': INT8}),
  'lora on int8': ('lora_int8', {'optim.lr': 2e-3}, {}),
  'adapter on int8': ('pfeiffer', {'optim.lr': 1e-3, 'model.quantize': 'int8'}, {}),
  'layers + lora': (
    'full', {'optim.lr': 1e-4}, {'s1': {}, 's2': LAYERS, 's3': {**LORA, **TRIPLE, **AGAIN}},
  ),
  'layers + int8': (
    'full', {'optim.lr': 1e-4}, {'s1': {}, 's2': LAYERS, 's3': {**TRIPLE, **AGAIN}, 's4': INT8},
  ),
  'layers + int8 + lora': (
    'full', {'optim.lr': 1e-4},
    {'s1': {}, 's2': LAYERS, 's3': INT8, 's4': {**LORA, **TRIPLE, **AGAIN}},
  ),
}  # fmt: skip


def runs():
  for task, length in TASKS.items():
    for arm, (config, change, stages) in ARMS.items():
      steps = STEPS - AFTER if any('train' in stage for stage in stages.values()) else STEPS
      fields = {
        'model.max_length': length, 'train.batch_size': BATCH, 'train.steps': steps,
        'train.eval_steps': steps, 'train.save': 'last', **change,
      }  # fmt: skip
      if stages:
        fields['stages'] = stages
      for overrides in product([fields], seeds(3)):
        yield Run(arm, f'configs/{config}.py:task={task}', overrides)
