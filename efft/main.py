"""The command line: `efft <verb> --flags`, each verb a thin layer over a function of `efft.run`.

Here verbs and flags have their names and words; `efft.verbs` has what they do. Help and refusals
answer at once.
"""

import sys

from efft import command, verbs
from efft.command import CONFIG, STAGES, Flag, Verb

HOWS = (
  'linear', 'ties', 'dare_linear', 'dare_ties', 'magnitude_prune', 'cat', 'svd',
  'ties_svd', 'dare_linear_svd', 'dare_ties_svd', 'magnitude_prune_svd',
)  # fmt: skip
RUN = Flag('run', 'folder of a finished run', None, True)
TOLERANCE = Flag('tolerance', 'the largest difference of a logit that merging may make', '1e-3')
COMPARED = Flag('split', 'of the task, on which both forms are compared', 'validation')
OVERRIDES = """\
Any field of the config can be set: --config.optim.lr=3e-4 --config.method.lora.rank=4
`efft train --helpfull --config=FILE` lists them, `efft methods` the configs that come with efft."""

RECORDS = Flag('runs', 'records.jsonl, or folders with one: runs/a,runs/b', None, True)
SCORED = Flag(
  'split',
  'report: the half of validation that chose nothing; held_out: test, else that',
  'report',
  False,
  ('report', 'test', 'held_out'),
)

WORKDIR = Flag('workdir', 'run folder to make, or to continue', None, True)
RESUME = Flag(
  'resume', 'what to do with a run that is there', 'auto', False, ('auto', 'never', 'must')
)

