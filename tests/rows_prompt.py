"""Prompts, prefixes, scales and edits of representations."""

from rows import D, F, L, Row

# The small world has positions for prompts of five.
P, H = 5, 16
EMBED = {'length': P, 'init': 'random', 'at': 'embed'}
ENDS = {'rank': 2, 'last': 2, 'tied': False}
LSTM = {'length': P, 'encoder': 'lstm', 'hidden': H}
MIXED = {'length': P, 'bottleneck': H}
MLP = P * D + 2 * D * 128 + 128 * 128 + 2 * 128 + D
CELLS = 2 * (4 * H * (D + H) + 4 * H) + 2 * (4 * H * (2 * H + H) + 4 * H)

ROWS = (
  Row('prompt', P * D, start=3.0, options={'length': P}),
  Row('prompt', P * D, start=3.0, options=EMBED),
  Row('ptuning', MLP, start=3.0, options={'length': P}),
  Row('ptuning', P * D + CELLS + 4 * H * H + 2 * H + 2 * H * D + D, start=3.0, options=LSTM),
  Row('attempt', P * D + 2 * D * H + 2 * D, start=3.0, options=MIXED),
  Row('prefix', L * 2 * 20 * D, start=3.0),
  Row('prefix', L * 2 * P * D, start=3.0, options={'length': P, 'shift': True}),
  Row('prefix_mlp', 20 * D + D * 512 + 512 + L * (512 * 2 * D + 2 * D), start=3.0),
  Row('ia3', L * (3 * D + F), merges=True, options={'attention_out': True}),
  Row('red', L * 2 * D, merges=True),
  Row('loreft', 18_444, start=1.0),
  # What the last tokens become in the last layer is not pooled, and one layer is all that trains.
  Row('loreft', 2 * L * 2 * (2 * D + 1), start=1.0, options=ENDS, still='delta/.*/last_.*'),
  Row('noreft', 18_444, start=1.0),
  Row('direft', 18_444, start=1.0),
  Row('bitfit_subset', L * (D + F)),
)
