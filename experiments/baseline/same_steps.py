"""The same LoRA steps in transformers + PEFT and in efft: same start, batches, rates; no dropout.

    python experiments/baseline/same_steps.py --data=FOLDER --model=DIR --workdir=DIR --side=peer
    python experiments/baseline/same_steps.py --data=FOLDER --model=DIR --workdir=DIR --side=efft

FOLDER holds train.parquet of stsb, DIR all-MiniLM-L6-v2. The first needs torch, transformers and
peft, and leaves its start, batches, losses and end in the workdir; the second repeats the steps
from them and prints how far it is off. What is left between the two libraries is chance: dropout,
the order of the data, the new head and A.
"""

import argparse
from pathlib import Path

import numpy as np

STEPS, TOTAL, WARMUP, BATCH, LR = 60, 250, 15, 16, 2e-3


def peer(folder: Path, data: str, model_folder: str) -> None:
  """Trains with PEFT and writes what happened."""
  import torch
  from datasets import load_dataset
  from peft import LoraConfig, get_peft_model
  from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
  )

  torch.manual_seed(0)
  rows = load_dataset('parquet', data_files={'train': f'{data}/train.parquet'})['train']
  tokenizer = AutoTokenizer.from_pretrained(model_folder)
  model = AutoModelForSequenceClassification.from_pretrained(
    model_folder, num_labels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
  )
  lora = LoraConfig(task_type='SEQ_CLS', r=8, lora_alpha=16, target_modules=['query', 'value'])
  model = get_peft_model(model, lora).train()
  trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
  found = {f'start:{name}': p.detach().numpy().copy() for name, p in trained.items()}
  optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.01)
  schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, TOTAL)
  order = np.random.default_rng(0).permutation(len(rows))
  losses = []
  for step in range(STEPS):
    chosen = rows[order[step * BATCH : (step + 1) * BATCH].tolist()]
    batch = tokenizer(
      chosen['sentence1'], chosen['sentence2'], truncation=True, max_length=128,
      padding='max_length', return_tensors='pt',
    )  # fmt: skip
    labels = torch.tensor(chosen['label'], dtype=torch.float32)
    optimizer.zero_grad()
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
    optimizer.step()
    schedule.step()
    losses.append(loss.item())
    found |= {f'{name}:{step}': x.numpy() for name, x in batch.items()}
    found[f'labels:{step}'] = labels.numpy()
  found |= {f'end:{name}': p.detach().numpy() for name, p in trained.items()}
  np.savez(folder / 'peer.npz', losses=losses, **found)


def place(name: str) -> str:
  """PEFT's name of a parameter -> efft's path."""
  if 'classifier' in name:
    return 'params/head/out/' + ('kernel' if name.endswith('weight') else 'bias')
  layer = name.split('layer.')[1].split('.')[0]
  which, leaf = ('query' if 'query' in name else 'value'), ('a' if 'lora_A' in name else 'b')
  return f'delta/layer_{layer}/attention/{which}/matmul_lora/{leaf}'


def ours(folder: Path, data: str, model_folder: str) -> None:
  """Repeats the steps and prints the differences."""
  import jax
  import jax.numpy as jnp

  from efft import assemble, config, tree
  from efft.models import hub
  from efft.training import losses, optim, step

  with np.load(folder / 'peer.npz') as file:
    found = dict(file)
  names = {name.partition(':')[2] for name in found if name.startswith('start:')}
  resolved = config.resolve(config.load('configs/lora.py:task=stsb'))
  base = hub.load(model_folder, num_labels=1, pooling='cls', head='new', key=jax.random.key(0))
  net = assemble.network(base.cfg, resolved['method'], 'float32')
  flat = tree.flatten(assemble.variables(net, base.params, jax.random.key(0)))
  for name in names:
    assert flat[place(name)].shape == found[f'start:{name}'].T.shape
    flat[place(name)] = jnp.asarray(found[f'start:{name}'].T)
  parts = assemble.partition(tree.unflatten(flat), resolved['rules'])
  optimizer = optim.optimizer({**resolved['optim'], 'lr': LR}, parts.groups, TOTAL)
  take = step.make_step(
    lambda variables, batch, rngs: net.logits(variables, batch), losses.regression(), optimizer
  )
  state, apart = step.init_state(parts.trainable, optimizer, seed=0), []
  for index in range(STEPS):
    batch = {
      'input_ids': found[f'input_ids:{index}'].astype(np.int32),
      'mask': found[f'attention_mask:{index}'].astype(bool),
      'token_types': found[f'token_type_ids:{index}'].astype(np.int32),
      'labels': found[f'labels:{index}'],
      'weights': np.ones(BATCH, np.float32),
    }
    state, metrics = take(state, parts.frozen, batch)
    apart.append(abs(float(metrics['loss']) - found['losses'][index]))
  end = tree.flatten(state.trainable)
  off = max(np.abs(end[place(name)] - found[f'end:{name}'].T).max() for name in names)
  moved = max(np.abs(found[f'end:{name}'] - found[f'start:{name}']).max() for name in names)
  print(
    f'{STEPS} steps: losses differ by at most {max(apart):.1e}, of {found["losses"].max():.1f};'
  )
  print(f'trained numbers by at most {off:.1e}, having moved by up to {moved:.2f}')


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--data', required=True, help='folder of stsb')
  parser.add_argument('--model', required=True, help='folder of the encoder')
  parser.add_argument('--workdir', required=True, type=Path, help='where the two meet')
  parser.add_argument('--side', required=True, choices=('peer', 'efft'))
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  {'peer': peer, 'efft': ours}[args.side](args.workdir, args.data, args.model)
