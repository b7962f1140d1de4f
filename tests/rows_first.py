"""The methods that the others grow from."""

from rows import LINEARS, NORMS, D, F, L, Row

ROWS = (
  Row('lora', L * 2 * 8 * (D + D), merges=True),
  Row('lora', L * 8 * (4 * (D + D) + 2 * (D + F)), merges=True, options={'at': LINEARS}),
  Row('ia3', L * (2 * D + F), merges=True),
  Row('houlsby', L * 2 * (2 * D * 64 + 64 + D) + NORMS, start=1e-4),
  Row('pfeiffer', L * (2 * D * 48 + 48 + D), start=1e-1),
  Row('parallel', L * (2 * D * 64 + 64 + D)),
  Row('bitfit', 102_912),
  Row('layernorm', NORMS),
  Row('head', 0),
  Row('full', 109_482_240),
)
# What the papers print, so that a slip in the formulas above shows.
PRINTED = (294_912, 1_327_104, 55_296, 2_379_264 + 38_400, 894_528, 1_189_632, 102_912, 38_400)
