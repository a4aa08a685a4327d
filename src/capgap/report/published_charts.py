"""What is published, as pictures: benchmarks against compute, families on the surface.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from capgap.law.benchmarks import BenchmarkResult, published_results
from capgap.report import words
from capgap.report.compute import pareto_front
from capgap.report.figures import Axis, Chart, Pair, Series, power_ticks, span
from capgap.report.labels import place_labels


@dataclass(frozen=True)
class OwnResult:
    """A model of the user's own: FLOPs it took, and its mean over the six benchmarks in percent."""

    name: str
    flops: float
    mean: float


def benchmark_chart(own: Sequence[OwnResult] = ()) -> Chart:
    """The mean of six benchmarks against compute, with the Pareto fronts of published models.

    `own` models are drawn beside the fronts and do not move them.
    """
    published = published_results()
    models: list[BenchmarkResult | OwnResult] = [*published, *own]
    points = [(model.flops, model.mean) for model in models]
    limits = span([flops for flops, _ in points], margin=1.7)
    x = Axis("compute", "FLOPs", True, limits, power_ticks(limits, most=5))
    scores = [mean for _, mean in points]
    y = Axis("mean of six benchmarks", "%", limits=(min(scores) - 3, max(scores) + 3))
    untuned = [model for model in published if not model.tuned]
    series = [
        _front("Pareto front", published, limits[1], "solid"),
        _front("without instruction-tuned", untuned, limits[1], "dash"),
    ]
    names = [model.name for model in models]
    sides = place_labels(points, names, x, y, lines=[(line.x, line.y) for line in series])
    by_name = dict(zip(names, sides, strict=True))
    looks = (
        (False, False, "trained alone or pruned", "muted", "circle-open"),
        (True, False, "distilled by the law: MiniMA", "series-0", "square"),
        (True, True, "instruction-tuned: MiniChat", "series-1", "diamond"),
    )
    for distilled, tuned, name, colour, marker in looks:
        held = [m for m in published if (m.distilled, m.tuned) == (distilled, tuned)]
        series.append(
            Series(
                name,
                tuple(model.flops for model in held),
                tuple(model.mean for model in held),
                colour=colour,
                marker=marker,
                size=9,
                hover=tuple(_scores_text(model) for model in held),
                labels=tuple(model.name for model in held),
                label_at=tuple(by_name[model.name] for model in held),
            )
        )
    if own:
        series.append(
            Series(
                "your models",
                tuple(model.flops for model in own),
                tuple(model.mean for model in own),
                colour="series-2",
                marker="star",
                size=14,
                hover=tuple(
                    f"{model.name}<br>mean {model.mean:.2f}<br>{words.power(model.flops)} FLOPs"
                    for model in own
                ),
                labels=tuple(model.name for model in own),
                label_at=tuple(by_name[model.name] for model in own),
            )
        )
    return Chart(
        "benchmarks-published",
        "Published models: six benchmarks against compute",
        "Up and to the left is better. The mean is the plain one of MMLU, C-Eval, DROP, HumanEval, "
        "BBH and GSM8K. A distilled model's compute is its own and its teacher's forward passes; "
        "the teacher's training is not counted.",
        x,
        y,
        tuple(series),
        ("Scores and compute: arXiv 2311.07052, the authors' repository.",),
    )


def _front(name: str, models: Sequence[BenchmarkResult], right: float, dash: str) -> Series:
    """The stepped line of the highest mean for at most so much compute."""
    front = [(flops, -lost) for flops, lost in pareto_front((m.flops, -m.mean) for m in models)]
    corners: list[Pair] = []
    for (flops, mean), after in zip(front, [*front[1:], (right, 0.0)], strict=True):
        corners += [(flops, mean), (after[0], mean)]
    return Series(
        name,
        tuple(corner[0] for corner in corners),
        tuple(corner[1] for corner in corners),
        "line",
        colour="muted",
        width=1.5,
        dash=dash,
    )


def _scores_text(model: BenchmarkResult) -> str:
    scores = ", ".join(f"{name} {score:.1f}" for name, score in model.scores.items())
    return f"{model.name}<br>mean {model.mean:.2f}<br>{scores}<br>{words.power(model.flops)} FLOPs"
