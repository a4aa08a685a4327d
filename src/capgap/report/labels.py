"""Where the labels of points stand so that they hide neither one another nor a point. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise, product

from capgap.report.figures import Axis, Pair

# the plot in letters and lines of a label, as it is in the page's two columns
LETTERS, LINES = 74.0, 18.0
# half a mark with its distance to the label
AWAY = (1.3, 0.7)
PLACES = (
    "middle right",
    "middle left",
    "top center",
    "bottom center",
    "top right",
    "bottom right",
    "top left",
    "bottom left",
)
PASSES = 6

Box = tuple[float, float, float, float]


def place_labels(
    points: Sequence[Pair],
    texts: Sequence[str],
    x: Axis,
    y: Axis,
    *,
    lines: Sequence[tuple[Sequence[float], Sequence[float]]] = (),
) -> tuple[str, ...]:
    """For each point the side of it on which its text stands, as `Series.label_at` has it.

    `lines` are the x and y of lines that should not run through a label. Both axes need limits.
    Each label in turn takes the side on which it hides least, a few times over.
    """
    places = [_place(point, x, y) for point in points]
    marks = [_around(place, 1, 0.5) for place in places]
    for line in lines:
        corners = [_place(point, x, y) for point in zip(*line, strict=True)]
        marks += [_around(place, 0.5, 0.3) for place in _along(corners)]
    chosen = [PLACES[0]] * len(texts)

    def cost(index: int, side: str) -> float:
        box = _box(places[index], texts[index], side)
        taken = [_box(places[i], texts[i], chosen[i]) for i in range(len(texts)) if i != index]
        hidden = sum(_overlap(box, other) for other in [*taken, *marks])
        outside = _area(box) - _overlap(box, (0.0, 0.0, LETTERS, LINES))
        return hidden + 2 * outside + 0.05 * PLACES.index(side)

    for _, index in product(range(PASSES), range(len(texts))):
        chosen[index] = min(PLACES, key=lambda side: cost(index, side))
    return tuple(chosen)


def _place(point: Pair, x: Axis, y: Axis) -> Pair:
    """The point in letters from the left and lines from the bottom."""
    return LETTERS * _share(point[0], x), LINES * _share(point[1], y)


def _share(value: float, axis: Axis) -> float:
    assert axis.limits is not None, axis
    low, high = axis.limits
    if axis.log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _box(place: Pair, text: str, side: str) -> Box:
    vertical, horizontal = side.split()
    left = {"left": -len(text) - AWAY[0], "center": -len(text) / 2, "right": AWAY[0]}[horizontal]
    bottom = {"bottom": -1 - AWAY[1], "middle": -0.5, "top": AWAY[1]}[vertical]
    x, y = place
    return x + left, y + bottom, x + left + len(text), y + bottom + 1


def _around(place: Pair, width: float, height: float) -> Box:
    return place[0] - width, place[1] - height, place[0] + width, place[1] + height


def _along(corners: Sequence[Pair]) -> list[Pair]:
    """Points of a line about a letter or half a line of text apart."""
    found = []
    for (x, y), (to_x, to_y) in pairwise(corners):
        number = max(1, round(max(abs(to_x - x), 2 * abs(to_y - y))))
        found += [
            (x + (to_x - x) * i / number, y + (to_y - y) * i / number) for i in range(number + 1)
        ]
    return found


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
