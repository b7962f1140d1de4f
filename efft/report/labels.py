"""Where the names of points stand in a chart, so that they do not cover each other."""

import math

from efft.report import pareto

WIDTH, HEIGHT, PADDING = 380, 260, 24  # of the panel that is reckoned with, in pixels
SIZE, LIMIT = 11, 150  # of the letters, and the longest name, in pixels
# Pixels from the point to the near end of its name, downwards positive; the first is preferred.
SIDES = ((7, 9), (-7, -9), (7, -9), (-7, 9))
_LETTER = 6.2

Box = tuple[float, float, float, float]  # left, top, right, bottom


def placed(points: list[dict], scale: str) -> list[dict]:
  """The points of one panel with `dx` and `dy`, where their names stand; 0 where there is no room.

  Arms of the front are placed first, then those within its intervals; a name of the front that
  finds no room anywhere stands at its first side all the same.

  Args:
    points: with x, y, low, high, arm, status.
    scale: of x, as `plots.scale` says.
  """
  at = _pixels(points, scale)
  taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in at]
  order = {pareto.FRONT: 0, pareto.WITHIN: 1}
  sides = [(0, 0)] * len(points)
  for i in sorted(range(len(points)), key=lambda i: (order.get(points[i]['status'], 2), at[i])):
    for side in SIDES:
      box = _box(at[i], side, points[i]['arm'])
      inside = box[0] >= 0 and box[2] <= WIDTH + PADDING and box[1] >= -SIZE and box[3] <= HEIGHT
      if inside and not any(_overlap(box, other) for other in taken):
        sides[i] = side
        taken.append(box)
        break
    else:
      if points[i]['status'] == pareto.FRONT:
        sides[i] = SIDES[0]
  return [{**point, 'dx': dx, 'dy': dy} for point, (dx, dy) in zip(points, sides, strict=True)]


def _pixels(points: list[dict], scale: str) -> list[tuple[float, float]]:
  bend = {'log': math.log10, 'symlog': math.log1p}.get(scale, float)
  xs = [bend(point['x']) for point in points]
  low, high = (pick(p[key] for p in points) for pick, key in ((min, 'low'), (max, 'high')))
  left, right = min(xs), max(xs)
  # Shares of the range before pixels: pixels a unit are infinite where a range is that small.
  across, up = (right - left) or 1, (high - low) or 1
  return [
    (PADDING + (x - left) / across * (WIDTH - 2 * PADDING), (high - point['y']) / up * HEIGHT)
    for x, point in zip(xs, points, strict=True)
  ]


def _box(at: tuple[float, float], side: tuple[int, int], name: str) -> Box:
  near, middle = at[0] + side[0], at[1] + side[1]
  far = near + math.copysign(min(LIMIT, _LETTER * len(name)), side[0])
  return min(near, far), middle - SIZE / 2, max(near, far), middle + SIZE / 2


def _overlap(a: Box, b: Box) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
