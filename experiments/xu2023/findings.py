"""README.md of this folder, from records.jsonl: the survey's table, and what it claims.

    python experiments/xu2023/findings.py

The same records give the same bytes. Plots are those of the folder report/:

    efft report --split=held_out --baseline=FT --runs=experiments/xu2023 \\
      --output=experiments/xu2023/report
"""

from pathlib import Path

import pandas as pd
from absl import app
from study import ROWS, TASKS

from efft import files
from efft.report import claims, records, selection

HERE = Path(__file__).parent
UNCOUNTED = ('Adapter^S', 'MAM')  # of these the survey's #TP seems to leave out the head
FAR = 5.0  # points
INTRODUCTION = """# Xu et al. 2023, thirteen rows of a GLUE table

all-MiniLM-L6-v2 in place of RoBERTa, four tasks of GLUE in bfloat16, three seeds: mean and standard
deviation of the metric x 100 (Matthews correlation, Pearson correlation, else accuracy) on the test
split, of cola, whose test split has no labels, on the half of the validation split that chooses
nothing. Steps: stsb 300, sst2 250, mrpc 450 of 8 examples, cola 800 of 16 of similar length; texts
are cut to 48, 40, 64 and 20 tokens. The other half of validation has chosen the rates: here, of
two, for FT, Adapter^S, Child-Tuning_D and MAM, and for the others in `experiments/methods`, on stsb
(for sst2 and mrpc as well) and on cola. The configs are those of `configs/`, with efft's defaults:
an adapter's width and a prefix' network are not the survey's. Cut: QQP, MNLI, QNLI and RTE, the
large model, generation, whole epochs; `paper.py` asks for the models, the tasks and the epochs.
Within a few hundred steps what learns slowly is behind for that alone: a disagreement is about such
budgets. Where ° stands, all seeds score exactly alike, or not above 0: one class for all, nothing
was learnt.

`#TP` counts as the survey seems to: all that trains, masks by their scores, the head included but
for Adapter^S and MAM, nothing for Child-Tuning_D. `trained`, `stored` (what 32 bits hold in the
bundle: masks as bits, prefixes expanded) and `head` are efft's counts. `memory` is what the
compiled training step of 8 pairs of mrpc (64 tokens) asks for, one run alone. Made by `efft sweep
--study=experiments/xu2023/study.py --workdir=experiments/xu2023` and `findings.py`.
"""


def table(rows: pd.DataFrame) -> str:
  lines = [
    f'| | {" | ".join(TASKS)} | average | #TP | trained | stored | head | memory, MB |',
    '|---|' + '--:|' * (len(TASKS) + 6),
  ]
  for name in ROWS:
    own = rows[rows['arm'] == name].set_index('task')
    cells = claims.scores(rows, name, TASKS, mark='°')
    if len(own):
      trained, stored, head = (
        int(own[f'parameters.{kind}'].max()) for kind in ('trained', 'stored', 'head')
      )
      theirs = trained - head * (name in UNCOUNTED)
      cells += ['-' if name == 'Child-Tuning_D' else f'{theirs:,}']
      memory = f'{own.at["mrpc", "memory_mb.step"]:.0f}' if 'mrpc' in own.index else '-'
      cells += [f'{trained:,}', f'{stored:,}', f'{head:,}', memory]
    else:
      cells += ['-'] * 5
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


def differences(rows: pd.DataFrame, name: str, other: str, column: str | None = None) -> dict:
  """Of each task and seed the score's difference in points, or the column's in percent."""
  found = {}
  for task in TASKS:
    both = [rows[(rows['arm'] == arm) & (rows['task'] == task)] for arm in (name, other)]
    if any(each.empty for each in both):
      continue
    new, old = (each.iloc[0] for each in both)
    if column:
      found[task] = [100 * (new[column] / old[column] - 1)]
    else:
      seeds = sorted(new['values'].keys() & old['values'].keys())
      found[task] = [100 * (new['values'][seed] - old['values'][seed]) for seed in seeds]
  return found


