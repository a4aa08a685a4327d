"""The parts of all pictures: axes, marks with their looks, and files. One description gives the
page's chart, the SVG and the PNG.
"""

import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import altair
import numpy as np
import vl_convert

from capgap.errors import UserError

Row = dict[str, Any]
Pair = tuple[float, float]

# on light and on dark ground: a chart has the light ones, which the page exchanges in the dark
COLOURS = {
    "page": ("#f6f7f9", "#12161c"),
    "surface": ("#ffffff", "#1a2028"),
    "text": ("#1b2430", "#e7ebf0"),
    "muted": ("#566272", "#a3aebb"),
    "grid": ("#e1e5ea", "#2d3641"),
    "rule": ("#c3cad3", "#4a5665"),
    "notice": ("#fdf3dd", "#322a17"),
    "series-0": ("#1f5fa8", "#86b8f2"),
    "series-1": ("#b9410f", "#ff9f70"),
    "series-2": ("#0b7468", "#57cfb8"),
    "series-3": ("#8a35a8", "#d6a0f0"),
    "series-4": ("#775a00", "#e0c160"),
    "series-5": ("#4a5a70", "#adb9c8"),
}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
TEXT, MUTED, RULE = LIGHT["text"], LIGHT["muted"], LIGHT["rule"]
PENTAGON = "M0,-1.1L1.05,-0.34L0.65,0.89L-0.65,0.89L-1.05,-0.34Z"
HEXAGON = "M0,-1.1L0.95,-0.55L0.95,0.55L0,1.1L-0.95,0.55L-0.95,-0.55Z"
STAR = "M0,-1.3L.34,-.4L1.24,-.4L.5,.15L.76,1.05L0,.5L-.76,1.05L-.5,.15L-1.24,-.4L-.34,-.4Z"
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", PENTAGON, "triangle-down", HEXAGON)
LINE = "stroke"  # the marker of a series that is a line alone
SOLID, DASHED, DOTTED = (1, 0), (6, 3), (2, 3)
DASHES = (SOLID, DASHED, DOTTED, (8, 3, 2, 3), (12, 4), (4, 2, 1, 2, 1, 2))
WIDTH, HEIGHT = 720, 340
# labels of logarithmic axes: 135k, 2.5, and 2 x 10^21
COUNT = "replace(format(datum.value, '.3~s'), 'G', 'B')"
FACTOR = "format(datum.value, '.3~r')"
_TENS = "floor(log(datum.value) / LN10 + 1e-9)"
_LEAD = f"round(datum.value / pow(10, {_TENS}))"
_RAISED = f"['','¹','²','³'][floor({_TENS} / 10)] + '⁰¹²³⁴⁵⁶⁷⁸⁹'[{_TENS} % 10]"
POWER = f"({_LEAD} == 1 ? '' : {_LEAD} + '\u00d7') + '10' + {_RAISED}"


# sides of a point for its name, across and up, the better ones first, and how text stands there
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
ALIGN = {1: "left", 0: "center", -1: "right"}
LETTERS, LINES = 105.0, 27.0  # the plot in letters and lines of a name


@dataclass(frozen=True)
class Picture:
    """A chart with its name in files and links; `alt` stands for it where it cannot be seen."""

    name: str
    title: str
    caption: str
    marks: Sequence[altair.Chart]
    alt: str
    notes: tuple[str, ...] = ()
    height: int = HEIGHT


@dataclass(frozen=True)
class Absent:
    """A picture without data, and why there is none."""

    name: str
    title: str
    reason: str


@dataclass(frozen=True)
class Look:
    """Colour, marker and dash of a series, each of which is enough to know it by."""

    colour: str
    shape: str = LINE
    dash: tuple[int, ...] = SOLID


def look(position: int) -> Look:
    """The look of the series at this position of its family."""
    colour = LIGHT[f"series-{position % 6}"]
    return Look(colour, SHAPES[position % len(SHAPES)], DASHES[position % len(DASHES)])


