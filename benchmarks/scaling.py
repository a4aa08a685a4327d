"""How the time of a training step grows: with vocabulary, window, number of students, and size.

    python benchmarks/scaling.py --out docs/results/scaling

Every point is a process of its own, as in distillation.py: an llama student with a teacher of 2.5
times its size, batches of 2,048 tokens of random text, fp32, layers not compiled. One thing changes
at a time. Writes OUT.png and OUT.json, and prints how far the points are from straight lines.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import altair
import numpy as np
import vl_convert

from capgap.models.shape import ladder_shape
from capgap.sizes import format_count, parse_count
from distillation import run_child, write_corpus
from peers.cases import Case

TOKENS = 2_048
STEPS = 3
WARMUP = 1
BASE: dict[str, Any] = {"size": "1M", "vocabulary": 4_096, "window": 256, "students": 1}
AXES: dict[str, list[Any]] = {
    "vocabulary": [1_024, 2_048, 4_096, 8_192, 16_384, 32_768],
    "window": [64, 128, 256, 512, 1_024, 2_048],
    "students": [1, 2, 3, 5, 8],
    "size": ["100k", "300k", "1M", "3M", "10M"],
}
TITLES = {
    "vocabulary": "words in the vocabulary",
    "window": "tokens in a window",
    "students": "students of one teacher",
    "size": "non-embedding parameters of the student",
}


@dataclass(frozen=True)
class Point:
    """Microseconds of a step by the tokens of its batch, the median over steps and repeats."""

    axis: str
    value: Any
    microseconds: float

    @property
    def place(self) -> float:
        return float(parse_count(self.value))


def case_of(setting: dict[str, Any], threads: int) -> Case:
    size, window = parse_count(setting["size"]), setting["window"]
    student, teacher = (
        ladder_shape("llama", round(n), vocabulary=setting["vocabulary"], positions=window)
        for n in (size, 2.5 * size)
    )
    return Case(student, teacher, window, TOKENS // window, "fp32", "cpu", threads, 1.0)


def measure(setting: dict[str, Any], folder: Path, threads: int) -> float:
    """Seconds of a step."""
    case = case_of(setting, threads)
    corpus = folder / str(setting["vocabulary"])
    if not corpus.exists():
        write_corpus(corpus, setting["vocabulary"], TOKENS * (STEPS + WARMUP) + 1)
    asked = {
        "part": "step",
        "engine": "ours",
        "case": case.as_dict(),
        "corpus": str(corpus),
        "threads": threads,
        "steps": STEPS,
        "warmup": WARMUP,
        "students": setting["students"],
        "compile": "off",
    }
    return median(run_child(asked)["seconds"]["wall"])


def straight_line(points: Sequence[Point]) -> tuple[float, float]:
    """(at 0, slope), by least squares of relative distances."""
    x = np.array([one.place for one in points])
    y = np.array([one.microseconds for one in points])
    rows = np.stack([1 / y, x / y], axis=1)
    at_zero, slope = np.linalg.lstsq(rows, np.ones_like(y), rcond=None)[0]
    return float(at_zero), float(slope)


def draw(points: Sequence[Point], path: Path) -> None:
    panels = [_panel([one for one in points if one.axis == axis]) for axis in TITLES]
    drawn = altair.concat(*panels, columns=2).resolve_scale(x="independent", y="independent")
    svg = vl_convert.vegalite_to_svg(drawn.to_dict(), allowed_base_urls=[])
    path.write_bytes(vl_convert.svg_to_png(svg, scale=1.5))


def _panel(points: Sequence[Point]) -> altair.LayerChart:
    at_zero, slope = straight_line(points)
    places = np.geomspace(points[0].place, points[-1].place, 100)
    line = [{"x": x, "y": at_zero + slope * x, "what": "straight line"} for x in places]
    rows = [{"x": one.place, "y": one.microseconds, "what": "measured"} for one in points]
    low, high = (f(one.microseconds for one in points) for f in (min, max))
    steps = [50 * 2**step for step in range(8) if 0.7 * low < 50 * 2**step < 1.4 * high]
    shown = (
        "format(datum.value, '.3~s')" if points[0].axis == "size" else "format(datum.value, ',')"
    )
    scale = altair.Scale(type="log", nice=False)
    ticks = altair.Axis(values=[one.place for one in points], labelExpr=shown)
    x = altair.X("x:Q", scale=scale, title=TITLES[points[0].axis], axis=ticks)
    y = altair.Y(
        "y:Q", scale=scale, title="µs a token of the batch", axis=altair.Axis(values=steps)
    )
    kinds = altair.Scale(domain=["measured", "straight line"], range=["black", "gray"])
    colour = altair.Color("what:N", scale=kinds, title=None)
    base = altair.Chart(altair.InlineData(values=rows)).encode(x=x, y=y, color=colour)
    dashed = altair.Chart(altair.InlineData(values=line)).mark_line(strokeDash=[5, 3])
    fitted = dashed.encode(x=x, y=y, color=colour)
    marks = altair.layer(fitted, base.mark_line(), base.mark_point(filled=True, size=50))
    return marks.properties(width=380, height=240)


def _tick(point: Point) -> str:
    return format_count(point.place) if point.axis == "size" else f"{point.value:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="without its ending")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    seconds: dict[tuple[str, Any], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(arguments.repeats):
            for axis, values in AXES.items():
                for value in values:
                    setting = BASE | {axis: value}
                    found = measure(setting, Path(name), arguments.threads)
                    seconds.setdefault((axis, value), []).append(found)
    points = [
        Point(axis, value, 1e6 * median(times) / TOKENS) for (axis, value), times in seconds.items()
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    content = [vars(one) for one in points]
    arguments.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    draw(points, arguments.out.with_suffix(".png"))
    print("| what changes | value | µs a token | straight line | measured / line |")
    print("|---|---|---|---|---|")
    for axis in AXES:
        mine = [one for one in points if one.axis == axis]
        at_zero, slope = straight_line(mine)
        for one in mine:
            line = at_zero + slope * one.place
            print(
                f"| {axis} | {_tick(one)} | {one.microseconds:.0f} | {line:.0f} "
                f"| {one.microseconds / line:.2f} |"
            )


if __name__ == "__main__":
    main()
