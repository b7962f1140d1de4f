"""What is rounded while it trains."""

from rows import D, F, L, Row

FULL = 109_482_240
OUTPUTS = L * (5 * D + F) + D  # of all kernels, the pooler's too
LINEARS = 6 * L + 1

# Rounding is there from the start.
ROWS = (
  Row(
    'q8bert',
    FULL + 2 * LINEARS,
    start=0.2,
    merges=True,
    slices=False,
    # Where the examples of the first range come again, it has arrived.
    still='delta/.*/range',
    tolerance=1e-2,
  ),
  # The gradient of a step is what rounding leaves over: another, where the kernel is.
  Row('lsq', FULL + OUTPUTS + LINEARS, start=0.2, merges=True, tolerance=1e-2, int8=False),
  Row('peg', L * 2 * 8 * (D + D), start=0.2, tolerance=1e-2),
)
