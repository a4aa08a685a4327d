"""The neutral description of a figure, which the static and the interactive renderer both draw."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from capgap.report import words
from capgap.sizes import format_count

Pair = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """One axis; `limits` are data values, `ticks` pairs of (value, text), empty = automatic."""

    label: str
    unit: str
    log: bool = False
    limits: Pair | None = None
    ticks: tuple[tuple[float, str], ...] = ()

    @property
    def title(self) -> str:
        return f"{self.label} ({self.unit})"


@dataclass(frozen=True)
class Series:
    """One set of marks.

    kind "points" draws markers, "line" a line, "band" the area between `y` and `y_high`, hatched
    with `hatch`, and "text" nothing but the labels. `colour` names an entry of `style.Palette`.
    `x_interval` and `y_interval` hold (low, high) in data values, or None for a point without an
    interval. `labels` stand beside their points, at the side that `label_at` says ("top left",
    "middle center" and so on). Series of one `group` are shown and hidden together. A `shared`
    legend entry explains marks of several students and comes last.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    kind: Literal["points", "line", "band", "text"] = "points"
    colour: str = "series-0"
    marker: str = "circle"
    size: float = 8.0
    dash: str = "solid"
    width: float = 2.0
    x_interval: tuple[Pair | None, ...] = ()
    y_interval: tuple[Pair | None, ...] = ()
    y_high: tuple[float, ...] = ()
    hover: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_at: tuple[str, ...] = ()
    hatch: bool = False
    group: str = ""
    in_legend: bool = True
    shared: bool = False

    def __post_init__(self) -> None:
        intervals = (self.x_interval, self.y_interval, self.y_high)
        for values in (self.y, *intervals, self.hover, self.labels, self.label_at):
            assert len(values) in (0, len(self.x)), (self.name, len(values), len(self.x))
        assert len(self.labels) == len(self.label_at), self.name


@dataclass(frozen=True)
class Chart:
    """An x-y figure. `caption` says what to look for, `notes` what the data do not allow."""

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeatMap:
    """A table of values drawn as colours; a None in `values` [rows][columns] is a missing cell.

    `texts` has the same form and says what each cell shows, for a missing one why it is missing.
    """

    name: str
    title: str
    caption: str
    x: Axis
    y: Axis
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]
    scale: str
    notes: tuple[str, ...] = ()

    @property
    def extreme(self) -> float:
        """The largest absolute value: the colour scale runs from minus to plus this."""
        return max((abs(v) for row in self.values for v in row if v is not None), default=0) or 1e-3


@dataclass(frozen=True)
class Absent:
    """A figure that cannot be drawn from the data at hand, and the sentence that says why."""

    name: str
    title: str
    reason: str


Figure = Chart | HeatMap | Absent


@dataclass(frozen=True)
class Section:
    """A heading of the page with its figures."""

    anchor: str
    heading: str
    intro: str
    figures: tuple[Figure, ...]


# the leading digits of ticks, from coarse to fine; the last two are for less than a decade
LEADS = ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8))


# percents below and above zero, for ever wider axes
PERCENTS = (
    *(tuple(k * step for k in range(-5, 6)) for step in (1, 2, 5)),
    (-40, -30, -20, -10, 0, 10, 20, 30, 50),
    (-60, -40, -20, 0, 25, 50, 100),
    (-80, -60, -40, 0, 50, 100, 200, 400),
    (-99, -90, -50, 0, 100, 900, 9900),
)


def span(values: Iterable[float], *, margin: float = 1.25) -> Pair:
    """Limits of a logarithmic axis around positive values, with a factor `margin` of room."""
    held = list(values)
    return min(held) / margin, max(held) * margin


def steps(limits: Pair, number: int) -> list[float]:
    """`number` + 1 positive values in equal ratios from one limit to the other."""
    low, high = math.log(limits[0]), math.log(limits[1])
    return [math.exp(low + (high - low) * i / number) for i in range(number + 1)]


def count_ticks(limits: Pair, *, most: int = 6) -> tuple[tuple[float, str], ...]:
    """Readable ticks of a logarithmic axis of parameters or tokens between positive `limits`."""
    return tuple((value, format_count(value)) for value in _log_steps(limits, most))


def power_ticks(limits: Pair, *, most: int = 6) -> tuple[tuple[float, str], ...]:
    """Readable ticks of a logarithmic axis of FLOPs between positive `limits`."""
    return tuple((value, words.power(value)) for value in _log_steps(limits, most))


def factor_ticks(limits: Pair, *, most: int = 7) -> tuple[tuple[float, str], ...]:
    """Readable ticks of a logarithmic axis of plain numbers between positive `limits`."""
    return tuple((value, f"{value:.10g}") for value in _log_steps(limits, most))


def percent_ticks(limits: Pair) -> tuple[tuple[float, str], ...]:
    """Ticks of an axis of natural logarithms about 0, written as the percents they stand for."""
    for ladder in PERCENTS:
        if math.log1p(ladder[-1] / 100) >= 0.55 * limits[1]:
            break
    places = {percent: math.log1p(percent / 100) for percent in ladder}
    inside = {p: place for p, place in places.items() if limits[0] < place < limits[1]}
    return tuple((place, words.percent(p)) for p, place in inside.items())


def size_ticks(sizes: Sequence[float], limits: Pair) -> tuple[tuple[float, str], ...]:
    """The measured sizes themselves as ticks where they lie far enough apart to be read."""
    held = sorted(set(sizes))
    width = math.log(limits[1] / limits[0])
    gaps = [math.log(b / a) / width for a, b in pairwise(held)]
    if len(held) >= 2 and min(gaps) >= 0.11:
        return tuple((value, format_count(value)) for value in held)
    return count_ticks(limits)


def _log_steps(limits: Pair, most: int) -> list[float]:
    """Round values inside the limits: the finest ladder with at most `most` of them."""
    low, high = limits
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    finest: list[float] = []
    for leads in LEADS:
        held = [lead * 10.0**decade for decade in decades for lead in leads]
        inside = [step for step in held if low <= step <= high]
        if len(inside) > most:
            break
        finest = inside
    return finest or [float(f"{math.sqrt(low * high):.3g}")]
