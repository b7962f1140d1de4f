"""Bottlenecks in other places and of other kernels, deltas around deltas, hybrids, side tuning."""

from rows import NORMS, D, F, L, Row

PFEIFFER = 2 * D * 48 + 48 + D
PHM = 2 * (D + 24) + 24 + D
PROTOTYPE = 2 * D * 64
W = D // 8


def prefix(length, hidden):
  return length * D + D * hidden + hidden + L * 2 * (hidden + 1) * D


ROWS = (
  Row('scaled_parallel', L * (2 * D * 64 + 64 + D + 1)),
  Row('adapter_plus', L * (2 * D * 8 + 8 + D + D), start=1e-2),
  Row('invertible', 2 * (2 * 384 * 192 + 192 + 384) + L * PFEIFFER, start=0.2),
  Row('compacter', L * 2 * PHM + 4**3 + NORMS),
  Row('compacter_plus', L * PHM + 4**3 + NORMS),
  Row('adapterdrop_robust', L * PFEIFFER, start=1e-1),
  Row('tiny_attention', L * (4 * D * 4 + D)),
  Row('hadamard', L * 2 * D + L * 2 * D, merges=True),
  # What is added to all keys cancels in the softmax over adapters.
  Row('fusion', L * (2 * PFEIFFER + 3 * D * D + 2 * D), start=1e-1, still='delta/.*/key_bias'),
  Row('mam', prefix(16, 512) + L * (2 * D * 16 + 16 + D), start=1.0),
  Row('unipelt', prefix(10, 512) + L * (PFEIFFER + 2 * 8 * 2 * D + 4 * (D + 1)), start=1.0),
  Row(
    's4',
    2 * D * 24 + 24 + D + 2 * 4 * D + 5 * D + F,
    start=2.0,
    options={'layers': 1},
    still='delta/layer_0/attention/key/.*/bias',
  ),
  Row('adamix', L * 4 * (2 * D * 16 + 16 + D), start=1e-1),
  Row('adamix_lora', L * 4 * 2 * 4 * 2 * D, merges=True),
  Row('propetl_adapter', PROTOTYPE + 64 + D + L * PROTOTYPE, start=1e-1),
  Row('propetl_lora', 2 * 32 * 2 * D * (1 + L), merges=True, slices=False),
  Row('propetl_prefix', 2 * 64 * D * (1 + L), start=3.0, slices=False),
  Row('ladder', (L + 1) * (D * W + W) + L * (12 * W * W + 10 * W + 1) + W * D + D, start=5.0),
)
