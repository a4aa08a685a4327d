"""Which teacher for a student of this size and these tokens: what the published laws, and a user's
own, say of the models at hand. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from capgap.errors import UserError
from capgap.hardware import hours
from capgap.law.families import PublishedModel, find_family, find_model, published_families
from capgap.law.published import PUBLISHED_LINES, PUBLISHED_SURFACE
from capgap.sizes import format_count, forward_flops, parse_count, training_flops

# What the published surface is good for (arXiv 2502.08606): about 1% of a loss
SURFACE_ERROR = 0.01
# Students and teachers that it was read from, in non-embedding parameters
SURFACE_RANGE = (143e6, 12.6e9)


@dataclass(frozen=True)
class Candidate:
    """A teacher that could be taken. Sizes in parameters; `tokens` it was trained on, or None."""

    name: str
    non_embedding: int
    total: int
    tokens: int | None


@dataclass(frozen=True)
class LinearRule:
    """T* of a linear law, and the interval that its source leaves."""

    source: str
    teacher: float
    low: float
    high: float
    caution: str | None


def candidates_of(family: str | None, teachers: Sequence[str]) -> list[Candidate]:
    """The members of a family, and teachers by their published name, a Hugging Face folder (whose
    config is read), or a size such as 7B.

    UserError for names that are none, and where nothing is asked for.
    """
    models = list(find_family(family).models) if family is not None else []
    found = [_published(model) for model in models]
    for name in teachers:
        known = find_model(name)
        if known is not None:
            found.append(_published(known))
        elif Path(name.strip()).is_dir():
            found.append(_by_folder(name.strip()))
        else:
            found.append(_by_size(name))
    if not found:
        raise UserError(
            "no teachers to choose from: give --family (" + ", ".join(published_families()) + ") "
            "or --teachers, such as Llama-2-7B,Qwen2.5-14B or 3B,7B"
        )
    names = [one.name for one in found]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise UserError(f"the teacher {twins[0]} is given twice")
    return found


def own_rule(path: Path, student: int) -> LinearRule:
    """What the law of a sweep of the user's own says; UserError where it identifies none."""
    try:
        laws = json.loads(path.read_text())["laws"]
    except FileNotFoundError:
        raise UserError(f"no law {path}: it is the law.json in a sweep's output folder") from None
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{path} is no law.json of a sweep ({error})") from None
    fitted = [law for law in laws if law["status"] == "identified"]
    if not fitted:
        reasons = "; ".join(f"{law['init']}: {law['reason']}" for law in laws) or "it has no curve"
        raise UserError(f"{path} identifies no law ({reasons}): leave --law away, or sweep more")
    law = max(fitted, key=lambda one: (one["init"] == "pruned", one["tokens"]))
    slopes = law["slope_interval"]
    teacher, low, high = (
        max(1.0, slope * student + law["intercept"]) for slope in (law["slope"], *slopes)
    )
    students = law["band"]["student"]
    caution = None
    if not students[0] <= student <= students[-1]:
        caution = (
            f"read from students of {format_count(students[0])} to {format_count(students[-1])}, "
            f"so for {format_count(student)} it is an extrapolation"
        )
    name = (
        f"your sweep ({law['architecture']}, {law['init']}, {format_count(law['tokens'])} tokens)"
    )
    return LinearRule(name, teacher, low, high, caution)


def published_rule(student: int) -> LinearRule:
    """The published line; its interval is the grid's that it was read from, T/S 2.0 to 3.33."""
    line = PUBLISHED_LINES[0]
    teacher = line.optimal_teacher(student)
    caution = None
    if not 56e6 <= student <= 1.1e9:
        caution = (
            f"read from teachers of 70M to 2.8B, so for a student of {format_count(student)} it is "
            "an extrapolation"
        )
    return LinearRule(
        line.name, max(teacher, float(student)), 2.0 * student, student / 0.3, caution
    )


