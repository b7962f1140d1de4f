"""Shapes of encoders that are timed: hidden, layers, heads, units."""

from efft.models.encoder import EncoderConfig

SIZES = {'base': (768, 12, 12, 3072), 'mini': (384, 6, 12, 1536), 'large': (1024, 24, 16, 4096)}


def encoder(size: str) -> EncoderConfig:
  hidden, layers, heads, mlp = SIZES[size]
  return EncoderConfig(
    'bert', 30522, hidden, (heads,) * layers, hidden // heads, (mlp,) * layers, 512, 2, hidden
  )
