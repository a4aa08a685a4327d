"""Pictures of published results, of loss surfaces and of advice. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from capgap.law.advise import Advice, recommend
from capgap.law.advise import Row as Advised
from capgap.law.published import (
    PUBLISHED_SURFACE,
    BenchmarkResult,
    candidates_of,
    published_families,
    published_results,
)
from capgap.law.rules import PUBLISHED_RULE, SURFACE_SIZES, SurfaceRule
from capgap.law.surface import RATIOS, DistillationSurface, TeacherTokens
from capgap.report import draw, numbers
from capgap.report.charts import LOSS, STUDENT, TEACHER, WEDGE
from capgap.report.draw import LIGHT, Frame, Look, Pair, Picture, Row, in_words, row
from capgap.report.results import safe
from capgap.report.run_charts import pareto_front

# shares above the lowest loss and the opacity of their bands, widest first
COSTS = {0.05: 0.14, 0.01: 0.22, 0.001: 0.35}
NEAR = "within 0.1%, 1% and 5% of the lowest loss"
VALLEY, FIXED_RATIO = "best teacher", "T = 2.5 S (arXiv 2311.07052)"
FRONT, UNTUNED = "Pareto front", "the same without instruction-tuned"
# by how many steps a published model was made by distilling and tuning
MADE = {
    "trained alone or pruned": Look(draw.MUTED, "circle"),
    "distilled by the law: MiniMA": Look(LIGHT["series-0"], "square"),
    "instruction-tuned: MiniChat": Look(LIGHT["series-1"], "diamond"),
    "your models": Look(LIGHT["series-2"], draw.STAR),
}
# with more models than this, only families are named
MOST_LABELS = 14
# share above the lowest loss from which models stand on the upper edge: one whose teacher is far
# too small would flatten all others
WORST = 0.1
# the student of arXiv 2311.07052: MiniMA-3B
EXAMPLE = (3_000_000_000, 126_000_000_000)


@dataclass(frozen=True)
class OwnResult:
    """A model of the user's own: FLOPs it took, and its mean over the six benchmarks in percent."""

    name: str
    flops: float
    mean: float


def surface_chart(
    surface: DistillationSurface,
    name: str,
    title: str,
    *,
    students: Pair,
    teachers: Pair,
    tokens: float | None = None,
    tokens_per_parameter: float | None = None,
    teacher_tokens: TeacherTokens | None = None,
    notes: tuple[str, ...] = (),
) -> Picture:
    """Cost of each teacher above the best of each student, both sizes in parameters, with the
    valley of best teachers and T = 2.5 S.

    Students learn from `tokens`, all alike, or from `tokens_per_parameter`: one of the two.
    Teachers were trained compute-optimally, or on `teacher_tokens`.
    """
    assert (tokens is None) != (tokens_per_parameter is None)
    sizes, above = np.geomspace(*students, 25), np.geomspace(*teachers, 400)
    read = np.full_like(sizes, tokens) if tokens else (tokens_per_parameter or 0.0) * sizes
    alone = surface.supervised
    taught = (teacher_tokens or alone.compute_optimal_tokens()).of(above)
    losses = surface.loss(sizes, read, alone.loss(above, taught)[:, None])
    looks = {VALLEY: Look(draw.TEXT), NEAR: Look(LIGHT["series-0"])}
    looks |= {FIXED_RATIO: Look(LIGHT["series-1"], dash=draw.DASHED)}
    frame = Frame(draw.log_axis(STUDENT, students), draw.log_axis(TEACHER, teachers), looks)
    valley = []
    for size, own in zip(sizes.tolist(), read.tolist(), strict=True):
        best = surface.best_teacher(size, own, teacher_tokens=teacher_tokens)
        sizes_text = f"student {numbers.size(size)}\nbest teacher {numbers.size(best.ratio * size)}"
        tip = f"{sizes_text}\nT/S {best.ratio:.1f}, loss {best.loss:.3f}"
        if RATIOS[0] * 1.001 < best.ratio < RATIOS[1] / 1.001:
            valley.append(row(VALLEY, size, best.ratio * size, tip))
    marks = []
    for cost, opacity in COSTS.items():
        near = [above[column <= (1 + cost) * column.min()] for column in losses.T]
        rows = zip(sizes.tolist(), near, strict=True)
        band = [row(NEAR, s, None, low=float(n[0]), high=float(n[-1])) for s, n in rows]
        marks += frame.draw("bands", band, opacity=opacity)
    fixed = [row(FIXED_RATIO, size, 2.5 * size) for size in sizes.tolist()]
    marks += frame.draw("lines", [*valley, *fixed], strokeWidth=2.5)
    inside = [one for one in valley if teachers[0] <= one["y"] <= teachers[1]]
    if not inside:
        notes = ("The lowest loss is outside of the picture for every student.", *notes)
    return Picture(
        name,
        title,
        "The line is the best teacher of each student. Within the bands a teacher costs at most "
        "0.1% (darkest), 1% and 5% of the lowest loss: a wide band means that the choice matters "
        "little.",
        marks,
        f"{title}. {in_words((*inside[:1], *inside[-1:]))}",
        notes,
    )


