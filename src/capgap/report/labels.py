"""On which side of their points names stand, so that they hide neither one another nor a point."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from capgap.report.draw import Frame, Pair, Row, limits_of

# the plot in letters and lines of a name
LETTERS, LINES = 105.0, 27.0
# across and up, the better sides first; what stands there is aligned so
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
ALIGN = {1: "left", 0: "center", -1: "right"}

Box = tuple[float, float, float, float]


def names(frame: Frame, rows: Sequence[Row], lines: Sequence[Row] = ()) -> list[Any]:
    """The `text` of each row beside its point. Each in turn takes the side on which it hides least
    of the others, of points and of `lines`, a few times over; x is logarithmic."""
    places = [_place(frame, one) for one in rows]
    marks = [_around(place, 0.8, 0.5) for place in places]
    marks += [_around(_place(frame, one), 0.5, 0.3) for one in lines]
    wide = [len(one["text"]) for one in rows]
    boxes = [[_box(places[i], wide[i], *side) for side in SIDES] for i in range(len(rows))]
    chosen = [0] * len(rows)
    for _, index in product(range(4), range(len(rows))):
        taken = [boxes[i][chosen[i]] for i in range(len(rows)) if i != index]
        cost = [
            sum(_overlap(box, other) for other in (*taken, *marks))
            + 2 * (wide[index] - _overlap(box, (0.0, 0.0, LETTERS, LINES)))
            + 0.05 * side
            for side, box in enumerate(boxes[index])
        ]
        chosen[index] = cost.index(min(cost))
    drawn = []
    for side in sorted(set(chosen)):
        across, up = SIDES[side]
        held = [one for one, own in zip(rows, chosen, strict=True) if own == side]
        style = {"align": ALIGN[across], "dx": 9 * across, "dy": -13 * up, "fontSize": 10.5}
        drawn += frame.draw("texts", held, **style)
    return drawn


def _place(frame: Frame, one: Row) -> Pair:
    """In letters from the left and lines from the bottom."""
    (left, right), (low, high) = limits_of(frame.x), limits_of(frame.y)
    across = math.log(one["x"] / left) / math.log(right / left)
    return LETTERS * across, LINES * (one["y"] - low) / (high - low)


def _around(place: Pair, across: float, up: float) -> Box:
    return place[0] - across, place[1] - up, place[0] + across, place[1] + up


def _box(place: Pair, wide: int, across: int, up: int) -> Box:
    left = place[0] + {1: 1.4, 0: -wide / 2, -1: -wide - 1.4}[across]
    return left, place[1] - 0.5 + up, left + wide, place[1] + 0.5 + up


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
