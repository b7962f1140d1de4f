"""The demo's own part: which functions it calls, and what it prints."""

import subprocess
import sys

from efft import demo


def test_prints_scores_costs_and_sentences(monkeypatch, capsys):
  results = dict(trainable=5, parameters=1000, share=0.005, seconds=61.2)
  results |= dict(examples_per_second=18.0, peak_mb=1257.0, bundle_mb=0.77)
  seen = {}

  def train(config, workdir):
    seen.update(config=config, workdir=workdir)
    return results

  monkeypatch.setattr(demo.run, 'train', train)
  monkeypatch.setattr(demo.run, 'evaluate', lambda run, split: {split: 0.5, 'examples': 3})
  monkeypatch.setattr(
    demo.run, 'predict', lambda run, texts: ({'text': t, 'label': 'a', 'score': 1.0} for t in texts)
  )
  assert demo.demo('some/[folder]', short=True) is results
  assert seen['config'].train.steps == 6 and seen['workdir'] == 'some/[folder]'
  out = capsys.readouterr().out
  for part in ('0.5000', '5 of 1,000 (0.50%)', '61 s', '1,257 MB', 'some/[folder]', 'a 1.00'):
    assert part in out
  assert f"echo '{demo.SENTENCES[0]}' | " in out and "predict --run='some/[folder]'" in out
  assert all(sentence in out for sentence in demo.SENTENCES)


def test_the_command_it_shows_works_as_typed(monkeypatch, tmp_path):
  """Activated, in the folder of the environment, elsewhere, and without an efft beside Python."""
  script = tmp_path / 'with space' / '.venv' / 'bin' / 'efft'
  script.parent.mkdir(parents=True)
  monkeypatch.setattr(sys, 'executable', str(script.with_name('python')))
  monkeypatch.setenv('PATH', '/usr/bin:/bin')
  shown = [demo.program()]
  script.write_text('#!/bin/sh\necho "efft $1"\n')
  script.chmod(0o755)
  shown.append(demo.program())
  monkeypatch.chdir(script.parents[2])
  shown.append(demo.program())
  monkeypatch.setenv('PATH', f'{script.parent}:/usr/bin:/bin')
  shown.append(demo.program())
  quoted = f"'{script.with_name('python')}'"
  assert shown == [f'{quoted} -m efft', f"'{script}'", '.venv/bin/efft', 'efft']
  for command in shown[1:]:
    done = subprocess.run(f'{command} predict', shell=True, capture_output=True, text=True)
    assert done.stdout == 'efft predict\n'