def by_score(rows: pd.DataFrame) -> list[claims.Claim]:
  def score(text, name, other, expected, **more):
    unit = ' points'
    return claims.judge(text, differences(rows, name, other), expected, unit=unit, **more)

  others = [name for name in ROWS if name != 'ProPELT_Adapter']
  averages = rows.groupby('arm')['validation'].agg(['mean', 'size'])
  averages = averages[averages['size'] == rows['task'].nunique()]['mean']
  known = [name for name in others if name in averages]
  second = max(known, key=lambda name: averages[name], default='no other with all tasks')
  return [
    score('ProPELT_Adapter is better than full fine-tuning', 'ProPELT_Adapter', 'FT', 'more'),
    score(
      'ProPELT_Adapter has the best average '
      f'(here: against {second}, the best of the others on validation)',
      'ProPELT_Adapter', second, 'more',
    ),
    score('Sequential adapters are better than full fine-tuning', 'Adapter^S', 'FT', 'more'),
    score('BitFit is better than full fine-tuning', 'BitFit', 'FT', 'more'),
    score('LoRA is level with full fine-tuning, within a point', 'LoRA', 'FT', 'same', margin=1.0),
    score('Child-Tuning_D is better than full fine-tuning', 'Child-Tuning_D', 'FT', 'more'),
    score(
      f'Prompt tuning is far behind full fine-tuning, by more than {FAR:g} points',
      'Prompt-tuning', 'FT', 'less', margin=FAR,
    ),
    score('Prefix tuning is behind full fine-tuning', 'Prefix-tuning', 'FT', 'less'),
    score('AdaLoRA is no better than LoRA', 'AdaLoRA', 'LoRA', 'not more'),
  ]  # fmt: skip


def by_memory(rows: pd.DataFrame) -> list[claims.Claim]:
  def memory(text, name, other, expected):
    found = differences(rows, name, other, 'memory_mb.step')
    return claims.judge(text, found, expected, unit=' %')

  return [
    memory('LoRA needs less memory than full fine-tuning', 'LoRA', 'FT', 'less'),
    memory('(IA)^3 needs less memory than full fine-tuning', '(IA)^3', 'FT', 'less'),
    memory('BitFit needs less memory than full fine-tuning', 'BitFit', 'FT', 'less'),
    memory('Sequential adapters need more memory than LoRA', 'Adapter^S', 'LoRA', 'more'),
    memory('ProPELT_Adapter needs more memory than LoRA', 'ProPELT_Adapter', 'LoRA', 'more'),
  ]  # fmt: skip


def main(argv):
  del argv
  found = records.read(HERE)
  rows, notes = selection.choose(selection.settings(found, 'held_out'), intervals=False)
  rows = rows.assign(**{
    column: [
      found.table.loc[list(each.values()), column].median() for each in rows['records']
    ]
    for column in ('parameters.trained', 'parameters.stored', 'parameters.head', 'memory_mb.step')
  })  # fmt: skip
  about = (
    'Differences in points are of each task and seed, of memory in percent of each task; in '
    "brackets the 95 % interval of their mean for these tasks (Welch's t over seeds; of memory, "
    "which has one value a task, Student's over tasks), and in how many tasks the mean has the "
    'sign of the whole. A claim whose interval holds 0 cannot be told. Rows and seeds are scored '
    'on the same examples, so what other examples would change (of an accuracy on half of a '
    'thousand about 2 points) is not in the intervals.'
  )
  without = claims.markdown(by_score(rows[rows['task'] != 'cola']))
  about += f'\n\n### Without cola, on which the least was learnt\n\n{without}'
  parts = [INTRODUCTION, table(rows), claims.pictures(HERE)]
  text = claims.page(parts, by_score(rows) + by_memory(rows), about, notes, len(found.failed))
  files.atomic_write(HERE / 'README.md', text)


if __name__ == '__main__':
  app.run(main)