def published_surface_chart(tokens_per_parameter: float) -> Picture:
    """The published surface (arXiv 2502.08606) for students of so many tokens per parameter."""
    low, high = (numbers.size(size) for size in SURFACE_SIZES)
    return surface_chart(
        PUBLISHED_SURFACE,
        f"surface-published-{tokens_per_parameter:g}",
        f"Published surface: {tokens_per_parameter:g} tokens per student parameter",
        students=SURFACE_SIZES,
        teachers=(SURFACE_SIZES[0], 1e12),
        tokens_per_parameter=tokens_per_parameter,
        notes=(
            "arXiv 2502.08606: students from scratch, teachers trained compute-optimally. It was "
            f"read from models of {low} to {high}; larger teachers are an extrapolation.",
        ),
    )


def own_surface_chart(own: SurfaceRule, architecture: str, tokens: float) -> Picture:
    """The surface fitted to a sweep's students from scratch, on so many tokens, between the sizes
    of its students and teachers."""
    sizes = [student for student, _ in own.combinations]
    return surface_chart(
        own.surface,
        f"surface-{safe(architecture)}-{tokens:.0f}",
        f"Surface of this sweep: {architecture} from scratch, {numbers.size(tokens)} tokens",
        students=draw.span(sizes, 1.1 if len(set(sizes)) > 1 else 1.5),
        teachers=draw.span(own.teachers, 1.1),
        tokens=tokens,
        teacher_tokens=own.teacher_tokens,
        notes=(
            f"It fits the sweep's losses to {own.error:.2%}; a teacher is known by its loss alone, "
            "as the sweep's teachers were trained.",
        ),
    )


def benchmark_chart(own: Sequence[OwnResult] = ()) -> Picture:
    """The mean of six benchmarks against compute, with the Pareto fronts of published models: MMLU,
    C-Eval, DROP, HumanEval, BBH and GSM8K (arXiv 2311.07052).

    `own` models, means in percent, are drawn beside the fronts and do not move them.
    """
    published = published_results()
    models: list[BenchmarkResult | OwnResult] = [*published, *own]
    limits = draw.span([model.flops for model in models], 1.7)
    looks = MADE | {FRONT: Look(draw.MUTED), UNTUNED: Look(draw.MUTED, dash=draw.DASHED)}
    if not own:
        del looks["your models"]
    scores = [model.mean for model in models]
    y = draw.linear_axis("mean of six benchmarks (%)", (min(scores) - 3, max(scores) + 3))
    frame = Frame(draw.log_axis("compute (FLOPs)", limits, draw.POWER), y, looks)
    rows = [_model(model) for model in models]
    fronts = _front(FRONT, published, limits[1])
    fronts += _front(UNTUNED, [model for model in published if not model.tuned], limits[1])
    marks = frame.draw("lines", fronts, interpolate="step-after", strokeWidth=1.5)
    best = max(models, key=lambda model: model.mean)
    return Picture(
        "benchmarks-published",
        "Published models: six benchmarks against compute",
        "Up and to the left is better. The mean is of MMLU, C-Eval, DROP, HumanEval, BBH, GSM8K. "
        "Compute counts a teacher's forward passes and not its training.",
        marks + frame.draw("points", rows, size=90) + frame.name(rows, _corners(fronts)),
        f"Mean of six benchmarks over FLOPs of {len(models)} models; the highest is {best.name} "
        f"with {best.mean:.1f}%.",
        ("Scores and compute: arXiv 2311.07052, the authors' repository.",),
        height=400,
    )


