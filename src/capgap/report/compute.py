"""Loss against compute, and its Pareto front. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from capgap.records import RunRecord
from capgap.report import words
from capgap.report.charts import LOSS_UNIT, legend_once, student_look, student_name
from capgap.report.data import Results, done, heldout_loss
from capgap.report.figures import Absent, Axis, Chart, Figure, Pair, Series, power_ticks, span


def compute_chart(results: Results, architecture: str, *, teacher_training: bool) -> Figure:
    """Loss against compute with the Pareto front of the students; seeds are averaged."""
    stem = "compute" if teacher_training else "compute-given-teacher"
    counted = "everything counted" if teacher_training else "teacher given"
    name, title = f"{stem}-{architecture}", f"Loss against compute, {counted}: {architecture}"
    means = _mean_runs(results, architecture, teacher_training=teacher_training)
    students = [run for run in means if run["kind"] != "teacher"]
    if not students:
        return Absent(name, title, "No student of this architecture has finished yet.")
    drawn = means if teacher_training else students
    limits = span([run["flops"] for run in drawn], margin=1.4)
    series = [_front_series([(run["flops"], run["loss"]) for run in students], limits)]
    for size in sorted({run["student_size"] for run in students}):
        for kind in ("cell", "baseline"):
            held = [r for r in students if (r["kind"], r["student_size"]) == (kind, size)]
            chains = [r for r in held if kind == "cell" and r["init"] == "chain"]
            direct = [r for r in held if r not in chains]
            if direct:
                series.append(_compute_points(results, kind, size, direct))
            if chains:
                series.append(_compute_points(results, "chain", size, chains))
    teachers = [run for run in drawn if run["kind"] == "teacher"]
    if teachers:
        series.append(_compute_points(results, "teacher", 0, teachers))
    return Chart(
        name,
        title,
        "Down and to the left is better. The stepped line is the Pareto front of the students: "
        "see whether distilled students (filled) or those trained on cross-entropy alone (hollow) "
        + ("hold it once the teacher's training is paid for." if teacher_training else "hold it."),
        Axis("compute", "FLOPs", log=True, limits=limits, ticks=power_ticks(limits, most=5)),
        Axis("held-out loss", LOSS_UNIT),
        tuple(legend_once(series)),
    )


def _mean_runs(
    results: Results, architecture: str, *, teacher_training: bool
) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for record in done(results.records, "cell", "baseline", "teacher"):
        if record.architecture == architecture:
            names = ("kind", "init", "tokens", "student_size", "teacher_size")
            groups[tuple(getattr(record, name) for name in names)].append(record)
    runs = []
    for (kind, init, tokens, student, teacher), held in groups.items():
        flops = [flops_of(record, teacher_training=teacher_training) for record in held]
        counted = [value for value in flops if value is not None]
        if kind == "teacher" and not teacher_training:
            continue
        if counted:
            runs.append(
                {
                    "kind": kind,
                    "init": init,
                    "tokens": tokens,
                    "student_size": student,
                    "teacher_size": teacher,
                    "flops": fmean(counted),
                    "loss": fmean(map(heldout_loss, held)),
                }
            )
    return sorted(runs, key=lambda run: run["flops"])


def flops_of(record: RunRecord, *, teacher_training: bool) -> float | None:
    """FLOPs of a run over its recorded parts, with or without the training of its teacher."""
    total = record.flops.total
    if total is None:
        return None
    counted = total if teacher_training else total - (record.flops.teacher_training or 0)
    # nothing counted is nothing known: a run costs something
    return float(counted) if counted > 0 else None


def pareto_front(points: Iterable[Pair]) -> list[Pair]:
    """The (cost, loss) pairs that no other pair beats in both, by rising cost."""
    front: list[Pair] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _front_series(points: Iterable[Pair], limits: Pair) -> Series:
    front = pareto_front(points)
    corners = []
    for (cost, loss), after in zip(front, [*front[1:], (limits[1], front[-1][1])], strict=True):
        corners += [(cost, loss), (after[0], loss)]
    return Series(
        "Pareto front of the students",
        tuple(cost for cost, _ in corners),
        tuple(loss for _, loss in corners),
        "line",
        colour="muted",
        width=1.5,
        dash="solid",
    )


def _compute_points(
    results: Results, kind: str, student_size: int, runs: Sequence[Mapping[str, Any]]
) -> Series:
    if kind == "teacher":
        name, colour, marker = "teachers", "muted", "triangle-open"
    else:
        style = student_look(results, student_size)
        hollow = kind == "baseline"
        name = "hollow: cross-entropy alone" if hollow else student_name(student_size)
        colour, marker = style.colour, style.marker + ("-open" if hollow else "")
        if kind == "chain":
            name, marker = f"{name}, through an assistant", "triangle-down"
    return Series(
        name,
        tuple(run["flops"] for run in runs),
        tuple(run["loss"] for run in runs),
        colour=colour,
        marker=marker,
        group=kind if kind == "baseline" else "",
        shared=kind not in ("cell", "chain"),
        hover=tuple(_run_text(run) for run in runs),
    )


def _run_text(run: Mapping[str, Any]) -> str:
    if run["kind"] == "teacher":
        return f"teacher {words.size(run['teacher_size'])}<br>loss {words.loss(run['loss'])}"
    what = "cross-entropy alone" if run["kind"] == "baseline" else "distilled"
    teacher = f", teacher {words.size(run['teacher_size'])}" if run["teacher_size"] else ""
    return (
        f"{student_name(run['student_size'])}, {what}{teacher}<br>"
        f"{run['init']}, {words.size(run['tokens'])} tokens<br>loss {words.loss(run['loss'])}"
    )
