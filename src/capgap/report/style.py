"""Colours, markers and dashes of both renderers.

Students differ in colour, marker and dash together, so that a greyscale print stays readable.
Every foreground colour has a contrast of at least 4.5 to 1 with its background.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Palette = Mapping[str, str]

LIGHT: Palette = {
    "page": "#f6f7f9",
    "surface": "#ffffff",
    "text": "#1b2430",
    "muted": "#566272",
    "grid": "#e1e5ea",
    "rule": "#c3cad3",
    "accent": "#1f5fa8",
    "notice": "#fdf3dd",
    "notice-edge": "#a86b00",
    "series-0": "#1f5fa8",
    "series-1": "#b9410f",
    "series-2": "#0b7468",
    "series-3": "#8a35a8",
    "series-4": "#775a00",
    "series-5": "#4a5a70",
    "band": "rgba(31, 95, 168, 0.14)",
    "published": "rgba(168, 107, 0, 0.14)",
    "resolution": "#b4c3d6",
    "low": "#dd8a57",
    "middle": "#f4f2ee",
    "high": "#6fa6dd",
    "ink": "#1b2430",
}
DARK: Palette = {
    "page": "#12161c",
    "surface": "#1a2028",
    "text": "#e7ebf0",
    "muted": "#a3aebb",
    "grid": "#2d3641",
    "rule": "#4a5665",
    "accent": "#86b8f2",
    "notice": "#322a17",
    "notice-edge": "#d9a441",
    "series-0": "#86b8f2",
    "series-1": "#ff9f70",
    "series-2": "#57cfb8",
    "series-3": "#d6a0f0",
    "series-4": "#e0c160",
    "series-5": "#adb9c8",
    "band": "rgba(134, 184, 242, 0.18)",
    "published": "rgba(224, 193, 96, 0.18)",
    "resolution": "#46586f",
    "low": "#dd8a57",
    "middle": "#d9d7d2",
    "high": "#6fa6dd",
    "ink": "#1b2430",
}


@dataclass(frozen=True)
class Look:
    """How one student (or one line of a family) is drawn."""

    colour: str
    marker: str
    dash: str


LOOKS = (
    Look("series-0", "circle", "solid"),
    Look("series-1", "square", "dash"),
    Look("series-2", "diamond", "dot"),
    Look("series-3", "triangle", "dashdot"),
    Look("series-4", "cross", "longdash"),
    Look("series-5", "pentagon", "solid"),
)


def look(position: int) -> Look:
    """The look of the line at this position of its family; repeats after six."""
    return LOOKS[position % len(LOOKS)]


# names of markers and dashes here -> (plotly, matplotlib)
MARKERS: Mapping[str, tuple[str, str]] = {
    "circle": ("circle", "o"),
    "square": ("square", "s"),
    "diamond": ("diamond", "D"),
    "triangle": ("triangle-up", "^"),
    "cross": ("x", "X"),
    "pentagon": ("pentagon", "p"),
    "star": ("star", "*"),
    "triangle-down": ("triangle-down", "v"),
    "plus": ("cross", "P"),
    "hexagon": ("hexagon", "h"),
}
DASHES: Mapping[str, object] = {
    "solid": "-",
    "dash": (0, (5, 3)),
    "dot": (0, (1.5, 2)),
    "dashdot": (0, (6, 2, 1.5, 2)),
    "longdash": (0, (9, 3)),
}
OPEN = "-open"


def plotly_marker(name: str) -> str:
    """The plotly symbol of a marker of ours; a name that ends in "-open" is hollow."""
    symbol = MARKERS[name.removesuffix(OPEN)][0]
    return symbol + OPEN if name.endswith(OPEN) else symbol


def matplotlib_marker(name: str) -> str:
    """The matplotlib symbol of a marker of ours, hollow or not."""
    return MARKERS[name.removesuffix(OPEN)][1]
