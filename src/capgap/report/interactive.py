"""Figures as plotly JSON.

Colours are written as "@name": the page's script puts in the colour of that name from the style
sheet, in the light or the dark palette.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from capgap.report.figures import Axis, Chart, HeatMap, Pair, Series
from capgap.report.style import plotly_marker

Json = dict[str, Any]


def to_plotly(figure: Chart | HeatMap) -> Json:
    """The figure as {"data": [...], "layout": {...}}, ready for JSON: no NaN, no infinity."""
    return _map(figure) if isinstance(figure, HeatMap) else _chart(figure)


def _chart(chart: Chart) -> Json:
    traces = [trace for series in chart.series for trace in _traces(series)]
    layout = _layout()
    layout["xaxis"] |= _axis(chart.x)
    layout["yaxis"] |= _axis(chart.y)
    notes = [note for series in chart.series for note in _labels(series, chart)]
    if notes:
        layout["annotations"] = notes
    return {"data": traces, "layout": layout}


def _layout() -> Json:
    axis = {
        "gridcolor": "@grid",
        "linecolor": "@rule",
        "zerolinecolor": "@grid",
        "tickfont": {"color": "@muted"},
        "automargin": True,
    }
    return {
        "paper_bgcolor": "@surface",
        "plot_bgcolor": "@surface",
        "font": {"color": "@text", "size": 12},
        "hoverlabel": {"bgcolor": "@surface", "bordercolor": "@rule", "font": {"color": "@text"}},
        "margin": {"l": 10, "r": 16, "t": 32, "b": 10},
        # below, as the row above the plot is where the tools appear
        "legend": {
            "orientation": "h",
            # plotly turns the order round where areas are filled, and parts groups by columns
            "traceorder": "normal",
            "font": {"size": 11},
            "xref": "container",
            "x": 0,
            "xanchor": "left",
            "maxheight": 0.9,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
        },
        "hovermode": "closest",
        # keeps zoom and hidden lines when the colours change
        "uirevision": "keep",
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }


def _axis(axis: Axis) -> Json:
    found: Json = {"title": {"text": axis.title, "standoff": 8, "font": {"size": 12}}}
    if axis.log:
        found["type"] = "log"
    if axis.limits:
        ends = (math.log10(end) for end in axis.limits) if axis.log else axis.limits
        found["range"] = list(ends)
    if axis.ticks:
        found |= {
            "tickvals": [value for value, _ in axis.ticks],
            "ticktext": [text for _, text in axis.ticks],
        }
    return found


def _traces(series: Series) -> list[Json]:
    colour = f"@{series.colour}"
    common: Json = {
        "type": "scatter",
        "name": series.name,
        "x": list(series.x),
        "showlegend": series.in_legend,
    }
    if series.shared:
        common["legendrank"] = 1001
    if series.group:
        common["legendgroup"] = series.group
    if series.kind == "band":
        edge = common | {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        lower = edge | {"y": list(series.y), "showlegend": False}
        filled: Json = {"y": list(series.y_high), "fill": "tonexty", "fillcolor": colour}
        if series.hatch:
            filled["fillpattern"] = {
                "shape": "/",
                "size": 7,
                "solidity": 0.12,
                "fgcolor": "@muted",
                "bgcolor": colour,
            }
        return [lower, edge | filled]
    if series.kind == "text":
        return []
    common["y"] = list(series.y)
    if series.hover:
        common |= {"text": list(series.hover), "hovertemplate": "%{text}<extra></extra>"}
    else:
        common["hoverinfo"] = "skip"
    if series.kind == "line":
        line = {"color": colour, "width": series.width, "dash": series.dash}
        return [common | {"mode": "lines", "line": line}]
    marker = {"color": colour, "size": series.size + 1, "symbol": plotly_marker(series.marker)}
    trace = common | {"mode": "markers", "marker": marker}
    for name, middle, intervals in (
        ("error_x", series.x, series.x_interval),
        ("error_y", series.y, series.y_interval),
    ):
        if any(interval is not None for interval in intervals):
            trace[name] = _bars(middle, intervals, colour)
    return [trace]


def _labels(series: Series, chart: Chart) -> list[Json]:
    """Labels as annotations: text of a trace would stand in its legend entry too."""
    beside = series.kind == "points"
    away = (series.size + 1) / 2 + 2 if beside else 0.0
    notes = []
    for x, y, label, place in zip(series.x, series.y, series.labels, series.label_at, strict=False):
        vertical, horizontal = place.split()
        notes.append(
            {
                # plotly wants logarithms for annotations on logarithmic axes
                "x": math.log10(x) if chart.x.log else x,
                "y": math.log10(y) if chart.y.log else y,
                "text": label,
                "showarrow": False,
                "xanchor": {"left": "right", "center": "center", "right": "left"}[horizontal],
                "yanchor": {"bottom": "top", "middle": "middle", "top": "bottom"}[vertical],
                "xshift": {"left": -away, "center": 0.0, "right": away}[horizontal],
                "yshift": {"bottom": -away, "middle": 0.0, "top": away}[vertical],
                "borderpad": 0 if beside else 1,
                "font": {"size": 11, "color": "@text" if beside else f"@{series.colour}"},
                **({} if beside else {"bgcolor": "@surface"}),
            }
        )
    return notes


def _bars(middle: Sequence[float], intervals: Sequence[Pair | None], colour: str) -> Json:
    pairs = list(zip(middle, intervals, strict=True))
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, pair[1] - value) if pair else 0.0 for value, pair in pairs],
        "arrayminus": [max(0.0, value - pair[0]) if pair else 0.0 for value, pair in pairs],
        "color": colour,
        "thickness": 1.5,
        "width": 4,
    }


def _map(chart: HeatMap) -> Json:
    layout = _layout()
    for name, axis, labels in (("xaxis", chart.x, chart.columns), ("yaxis", chart.y, chart.rows)):
        # positions, not categories: plotly would merge two sizes that are written alike
        layout[name] |= {
            "title": {"text": axis.title, "standoff": 8, "font": {"size": 12}},
            "tickvals": list(range(len(labels))),
            "ticktext": list(labels),
            "showgrid": False,
            "zeroline": False,
        }
    layout["shapes"] = [
        _missing(column, row)
        for row, values in enumerate(chart.values)
        for column, value in enumerate(values)
        if value is None
    ]
    layout["annotations"] = [
        _annotation(column, row, text, missing=chart.values[row][column] is None)
        for row, texts in enumerate(chart.texts)
        for column, text in enumerate(texts)
    ]
    trace: Mapping[str, Any] = {
        "type": "heatmap",
        "x": list(range(len(chart.columns))),
        "y": list(range(len(chart.rows))),
        "z": [list(row) for row in chart.values],
        "zmin": -chart.extreme,
        "zmax": chart.extreme,
        "colorscale": [[0, "@low"], [0.5, "@middle"], [1, "@high"]],
        "xgap": 2,
        "ygap": 2,
        "text": [
            [f"teacher {column}, student {row}<br>gain {text}" for column, text in cells]
            for row, cells in (
                (row, zip(chart.columns, texts, strict=True))
                for row, texts in zip(chart.rows, chart.texts, strict=True)
            )
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "colorbar": {
            "title": {"text": chart.scale, "side": "right"},
            "thickness": 12,
            "tickfont": {"color": "@muted"},
            "outlinewidth": 0,
        },
    }
    return {"data": [dict(trace)], "layout": layout}


def _missing(column: int, row: int) -> Json:
    """A hole in the map with a dotted edge, so that it cannot be taken for a value."""
    return {
        "type": "rect",
        "x0": column - 0.44,
        "x1": column + 0.44,
        "y0": row - 0.44,
        "y1": row + 0.44,
        "layer": "below",
        "line": {"color": "@muted", "width": 1, "dash": "dot"},
    }


def _annotation(column: int, row: int, text: str, *, missing: bool) -> Json:
    return {
        "x": column,
        "y": row,
        "text": text.replace(" ", "<br>") if missing else text,
        "showarrow": False,
        # the map's colours are the same in light and dark, so its numbers are dark in both
        "font": {"size": 11, "color": "@muted" if missing else "@ink"},
    }
