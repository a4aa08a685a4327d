"""The tables of the page as rows of finished text. Pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from capgap.law.cells import BaselineKey, Kind, baseline_key, baselines_by_key
from capgap.records import Failure, RunRecord
from capgap.report import words
from capgap.report.data import Results, curves_of, done, heldout_loss, kinds_of

STATUS = {
    "interior": "inside the grid",
    "smallest": "open below: the smallest teacher may be best",
    "largest": "open above: the largest teacher may be best",
    "flat": "not distinguishable from noise",
    "too_few_points": "too few teachers",
}


@dataclass(frozen=True)
class Table:
    """A table with its heading; the first `text_columns` columns are set left, the rest right."""

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: int = 1
    caption: str = ""
    folded: bool = False


def answer_table(results: Results) -> Table:
    """For every student of every kind the teacher to take, with its interval."""
    kinds = kinds_of(results)
    rows = [
        (*_kind_cells(kind, kinds), *_answer_cells(curve))
        for kind in kinds
        for curve in curves_of(results, kind)
    ]
    varied = _varied(kinds)
    return Table(
        "Which teacher for each student",
        (*varied, "Student", "The optimum is", "Best teacher", "Best T/S", "Best in the grid"),
        tuple(rows),
        text_columns=len(varied) + 2,
        caption=f"Sizes in non-embedding parameters; intervals {_confidence(results)}.",
    )


def _answer_cells(curve: Mapping[str, Any]) -> tuple[str, ...]:
    optimum = curve.get("optimum") or {}
    status = optimum.get("status") or "too_few_points"
    best = optimum.get("grid_best")
    return (
        words.size(curve["student_parameters"]),
        STATUS.get(status, status),
        words.size_with_interval(optimum.get("teacher_parameters"), optimum.get("interval")),
        words.with_interval(optimum.get("ratio"), optimum.get("ratio_interval")),
        words.NOTHING if best is None else words.between(best, optimum.get("grid_interval")),
    )


def _confidence(results: Results) -> str:
    confidence = results.law.get("confidence")
    return "at an unstated level" if confidence is None else f"at {100 * confidence:g}% confidence"


def _kind_texts(kind: Kind) -> dict[str, str]:
    return {
        "Architecture": kind.architecture,
        "Init": kind.init,
        "Tokens": words.size(kind.tokens),
    }


def _varied(kinds: Sequence[Kind]) -> tuple[str, ...]:
    """Headers of what differs between the kinds of this sweep."""
    texts = [_kind_texts(kind) for kind in kinds]
    return tuple(name for name in (texts[0] if texts else ()) if len({t[name] for t in texts}) > 1)


def _kind_cells(kind: Kind, kinds: Sequence[Kind]) -> tuple[str, ...]:
    texts = _kind_texts(kind)
    return tuple(texts[name] for name in _varied(kinds))


def students_table(results: Results) -> Table:
    """The best student of every size, beside its baseline."""
    rows = []
    for kind in kinds_of(results):
        for curve in curves_of(results, kind):
            best = min(curve["points"], key=lambda point: point["loss"])
            rows.append(
                (
                    *_kind_texts(kind).values(),
                    words.size(curve["student_parameters"]),
                    words.size(best["teacher_parameters"]),
                    words.loss(best.get("teacher_loss"), best.get("teacher_loss_stderr")),
                    words.loss(best["loss"], best.get("loss_stderr")),
                    words.gain(best.get("gain"), best.get("gain_stderr")),
                )
            )
    return Table(
        "Best measured student of each size",
        (
            "Architecture",
            "Init",
            "Tokens",
            "Student",
            "Teacher",
            "Teacher's loss",
            "Student's loss",
            "Gain over CE alone",
        ),
        tuple(rows),
        text_columns=2,
        caption="Held-out losses in nats per token, ± one standard error; the mean over seeds.",
    )


def teachers_table(results: Results) -> Table:
    """The teachers with their size, training and held-out loss."""
    teachers = sorted(
        done(results.records, "teacher"),
        key=lambda r: (r.architecture, r.seed, r.parameters.non_embedding),
    )
    rows = [
        (
            teacher.architecture,
            words.size(teacher.parameters.non_embedding),
            words.size(teacher.parameters.total),
            _shape_text(teacher.shape or {}),
            words.size(teacher.tokens),
            "given" if teacher.learning_rate is None else f"{teacher.learning_rate:.2g}",
            str(teacher.seed),
            _loss(teacher),
            _bits(teacher),
            words.duration(teacher.wall_seconds),
        )
        for teacher in teachers
    ]
    return Table(
        "Teachers",
        (
            "Architecture",
            "Non-embedding",
            "Total",
            f"Layers {words.TIMES} width",
            "Tokens",
            "Learning rate",
            "Seed",
            "Loss",
            "Bits per byte",
            "Time",
        ),
        tuple(rows),
    )


def _shape_text(shape: Mapping[str, Any]) -> str:
    if not shape.get("layers"):
        return words.NOTHING
    return f"{shape['layers']} {words.TIMES} {shape['hidden']}"


def _loss(record: RunRecord) -> str:
    heldout = record.heldout
    return words.NOTHING if heldout is None else words.loss(heldout.loss, heldout.loss_stderr)


def _bits(record: RunRecord) -> str:
    value = record.heldout.bits_per_byte if record.heldout else None
    return words.NOTHING if value is None else f"{value:.3f}"


def grid_table(results: Results) -> Table:
    """Every cell and baseline of the sweep, failed ones too."""
    matched = baselines_by_key(results.records)
    runs = sorted(
        (r for r in results.records if r.kind in ("cell", "baseline")),
        key=lambda r: (
            r.architecture,
            r.init or "",
            r.tokens,
            r.student_size or 0,
            r.teacher_size or 0,
            r.seed,
            r.kind,
        ),
    )
    return Table(
        "The whole grid",
        (
            "Run",
            "Architecture",
            "Init",
            "Tokens",
            "Student",
            "Teacher",
            "Seed",
            "Loss",
            "Bits per byte",
            "Gain",
            "Last KL",
            "Agreement",
            "After the cut",
            "FLOPs",
            "Time",
        ),
        tuple(_grid_row(run, matched) for run in runs),
        text_columns=3,
        caption="Losses, gain and KL in nats per token. A dash is a number that does not exist.",
        folded=True,
    )


def _grid_row(run: RunRecord, matched: Mapping[BaselineKey, RunRecord]) -> tuple[str, ...]:
    baseline = matched.get(baseline_key(run)) if run.kind == "cell" else None
    gain = None
    if baseline is not None and run.status == "done":
        gain = heldout_loss(baseline) - heldout_loss(run)
    what = "distilled" if run.kind == "cell" else "CE alone"
    return (
        what if run.status == "done" else f"{what}, {run.status}",
        run.architecture,
        run.init or words.NOTHING,
        words.size(run.tokens),
        words.size(run.student_size),
        words.size(run.teacher_size),
        str(run.seed),
        _loss(run),
        _bits(run),
        words.gain(gain),
        words.loss(_last(run.curve.kl)),
        words.share(_last(run.curve.agreement)),
        words.loss(run.after_cut.loss if run.after_cut else None),
        words.power(run.flops.total) if run.flops.total else words.NOTHING,
        words.duration(run.wall_seconds),
    )


def _last(values: Sequence[float | None]) -> float | None:
    """The last measured value of a training curve."""
    return next((value for value in reversed(values) if value is not None), None)


def stages_table(results: Results) -> Table:
    """Where the time went."""
    stages = {n: s for n, s in (results.sweep.get("stages") or {}).items() if s is not None}
    whole = sum(stages.values())
    rows = [
        (name.replace("_", " "), words.duration(seconds), words.share(seconds / whole))
        for name, seconds in sorted(stages.items(), key=lambda item: -item[1])
        if whole > 0
    ]
    wall = results.sweep.get("wall_seconds")
    caption = "" if wall is None else f"The whole sweep took {words.duration(wall)}."
    return Table("Time by stage", ("Stage", "Time", "Share"), tuple(rows), caption=caption)


def excluded_table(results: Results) -> Table:
    """Failed runs and runs left out of the law, each with its reason."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for record in results.records:
        if record.failure is not None:
            reasons[record.id].append(_failure_text(record.failure))
    for item in results.law.get("excluded", ()):
        if item["id"] not in reasons:
            reasons[item["id"]].append(item["reason"])
    return Table(
        "Failed or left out",
        ("Run", "Reason"),
        tuple((name, "; ".join(held)) for name, held in sorted(reasons.items())),
        text_columns=2,
    )


def _failure_text(failure: Failure) -> str:
    parts = [failure.message]
    if failure.step is not None:
        parts.append(f"at step {failure.step}")
    windows = failure.windows or []
    if windows:
        shown = ", ".join(str(window) for window in windows[:8])
        parts.append(f"windows {shown}" + (" and more" if len(windows) > 8 else ""))
    return ", ".join(parts)


def machine_table(results: Results) -> Table:
    """What was run on what: dates, machine, versions and corpus."""
    sweep = results.sweep
    rows = [
        ("Recipe hash", str(sweep.get("recipe_hash") or words.NOTHING)),
        ("Started", words.moment(sweep.get("started"))),
        ("Finished", words.moment(sweep["finished"]) if sweep.get("finished") else "not finished"),
    ]
    for heading in ("machine", "versions", "corpus"):
        for name, value in (sweep.get(heading) or {}).items():
            rows.append((f"{heading.capitalize()}: {name.replace('_', ' ')}", _value_text(value)))
    return Table("What was run on what", ("", ""), tuple(rows), text_columns=2)


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(item)}" for name, item in value.items())
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} entries"
    if isinstance(value, list):
        return ", ".join(_value_text(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return words.NOTHING if value is None else str(value)
