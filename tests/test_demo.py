"""The demo's own part: which functions it calls, and what it prints."""

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
  assert all(sentence in out for sentence in demo.SENTENCES)