def row(key: str, x: Any, y: Any, tip: str = "", error: float | None = None, **more: Any) -> Row:
    """A point of the series `key`, with an interval from `low` to `high` or `left` to `right`, and
    its text when it is pointed at; `hollow` marks are drawn so."""
    interval = {} if error is None else {"low": y - error, "high": y + error}
    return {"key": key, "x": x, "y": y, "tip": tip} | interval | more


def in_words(rows: Iterable[Row]) -> str:
    """The texts of rows, for those who cannot see them."""
    return "; ".join(one["tip"].replace("\n", ", ") for one in rows) + "."


XY: Row = {"x": "x", "y": "y"}
# kind -> mark, columns by channel, channels of the series, style
KINDS: dict[str, tuple[Any, Row, tuple[str, ...], Row]] = {
    "points": ("point", XY | {"tooltip": "tip:N"}, ("color", "shape"), {"size": 75, "opacity": 1}),
    "bars": ("rule", {"x": "x", "y": "low", "y2": "high:Q"}, ("color",), {"strokeWidth": 1.5}),
    "spans": ("rule", {"x": "left", "x2": "right:Q", "y": "y"}, ("color",), {"strokeWidth": 2.5}),
    "bands": ("area", {"x": "x", "y": "low", "y2": "high:Q"}, ("color",), {"opacity": 0.13}),
    "lines": ("line", XY, ("color", "strokeDash"), {}),
    "uprights": ("rule", {"x": "x"}, ("color", "strokeDash"), {}),
    "cells": ("rect", XY | {"tooltip": "tip:N"}, (), {"stroke": LIGHT["surface"]}),
    "texts": ("text", XY | {"text": "text:N"}, (), {"baseline": "middle", "color": TEXT}),
}