VERBS = {
  'train': Verb(
    verbs.train,
    'fine-tune a model on a task and keep the result in a run folder',
    (CONFIG, WORKDIR, RESUME),
    OVERRIDES,
  ),
  'compress': Verb(
    verbs.compress,
    'prune or quantise a finished run, by the stages of a config',
    (RUN, STAGES, WORKDIR, RESUME),
    OVERRIDES,
  ),
  'evaluate': Verb(
    verbs.evaluate,
    'score a run on a split of its task',
    (RUN, Flag('split', 'a split of the task: train, validation, test', 'validation')),
  ),
  'predict': Verb(
    verbs.predict,
    'classify texts with a run: a file, or standard input line by line',
    (
      RUN,
      Flag('input', 'csv, tsv, jsonl, parquet or txt; without it, standard input'),
      Flag('output', 'jsonl file to write; without it, standard output'),
      Flag('text_column', "column of --input; without it, the task's own"),
    ),
  ),
  'combine': Verb(
    verbs.combine,
    'make one run of several: sums, TIES, DARE, low-rank updates; with their heads',
    (
      Flag('runs', 'folders of finished runs on one base model: runs/a,runs/b', None, True),
      Flag('output', 'run folder to make', None, True),
      Flag('how', 'what to do with the task vectors', 'linear', False, HOWS),
      Flag('weights', 'one a run: 0.7,0.3; without it, equal'),
      Flag('density', 'share of the numbers that pruning keeps; without it, 0.5'),
      Flag('majority', 'how TIES elects signs: total (without it) or frequency'),
      Flag('rank', 'of what svd leaves; without it, the largest of the runs'),
      Flag('head', 'what to do with the heads', 'keep', False, ('keep', 'average', 'union')),
      Flag('seed', "of DARE's masks", '0'),
    ),
  ),
  'merge': Verb(
    verbs.merge,
    'fold what a run has trained into the weights, and prove that it says the same',
    (
      RUN,
      Flag('output', 'run folder to make', None, True),
      TOLERANCE,
      COMPARED,
    ),
  ),
  'export': Verb(
    verbs.export,
    'write a run for transformers, sentence-transformers, HF PEFT or AdapterHub',
    (
      RUN,
      Flag('output', 'folder to make', None, True),
      Flag(
        'format',
        'auto, hf, sentence-transformers: merged, for these libraries, auto by how the run pools; '
        'others: the adapter with its head',
        'auto',
        False,
        ('auto', 'hf', 'sentence-transformers', 'peft', 'adapterhub'),
      ),
      TOLERANCE,
      COMPARED,
      Flag('layout', "of AdapterHub's weights", 'safetensors', False, ('safetensors', 'bin')),
      Flag('name', "of the adapter in AdapterHub's files", 'efft'),
    ),
  ),
  'import': Verb(
    verbs.import_,
    'make a run of an adapter that HF PEFT or AdapterHub wrote',
    (
      Flag('source', 'its folder, or a Hugging Face id', None, True),
      Flag('base', 'the encoder it was trained on: a folder or a Hugging Face id', None, True),
      Flag('output', 'run folder to make', None, True),
      Flag('task', 'its task, to evaluate and train on: mrpc, or reviews.csv,text=review'),
      Flag('labels', "class names in the order of its head's outputs: bad,good"),
      Flag('max_length', 'tokens', '128'),
    ),
  ),
  'bench': Verb(
    verbs.bench,
    'measure how long a run takes to answer, by batch, length and precision',
    (
      RUN,
      Flag('batch', 'texts at a time', '1,8,32'),
      Flag('length', 'tokens of each; without it, 32,128,512 as far as the model goes'),
      Flag('precision', 'f32, bf16; int8: merged, then rounded', 'f32,bf16,int8'),
      Flag('merged', 'fold what was trained into the weights first', False),
      Flag('output', 'JSONL file to which a record of the run with these times is added'),
      Flag('seconds', 'for how long each combination is measured', '2'),
    ),
  ),
  'sweep': Verb(
    verbs.sweep,
    'make the runs of a study that are not recorded yet',
    (
      Flag('study', 'a Python file that yields runs, as experiments/example/study.py', None, True),
      Flag('workdir', 'folder of records.jsonl; several sweeps may share it', None, True),
      Flag('shard', 'i/n: every n-th run, from the i-th', '0/1'),
      Flag('jobs', 'processes at once; on a CPU each gets its share of the cores', '1'),
      Flag('dry_run', 'list the runs and what is known of them', False),
      Flag('retry_failed', 'make runs again that have failed', False),
    ),
    'Stopped in any way, the same command goes on; a run that trained alone, where it was.',
  ),
  'report': Verb(
    verbs.report,
    'tables, plots and a page of what recorded runs reach and cost',
    (
      RECORDS,
      Flag('output', 'folder to make; an earlier report is replaced', None, True),
      Flag('against', 'other runs: what has changed since, arm by arm'),
      Flag('baseline', 'arm that others are tested against; without it, full or the largest'),
      SCORED,
      Flag('title', 'of the page', 'What it costs'),
    ),
  ),
  'recommend': Verb(
    verbs.recommend,
    'the best recorded configuration under limits, and what each limit costs',
    (
      RECORDS,
      Flag('task', 'of the records, where they hold several'),
      Flag('output', 'folder to make: config.json and the recommendation'),
      SCORED,
      *(Flag(name, about) for name, about in verbs.LIMITS.items()),
      Flag('latency_batch', 'texts a call; without it, 1 where that was measured'),
      Flag('latency_length', 'tokens of each; without it, 128 where that was measured'),
      Flag('size', 'of --max_size_mb', 'whole', False, ('whole', 'bundle')),
      Flag('memory', 'of --max_memory_mb', 'step', False, ('step', 'inference', 'peak')),
    ),
  ),
  'inspect': Verb(
    verbs.inspect,
    'show the data, the model and what would train, without training',
    (CONFIG,),
    OVERRIDES,
  ),
  'tasks': Verb(verbs.tasks, 'list the tasks'),
  'methods': Verb(verbs.methods, 'list the methods, one config file each'),
  'fetch': Verb(
    verbs.fetch,
    'download a task or a model into the cache',
    (Flag('task', 'name of a task'), Flag('model', 'Hugging Face id')),
  ),
  'demo': Verb(
    verbs.demo,
    'LoRA on film reviews, from download to table',
    (
      Flag('workdir', 'run folder', 'runs/demo'),
      Flag('short', 'a few steps only', False),
    ),
  ),
}


INTRO = """\
efft: cheap fine-tuning of BERT-like encoders

  efft train    --config=configs/lora.py:task=rotten_tomatoes --workdir=runs/lora
  efft evaluate --run=runs/lora --split=test
  efft predict  --run=runs/lora --input=texts.csv --output=out.jsonl"""


def main(argv: list[str] | None = None) -> int:
  """Runs one command line (default: the process's own) and returns its exit code."""
  return command.run(VERBS, INTRO, sys.argv[1:] if argv is None else list(argv))