def advice_chart(found: Advice, *, name: str = "advice", title: str = "") -> Picture:
    """Every candidate at its size and the student's expected loss, with the error of its difference
    to the lowest, the surface's own line where that is the published one, and the linear law."""
    size, line = found.student.non_embedding, found.linear_law
    rows = sorted(found.recommendations, key=lambda one: one.non_embedding)
    rule = PUBLISHED_RULE if found.surface.source == PUBLISHED_RULE.source else None
    lowest = min(one.expected_loss for one in rows)
    edge = (1 + WORST) * lowest
    models, looks = _candidates(rows, edge)
    limits = draw.span([*(one.non_embedding for one in rows), *(line.interval or ())], 1.6)
    heights = (0.985 * lowest, 1.01 * min(edge, max(one.expected_loss for one in rows)))
    near, shade, upright = [], [], []
    if rule is not None:
        key = "published surface"
        looks[key] = Look(draw.TEXT)
        above = np.geomspace(*limits, 80)
        taught = rule.surface.supervised.loss(above, rule.teacher_tokens.of(above))
        losses = rule.surface.loss(size, found.tokens, taught)
        near = [row(key, a, b) for a, b in zip(above.tolist(), losses.tolist(), strict=True)]
    if line.interval is not None and line.teacher is not None:
        key = f"linear law: {numbers.size(line.teacher)}"
        looks[key] = Look(draw.MUTED, dash=draw.DASHED)
        upright = [row(key, line.teacher, None)]
        key = f"its interval: {' to '.join(map(numbers.size, line.interval))}"
        looks[key] = WEDGE
        low, high = heights
        shade = [[row(key, end, None, low=low, high=high) for end in run] for run in line.runs]
    y = draw.linear_axis(f"expected student loss ({LOSS})", heights)
    frame = Frame(draw.log_axis(TEACHER, limits), y, looks)
    marks = [mark for run in shade for mark in frame.draw("bands", run)]
    marks += frame.draw("lines", near)
    marks += frame.draw("uprights", upright, strokeWidth=2)
    marks += frame.draw("lines", models, strokeWidth=1, opacity=0.5) + frame.draw("bars", models)
    marks += frame.draw("points", models, size=90)
    marks += frame.name(models, near) if len(models) <= MOST_LABELS else []
    cautions = {"line": line.caution, "surface": found.surface.caution}
    notes = [f"Of the {source}: {caution}." for source, caution in cautions.items() if caution]
    if any(one.expected_loss > edge for one in rows):
        notes.append(f"Marks at the top are {WORST:.0%} above the lowest loss, or more.")
    return Picture(
        name,
        title or f"Teachers of a {numbers.size(size)} student, {numbers.size(found.tokens)} tokens",
        "Filled marks cannot be told from the lowest; bars are one standard error of a difference. "
        "Losses and line are the surface's, of its own text and compute-optimal teachers.",
        marks,
        f"Expected student loss over {len(rows)} teachers. "
        + (f"Take {found.take}." if found.take else "None of them is larger than the student."),
        tuple(notes),
        height=400,
    )


def families_chart() -> Picture:
    """The members of published families that are larger than MiniMA-3B as its teachers."""
    student, tokens = EXAMPLE
    members = [model for family in published_families().values() for model in family.models]
    models = [one.name for one in members if one.non_embedding > student]
    asked = f"{numbers.size(student)} student, {numbers.size(tokens)} tokens"
    title = f"Published families as teachers: {asked}"
    found = recommend(student, tokens, candidates_of(None, models))
    return advice_chart(found, name="families-published", title=title)


def _front(key: str, models: Sequence[BenchmarkResult], right: float) -> list[Row]:
    """The highest mean for at most so much compute; it holds until the next model."""
    front = pareto_front((model.flops, -model.mean) for model in models)
    return [row(key, x, -y) for x, y in [*front, (right, front[-1][1])]]


def _corners(front: Sequence[Row]) -> list[Row]:
    """Places along stepped lines, so that no name is put on one."""
    return [
        one | {"x": x}
        for one, after in pairwise(front)
        if one["key"] == after["key"]
        for x in np.geomspace(one["x"], after["x"], 30).tolist()
    ]


def _model(model: BenchmarkResult | OwnResult) -> Row:
    tip = f"{model.name}\nmean {model.mean:.2f}\n{numbers.power(model.flops)} FLOPs"
    made = 3
    if isinstance(model, BenchmarkResult):
        made = model.distilled + model.tuned
        tip += "\n" + ", ".join(f"{name} {score:.1f}" for name, score in model.scores.items())
    return row([*MADE][made], model.flops, model.mean, tip, text=model.name)


def _candidates(rows: Sequence[Advised], edge: float) -> tuple[list[Row], dict[str, Look]]:
    """A mark for every candidate, those above `edge` on it, and the looks of their families, the
    same in every picture; after all families comes what belongs to none."""
    published = {
        model.name: (position, family.title)
        for position, family in enumerate(published_families().values())
        for model in family.models
    }
    families = [published.get(one.teacher, (len(published), "your teachers")) for one in rows]
    looks = {title: draw.look(position) for position, title in sorted(set(families))}
    marks = []
    for one, (_, title) in zip(rows, families, strict=True):
        loss, read = one.expected_loss, one.teacher_tokens
        tip = (
            f"{one.teacher}: {numbers.size(one.non_embedding)}, T/S {one.ratio:.2f}\n"
            f"expected loss {loss:.3f}, {one.difference:.1%} above the lowest\n"
            + (f"read {numbers.size(read)} tokens" if read else "its tokens are not published")
        )
        text = one.teacher + (f" ({loss:.2f})" if loss > edge else "")
        point, error = (one.non_embedding, min(loss, edge)), loss * one.difference_stderr
        marks.append(row(title, *point, tip, error, hollow=one.told_worse, text=text))
    return marks, looks
