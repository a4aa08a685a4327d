"""Figures as PNG and SVG files, drawn by matplotlib without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure as Canvas
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from capgap.errors import UserError
from capgap.report.figures import Axis, Chart, HeatMap, Series
from capgap.report.style import DASHES, LIGHT, OPEN, matplotlib_marker

ENDINGS = (".png", ".svg")
METADATA = {"png": {"Software": "capgap"}, "svg": {"Date": None}}
INCHES = (7.6, 5.0)
DOTS_PER_INCH = 160
LEGEND_FONT = 8.5
SETTINGS = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.edgecolor": LIGHT["rule"],
    "axes.labelcolor": LIGHT["text"],
    "text.color": LIGHT["text"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    # the same data give the same bytes
    "svg.hashsalt": "capgap",
}


def write_static(figure: Chart | HeatMap, folder: Path) -> tuple[Path, Path]:
    """Draw a figure into `folder` as NAME.png and NAME.svg and return both paths."""
    png, svg = folder / f"{figure.name}.png", folder / f"{figure.name}.svg"
    _draw(figure, (png, svg))
    return png, svg


def write_picture(figure: Chart | HeatMap, path: Path) -> Path:
    """Draw a figure into one file; the ending, .png or .svg, says how (`check_picture`)."""
    check_picture(path)
    _draw(figure, (path,))
    return path


def check_picture(path: Path) -> None:
    """UserError where a picture cannot be written to this path."""
    if path.suffix.lower() not in ENDINGS:
        raise UserError(f"a picture {path} cannot be drawn: give a name that ends in .png or .svg")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give the name of a file for the picture")
    if not path.parent.is_dir():
        raise UserError(f"no folder {path.parent} for the picture {path.name}: make it first")


def _draw(figure: Chart | HeatMap, paths: tuple[Path, ...]) -> None:
    with matplotlib.rc_context(SETTINGS):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
        canvas = Canvas(figsize=INCHES, layout=layout, facecolor=LIGHT["surface"])
        FigureCanvasAgg(canvas)
        axes = canvas.add_subplot()
        if isinstance(figure, Chart):
            _draw_chart(canvas, axes, figure)
        else:
            _draw_map(canvas, axes, figure)
        canvas.suptitle(figure.title, fontsize=11.5, fontweight="bold", x=0.02, ha="left")
        for path in paths:
            kind = path.suffix.lower().removeprefix(".")
            canvas.savefig(path, format=kind, dpi=DOTS_PER_INCH, metadata=METADATA[kind])


def _draw_chart(canvas: Any, axes: Any, chart: Chart) -> None:
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    axes.grid(color=LIGHT["grid"], linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles: list[tuple[Any, Series]] = []
    for order, series in enumerate(chart.series):
        handle = _draw_series(axes, series, order + 2)
        if series.in_legend:
            handles.append((handle, series))
    for axis, limited, drawn in (
        (chart.x, axes.set_xlim, axes.xaxis),
        (chart.y, axes.set_ylim, axes.yaxis),
    ):
        _dress_axis(axes, axis, limited, drawn, "x" if drawn is axes.xaxis else "y")
    handles.sort(key=lambda pair: pair[1].shared)
    names = [series.name for _, series in handles]
    if handles:
        canvas.legend(
            [handle for handle, _ in handles],
            names,
            loc="outside lower left",
            ncols=_legend_columns(names),
            frameon=False,
            fontsize=LEGEND_FONT,
        )


def _legend_columns(names: list[str]) -> int:
    """As many of at most three columns as have room for their longest names."""
    room = 72 * INCHES[0]
    for columns in (3, 2):
        # as matplotlib fills them: the first ones are a row longer where it does not come out even
        rows, longer = divmod(len(names), columns)
        widths, first = [], 0
        for column in range(columns):
            last = first + rows + (column < longer)
            widths.append(max(map(len, names[first:last]), default=0))
            first = last
        # half an em a letter; handle and gaps take four
        if sum(LEGEND_FONT * (0.55 * letters + 4) for letters in widths) <= room:
            return columns
    return 1


def _dress_axis(axes: Any, axis: Axis, limited: Any, drawn: Any, letter: str) -> None:
    if axis.log:
        axes.set_xscale("log") if letter == "x" else axes.set_yscale("log")
    if axis.ticks:
        drawn.set_major_locator(FixedLocator([value for value, _ in axis.ticks]))
        drawn.set_major_formatter(FixedFormatter([text for _, text in axis.ticks]))
        drawn.set_minor_locator(NullLocator())
    if axis.limits:
        limited(*axis.limits)


def _draw_series(axes: Any, series: Series, order: int) -> Any:
    colour = _rgba(LIGHT[series.colour])
    if series.kind == "band":
        lines = {"hatch": "////", "edgecolor": _rgba(LIGHT["rule"])} if series.hatch else {}
        return axes.fill_between(
            series.x, series.y, series.y_high, facecolor=colour, linewidth=0, zorder=1, **lines
        )
    if series.kind == "line":
        (line,) = axes.plot(
            series.x,
            series.y,
            color=colour,
            linewidth=0.75 * series.width,
            linestyle=DASHES[series.dash],
            # a line as wide as a bar ends where its interval does
            solid_capstyle="butt",
            zorder=order,
        )
        return line
    for x, y, label, place in zip(series.x, series.y, series.labels, series.label_at, strict=False):
        _write_label(axes, series, (x, y), label, place)
    if series.kind == "text":
        return None
    for direction, intervals in (("x", series.x_interval), ("y", series.y_interval)):
        for x, y, interval in zip(series.x, series.y, intervals, strict=False):
            if interval is None:
                continue
            middle = x if direction == "x" else y
            # an interval may end short of the point it belongs to; a bar cannot be negative
            reach = [[max(0.0, middle - interval[0])], [max(0.0, interval[1] - middle)]]
            axes.errorbar(
                [x], [y], **{f"{direction}err": reach}, ecolor=colour, capsize=3, zorder=order
            )
    hollow = series.marker.endswith(OPEN)
    return axes.scatter(
        series.x,
        series.y,
        s=(0.75 * series.size) ** 2,
        marker=matplotlib_marker(series.marker),
        facecolors=LIGHT["surface"] if hollow else colour,
        edgecolors=colour,
        linewidths=1.2 if hollow else 0.6,
        zorder=order + 0.5,
    )


def _write_label(
    axes: Any, series: Series, point: tuple[float, float], label: str, place: str
) -> None:
    vertical, horizontal = place.split()
    away = 0.375 * series.size + 2.5 if series.kind == "points" else 0.0
    offset = (
        {"left": -away, "center": 0.0, "right": away}[horizontal],
        {"bottom": -away, "middle": 0.0, "top": away}[vertical],
    )
    note = axes.annotate(
        label,
        point,
        offset,
        textcoords="offset points",
        fontsize=8,
        ha={"left": "right", "center": "center", "right": "left"}[horizontal],
        va={"bottom": "top", "middle": "center", "top": "bottom"}[vertical],
        color=LIGHT["text"] if series.kind == "points" else _rgba(LIGHT[series.colour]),
        zorder=100,
        annotation_clip=True,
    )
    if series.kind == "text":
        note.set_bbox({"facecolor": LIGHT["surface"], "edgecolor": "none", "pad": 1})
    note.set_in_layout(False)


def _draw_map(canvas: Any, axes: Any, chart: HeatMap) -> None:
    colours = LinearSegmentedColormap.from_list(
        "gain", [LIGHT["low"], LIGHT["middle"], LIGHT["high"]]
    ).with_extremes(bad=LIGHT["surface"])
    values = [[float("nan") if v is None else v for v in row] for row in chart.values]
    image = axes.imshow(
        values, cmap=colours, vmin=-chart.extreme, vmax=chart.extreme, aspect="auto", origin="lower"
    )
    for row, texts in enumerate(chart.texts):
        for column, text in enumerate(texts):
            missing = chart.values[row][column] is None
            if missing:
                hole = Rectangle((column - 0.44, row - 0.44), 0.88, 0.88)
                hole.set(facecolor="none", edgecolor=LIGHT["muted"], linestyle=":")
                axes.add_patch(hole)
            axes.text(
                column,
                row,
                text.replace(" ", "\n") if missing else text,
                ha="center",
                va="center",
                fontsize=7 if missing else 8.5,
                color=LIGHT["muted"] if missing else LIGHT["text"],
            )
    axes.set_xticks(range(len(chart.columns)), chart.columns)
    axes.set_yticks(range(len(chart.rows)), chart.rows)
    axes.set_xlabel(chart.x.title)
    axes.set_ylabel(chart.y.title)
    axes.spines[:].set_visible(False)
    canvas.colorbar(image, ax=axes, label=chart.scale, shrink=0.9)


def _rgba(colour: str) -> Any:
    """CSS colour -> what matplotlib reads."""
    if not colour.startswith("rgba("):
        return colour
    red, green, blue, alpha = (float(part) for part in colour[5:-1].split(","))
    return (red / 255, green / 255, blue / 255, alpha)