@dataclass(frozen=True)
class Frame:
    """The axes of a picture, and the looks of its series by their names in the legend."""

    x: Row
    y: Row
    looks: Mapping[str, Look]

    def draw(self, kinds: str, rows: Iterable[Row], more: Any = None, **style: Any) -> list[Any]:
        """Marks of one or several kinds, parted by blanks, cut off at the edge of the axes; lines
        in the order of x."""
        rows = list(rows)
        return [one for kind in kinds.split() for one in self._draw(kind, rows, more or {}, style)]

    def _draw(self, kind: str, rows: Sequence[Row], more: Row, style: Row) -> list[Any]:
        mark, columns, series, own = KINDS[kind]
        parts: dict[Any, list[Row]] = {}
        for one in rows:
            if "y" not in columns or one.get(columns["y"]) is not None:
                # a legend shows the dash of what is a line alone; the outline of a marker is whole
                line = self.looks.get(one["key"], Look(""))
                dash = line.dash if line.shape != LINE and kind == "lines" else None
                part = bool(one.get("hollow")) if kind == "points" else dash
                parts.setdefault(part, []).append(one)
        quantity: Row = {"type": "quantitative"}
        channels = columns | {"x": altair.X(columns["x"], **quantity | self.x)}
        if "y" in columns:
            channels["y"] = altair.Y(columns["y"], **quantity | self.y)
        series = series[:1] if "shape" in style else series
        channels |= {channel: self._series(channel) for channel in series} | more
        held = {"key", "text", "gain"} | {column.split(":")[0] for column in columns.values()}
        drawn = []
        for part, members in parts.items():
            looks: Row = {} if part is None else {"strokeDash": part}
            if kind == "points":
                looks = {"fill": LIGHT["surface"]} if part else {"filled": True}
                looks["strokeWidth"] = 2
            values = [{c: _short(v) for c, v in one.items() if c in held} for one in members]
            marks = altair.MarkDef(mark, clip=True, **own | looks | style)
            encoding = {name: one for name, one in channels.items() if name not in looks}
            drawn.append(altair.Chart(altair.InlineData(values), mark=marks).encode(**encoding))
        return drawn

    def _series(self, channel: str) -> Any:
        """The channel that tells series apart, by their looks."""
        looks = self.looks.values()
        kind: Any = {"color": altair.Color, "shape": altair.Shape}.get(channel, altair.StrokeDash)
        values: list[Any] = [one.dash if one.shape == LINE else SOLID for one in looks]
        if channel != "strokeDash":
            values = [one.shape if channel == "shape" else one.colour for one in looks]
        symbol: Row = {"symbolType": LINE} if {one.shape for one in looks} == {LINE} else {}
        legend = altair.Legend(symbolOpacity=1, **symbol)
        scale = altair.Scale(domain=list(self.looks), range=values)
        return kind("key:N", title=None, scale=scale, legend=legend)

    def name(self, rows: Sequence[Row], lines: Sequence[Row] = ()) -> list[Any]:
        """The `text` of each row beside its point. Each in turn takes the side on which it hides
        least of the others, of points and of `lines`, a few times over; x is logarithmic."""
        plot = np.array([LETTERS, LINES])
        half = np.array([[len(one["text"]) / 2, 0.5] for one in rows])
        points = self._positions(rows) * plot
        marks = np.concatenate([points, self._positions(lines) * plot])
        mark_half = np.array([(0.8, 0.5)] * len(rows) + [(0.5, 0.3)] * len(lines))
        # [rows, sides, 2]
        centres = points[:, None] + np.array(SIDES) * (half[:, None] + (1.4, 0.5))
        inside = _overlap(centres, half[:, None], plot / 2, plot / 2)
        own_cost = 2 * (2 * half[:, :1] - inside) + 0.05 * np.arange(len(SIDES))
        chosen = np.zeros(len(rows), int)
        for _, index in product(range(4), range(len(rows))):
            others = np.arange(len(rows)) != index
            around = np.concatenate([centres[others, chosen[others]], marks])
            halves = np.concatenate([half[others], mark_half])
            hidden = _overlap(centres[index][:, None], half[index], around, halves).sum(axis=1)
            chosen[index] = (hidden + own_cost[index]).argmin()
        drawn = []
        for side in sorted(set(chosen)):
            across, up = SIDES[side]
            members = [one for one, own in zip(rows, chosen, strict=True) if own == side]
            style = {"align": ALIGN[across], "dx": 9 * across, "dy": -13 * up, "fontSize": 10.5}
            drawn += self.draw("texts", members, **style)
        return drawn

    def _positions(self, rows: Sequence[Row]) -> Any:
        """[rows, 2] shares of the plot, from the left and from the bottom."""
        (left, right), (low, high) = limits_of(self.x), limits_of(self.y)
        shares = [
            (math.log(one["x"] / left) / math.log(right / left), (one["y"] - low) / (high - low))
            for one in rows
        ]
        return np.array(shares).reshape(-1, 2)


def _overlap(centre: Any, half: Any, other: Any, other_half: Any) -> Any:
    """The areas that boxes share, each by its centre and half its width and height [..., 2]."""
    shared = half + other_half - abs(centre - other)
    shared = np.minimum(shared, 2 * np.minimum(half, other_half))
    return np.clip(shared, 0, None).prod(axis=-1)