def recommend(
    student: int,
    tokens: int,
    candidates: Sequence[Candidate],
    *,
    own: LinearRule | None = None,
    gpus: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """The candidates, best first, with what each rests on (docs/cli.md has the keys).

    `student` in non-embedding parameters. The published surface gives every candidate an expected
    loss, good to 1%. Those whose loss is within that error of the lowest cannot be told apart by
    it: among them the one nearest (in the logarithm) to the linear law's T* is first, by the
    user's own law where there is one, and then the cheaper; all others follow by their loss.
    """
    rule = own or published_rule(student)
    rows = [_row(student, tokens, one, rule, gpus) for one in candidates]
    lowest = min(row["expected_loss"] for row in rows)
    for row in rows:
        row["margin"] = row["expected_loss"] / lowest - 1

    def rank(row: dict[str, Any]) -> tuple[float, float, float]:
        tied = row["margin"] <= SURFACE_ERROR
        distance = round(abs(math.log(row["non_embedding"] / rule.teacher)), 2)
        return (0.0, distance, row["flops_total"]) if tied else (row["margin"], distance, 0.0)

    rows.sort(key=rank)
    by_line = min(rows, key=lambda row: abs(math.log(row["non_embedding"] / rule.teacher)))
    by_surface = min(rows, key=lambda row: row["expected_loss"])
    by_line["rests_on"].append(f"nearest to the linear law of {rule.source}")
    by_surface["rests_on"][0] += ", on which it has the lowest loss"
    alone = float(PUBLISHED_SURFACE.supervised.loss(student, tokens))
    return {
        "student": student,
        "tokens": tokens,
        "recommendations": rows,
        "linear_law": {
            "source": rule.source,
            "teacher": rule.teacher,
            "interval": [rule.low, rule.high],
            "nearest": by_line["teacher"],
            "caution": rule.caution,
        },
        "surface": {
            "source": "arXiv 2502.08606",
            "nearest": by_surface["teacher"],
            "loss_without_teacher": alone,
            "error": SURFACE_ERROR,
            "caution": _out_of_range(student),
        },
        "verdict": _verdict(rows, by_line, by_surface, alone),
    }


def _published(model: PublishedModel) -> Candidate:
    counts = model.parameters()
    return Candidate(model.name, counts.non_embedding, counts.total, model.tokens)


def _by_folder(name: str) -> Candidate:
    # the only teachers for which transformers, and with it torch, is loaded
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config

    counts = shape_of(read_config(name)).parameters()
    return Candidate(Path(name).name, counts.non_embedding, counts.total, None)


def _by_size(name: str) -> Candidate:
    try:
        size = parse_count(name)
    except UserError:
        known = ", ".join(find_family("llama2").models[i].name for i in range(2))
        raise UserError(
            f"--teachers: {name!r} is no published model (such as {known}), no folder and no size "
            "(such as 7B)"
        ) from None
    return Candidate(name.strip(), size, size, None)


def _row(
    student: int,
    tokens: int,
    one: Candidate,
    rule: LinearRule,
    gpus: tuple[int, str] | None,
) -> dict[str, Any]:
    surface = PUBLISHED_SURFACE.supervised
    read = one.tokens or float(surface.compute_optimal_tokens(one.non_embedding))
    teacher_loss = float(surface.loss(one.non_embedding, read))
    loss = float(PUBLISHED_SURFACE.loss(student, tokens, teacher_loss))
    flops = training_flops(student, tokens) + forward_flops(one.total, tokens)
    cautions = [] if one.tokens else ["its training tokens are not known: taken as compute-optimal"]
    if one.non_embedding < student:
        cautions.append("it is smaller than the student")
    if _out_of_range(one.non_embedding):
        cautions.append("its size lies outside of what the surface was read from")
    return {
        "teacher": one.name,
        "non_embedding": one.non_embedding,
        "total": one.total,
        "ratio": one.non_embedding / student,
        "teacher_tokens": one.tokens,
        "teacher_loss": teacher_loss,
        "expected_loss": loss,
        "interval": [loss * (1 - SURFACE_ERROR), loss * (1 + SURFACE_ERROR)],
        "in_linear_interval": rule.low <= one.non_embedding <= rule.high,
        "flops_total": flops,
        "hours": None if gpus is None else hours(flops, gpus),
        "rests_on": ["the published surface, arXiv 2502.08606"],
        "cautions": cautions,
    }


def _out_of_range(size: float) -> str | None:
    low, high = SURFACE_RANGE
    if low <= size <= high:
        return None
    return f"read from models of {format_count(low)} to {format_count(high)}"


def _verdict(
    rows: list[dict[str, Any]], by_line: dict[str, Any], by_surface: dict[str, Any], alone: float
) -> str:
    first = rows[0]["teacher"]
    if by_line is by_surface:
        reason = "the linear law and the surface agree on it"
    elif by_line["margin"] <= SURFACE_ERROR:
        reason = (
            f"the linear law says so; the surface puts {by_surface['teacher']} first, but by "
            f"{by_line['margin']:.2%} of the loss, less than the {SURFACE_ERROR:.0%} it is good to"
        )
    else:
        reason = (
            f"the surface says so; the linear law says {by_line['teacher']}, which the surface "
            f"puts {by_line['margin']:.1%} above. The line knows sizes alone, the surface the "
            "teacher's loss and the tokens"
        )
    line = f"Take {first}: {reason}."
    if rows[0]["expected_loss"] >= alone:
        line += (
            f" By the surface no teacher helps: without one the loss is {alone:.3f}, because "
            "so many tokens teach the student as much."
        )
    return line


def print_advice(found: dict[str, Any], console: Console) -> None:
    """The same for a person."""
    timed = found["recommendations"][0]["hours"] is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("teacher", no_wrap=True)
    for name in ("size", "T/S", "expected loss", "FLOPs", *(["hours"] if timed else [])):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in found["recommendations"]:
        marks = []
        if row["teacher"] == found["linear_law"]["nearest"]:
            marks.append("linear law")
        if row["teacher"] == found["surface"]["nearest"]:
            marks.append("lowest on the surface")
        half = (row["interval"][1] - row["interval"][0]) / 2
        cells = [
            row["teacher"],
            format_count(row["non_embedding"]),
            f"{row['ratio']:.2f}",
            f"{row['expected_loss']:.3f} ± {half:.3f}",
            f"{row['flops_total']:.2e}",
            *([f"{row['hours']:,.0f}"] if timed else []),
            "; ".join(marks + row["cautions"]),
        ]
        table.add_row(*cells)
    # a narrower terminal breaks lines, which beats a table with every word cut short
    console.width = max(console.width, 110)
    console.print(table)
    line = found["linear_law"]
    low, high = (format_count(size) for size in line["interval"])
    console.print(
        f"\nlinear law ({line['source']}): T* = {format_count(line['teacher'])}, between {low} and "
        f"{high}" + (f"; {line['caution']}" if line["caution"] else "")
    )
    surface = found["surface"]
    console.print(
        f"surface ({surface['source']}): losses on its text, to {surface['error']:.0%}; without "
        f"a teacher {surface['loss_without_teacher']:.3f}"
        + (f"; {surface['caution']}" if surface["caution"] else "")
    )
    console.print(found["verdict"])