def _short(value: Any) -> Any:
    """Six digits are more than any screen shows, and a page has thousands of numbers."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def log_axis(title: str, limits: Pair, label: str = COUNT, ticks: Sequence[float] = ()) -> Row:
    """A logarithmic axis with a label at every tick for which there is room, by default at round
    values."""
    values = list(ticks or round_ticks(limits, 5 if label == POWER else 9))
    axis = altair.Axis(values=values, labelExpr=label, labelOverlap="greedy")
    scale = altair.Scale(type="log", domain=list(limits), nice=False)
    return {"title": title, "axis": axis, "scale": scale}


def size_axis(title: str, sizes: Iterable[float], margin: float = 1.15) -> Row:
    """An axis of parameters, with ticks at the sizes, or at round ones where they are many."""
    ticks: list[float] = []
    for size in sorted(sizes):
        ticks += [] if ticks and size < 1.04 * ticks[-1] else [size]
    return log_axis(title, span(ticks, margin), COUNT, ticks if len(ticks) < 12 else ())


def linear_axis(title: str | list[str], limits: Pair | None = None, **more: Any) -> Row:
    ends: Row = (
        {"zero": False, "padding": 8} if limits is None else {"domain": list(limits), "nice": False}
    )
    axis = altair.Axis(tickCount=6, **more)
    return {"title": title, "scale": altair.Scale(**ends), "axis": axis}


def limits_of(axis: Row) -> Pair:
    low, high = axis["scale"].domain
    return low, high


def span(values: Iterable[float], margin: float = 1.15) -> Pair:
    """From the smallest to the largest of positive values, with a margin as a factor."""
    values = list(values)
    return min(values) / margin, max(values) * margin


def round_ticks(limits: Pair, most: int = 9) -> list[float]:
    """1, 2 and 5 times powers of ten between limits, or only the powers where those are many."""
    powers = range(*(math.floor(math.log10(end)) + i for i, end in enumerate(limits)))
    found = [lead * 10.0**power for power in powers for lead in (1, 2, 5)]
    inside = [tick for tick in found if limits[0] <= tick <= limits[1]]
    return inside if len(inside) <= most else [t for t in inside if f"{t:e}"[0] == "1"]


def spec_of(picture: Picture, width: int | str = "container") -> Row:
    """The Vega-Lite of a picture on light ground, without title and caption."""
    chart = altair.layer(*picture.marks, height=picture.height, width=width)
    # only tests check against the schema: that takes ten times as long as all the rest
    spec: Row = chart.to_dict(validate=False)
    longest, scaled = 9, set()
    for name, channel in ((n, c) for one in spec["layer"] for n, c in one["encoding"].items()):
        if name in scaled:
            # layers share scales and axes: once is enough
            for part in ("scale", "axis"):
                channel.pop(part, None)
        scaled |= {name} if "scale" in channel else set()
        if channel.get("field") == "key" and "scale" in channel:
            longest = max(longest, *map(len, channel["scale"]["domain"]))
    size = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": 500, "titleColor": TEXT}
    lines = {"domainColor": RULE, "tickColor": RULE, "gridColor": LIGHT["grid"]}
    symbols = {"orient": "bottom", "offset": 10, "symbolSize": 100, "symbolStrokeWidth": 2}
    below = {"subtitleColor": MUTED, "subtitleFontSize": 11.5, "subtitlePadding": 6}
    return spec | {
        "autosize": {"type": "fit-x", "contains": "padding"},
        "description": picture.alt,
        "usermeta": {"entry": round(40 + 6.4 * longest)},  # pixels of one entry of the legend
        "config": {
            "font": "Arial, Liberation Sans, sans-serif",
            "background": LIGHT["surface"],
            "aria": False,
            "view": {"stroke": None},
            "axis": lines | size | {"labelColor": MUTED, "titlePadding": 8},
            "legend": symbols | size | {"labelColor": TEXT, "labelLimit": 330},
            "title": below | {"anchor": "start", "color": TEXT, "fontSize": 15, "offset": 14},
        },
    }


def check_picture(path: Path) -> None:
    """UserError where no picture can be written."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise UserError(f"{path} is no picture that can be drawn: give a name in .png or .svg")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UserError(f"there is no folder {path.parent}")


def write_picture(picture: Picture, *paths: Path) -> None:
    """Writes files in .png or .svg, with title and caption; UserError for others."""
    for path in paths:
        check_picture(path)
    spec = spec_of(picture, WIDTH)
    spec["config"]["legend"]["columns"] = max(1, (WIDTH - 60) // spec["usermeta"]["entry"])
    texts = (picture.caption, *picture.notes)
    below = [line for text in texts for line in textwrap.wrap(text, 125)]
    spec |= {"padding": 14, "title": {"text": picture.title, "subtitle": below}}
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    # these are numbered on from picture to picture, and the same picture shall have the same bytes
    for number, name in enumerate(dict.fromkeys(re.findall(r"clip\d+|gradient_\d+", svg))):
        svg = re.sub(rf"{name}\b", f"part-{number}", svg)
    for path in paths:
        is_svg = path.suffix.lower() == ".svg"
        path.write_bytes(svg.encode() if is_svg else vl_convert.svg_to_png(svg, scale=1.5))
