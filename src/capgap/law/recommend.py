"""Which teacher for a student of this size and these tokens: what the published laws, and a user's
own, say of the models at hand. Imports no torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capgap.corpus.hub import HUB_NAME, looks_like_path
from capgap.errors import UserError
from capgap.evaluate.measured import Measurement
from capgap.hardware import hours
from capgap.law.families import PublishedModel, find_family, find_model, published_families
from capgap.law.own_losses import is_outdone, on_the_scale_of, tell_measured
from capgap.law.published import PUBLISHED_LINES, PUBLISHED_SURFACE
from capgap.sizes import format_count, forward_flops, parse_count, training_flops

# What the published surface is good for (arXiv 2502.08606): about 1% of a loss
SURFACE_ERROR = 0.01
# Students and teachers that it was read from, in non-embedding parameters
SURFACE_RANGE = (143e6, 12.6e9)


@dataclass(frozen=True)
class Candidate:
    """A teacher that could be taken. Sizes in parameters; `tokens` it was trained on, or None.

    `source`: the folder, or the name on the Hub, with its weights; None where only sizes are known.
    """

    name: str
    non_embedding: int
    total: int
    tokens: int | None
    source: str | None = None


@dataclass(frozen=True)
class LinearRule:
    """T* of a linear law, and the interval that its source leaves."""

    source: str
    teacher: float
    low: float
    high: float
    caution: str | None


def candidates_of(family: str | None, teachers: Sequence[str]) -> list[Candidate]:
    """The members of a family, and teachers by their published name, a Hugging Face folder or name
    on the Hub such as Qwen/Qwen2.5-7B (whose config is read), NAME=FOLDER, or a size such as 7B.

    A published name with a folder has the published sizes and tokens, and the folder's weights; any
    other name is what the folder is called here. UserError for names that are none, and where
    nothing is asked for.
    """
    models = list(find_family(family).models) if family is not None else []
    found = [_published(model) for model in models]
    found += [_candidate(name.strip()) for name in teachers]
    if not found:
        raise UserError(
            "no teachers to choose from: give --family (" + ", ".join(published_families()) + ") "
            "or --teachers, such as Llama-2-7B,Qwen2.5-14B or 3B,7B"
        )
    names = [one.name for one in found]
    twins = sorted({name for name in names if names.count(name) > 1})
    if twins:
        raise UserError(
            f"the teacher {twins[0]} is given twice: tell folders of one name apart as NAME=FOLDER"
        )
    return found


def sources_of(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Where the weights of each candidate are, by its name; UserError for one without weights."""
    found = {}
    for one in candidates:
        if one.source is None:
            raise UserError(
                f"--measure reads models, and of {one.name} there are no weights: give a folder or "
                f"a name on the Hub in --teachers, as {one.name}=FOLDER, or leave --measure away"
            )
        found[one.name] = one.source
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
    """The published line; its interval is the grid's that it was read from, T/S 2.0 to 3.33, and
    goes down to the line itself where that lies lower."""
    line = PUBLISHED_LINES[0]
    teacher = max(line.optimal_teacher(student), float(student))
    caution = None
    if not 56e6 <= student <= 1.1e9:
        caution = (
            f"read from teachers of 70M to 2.8B, so for a student of {format_count(student)} it is "
            "an extrapolation"
        )
    return LinearRule(line.name, teacher, min(2.0 * student, teacher), student / 0.3, caution)


def recommend(
    student: int,
    tokens: int,
    candidates: Sequence[Candidate],
    *,
    own: LinearRule | None = None,
    gpus: tuple[int, str] | None = None,
    measurement: Measurement | None = None,
) -> dict[str, Any]:
    """The candidates, best first, with what each rests on (docs/cli.md has the keys).

    `student` in non-embedding parameters. The published surface gives every candidate an expected
    loss, good to 1%. Those whose loss is within that error of the lowest cannot be told apart by
    it: among them the one nearest (in the logarithm) to the linear law's T* is first, by the
    user's own law where there is one, and then the cheaper; all others follow by their loss.

    With a `measurement` of all candidates their own losses on the user's text decide. One factor
    for all puts them on the surface's scale: that of the best of them, which keeps the loss that
    the surface gives it. Among those that the surface cannot tell apart, a candidate whose own
    loss is no lower than a smaller one's comes after the others.
    """
    rule = own or published_rule(student)
    losses = {one.name: _surface_loss(one) for one in candidates}
    anchor = None
    if measurement is not None:
        anchor, losses = on_the_scale_of(losses, measurement)
    rows = []
    for one in candidates:
        row = _row(student, tokens, one, losses[one.name], rule, gpus)
        if one.tokens is None and anchor in (None, one.name):
            row["cautions"].insert(0, "its training tokens are not known: taken as compute-optimal")
        rows.append(row)
    if measurement is not None:
        tell_measured(rows, measurement)
    lowest = min(row["expected_loss"] for row in rows)
    for row in rows:
        row["margin"] = row["expected_loss"] / lowest - 1

    def by_line_first(row: dict[str, Any]) -> tuple[float, ...]:
        distance = round(abs(math.log(row["non_embedding"] / rule.teacher)), 2)
        return (distance, row["flops_total"], row["margin"])

    def rank(row: dict[str, Any]) -> tuple[float, ...]:
        if row["margin"] <= SURFACE_ERROR:
            return (0.0, is_outdone(row), *by_line_first(row))
        return (row["margin"], False, *by_line_first(row))

    rows.sort(key=rank)
    by_line = min(rows, key=by_line_first)
    by_surface = min(rows, key=lambda row: row["expected_loss"])
    by_line["rests_on"].append(f"nearest to the linear law of {rule.source}")
    by_surface["rests_on"][0] += ", on which it gives the lowest loss"
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
            "anchor": anchor,
            "caution": _out_of_range(student),
        },
        "measure": None if measurement is None else measurement.as_dict(),
        "verdict": _verdict(rows, by_line, by_surface, alone),
    }


def _candidate(given: str) -> Candidate:
    name, mark, place = (part.strip() for part in given.partition("="))
    known = find_model(name)
    if not mark:
        place = name if Path(name).is_dir() else ""
    if known is not None:
        return _published(known, place or None)
    if mark:
        if not (name and place):
            raise UserError(f"--teachers: {given!r} is not of the form NAME=FOLDER")
        return _by_config(place, name)
    is_hub_name = "/" in name and HUB_NAME.fullmatch(name) and not looks_like_path(name)
    if place or is_hub_name:
        return _by_config(name, Path(name).resolve().name)
    return _by_size(name)


def _published(model: PublishedModel, source: str | None = None) -> Candidate:
    counts = model.parameters()
    if source is not None:
        _check_published(model, source)
    return Candidate(model.name, counts.non_embedding, counts.total, model.tokens, source)


def _check_published(model: PublishedModel, source: str) -> None:
    """UserError where what lies there has another size."""
    from capgap.models.families import FAMILIES
    from capgap.models.stored import read_config

    if read_config(source).model_type not in FAMILIES:
        return
    size, published = _by_config(source, model.name).non_embedding, model.parameters().non_embedding
    if abs(size / published - 1) > 0.01:
        raise UserError(
            f"the model in {source} has {format_count(size)} non-embedding parameters, "
            f"{model.name} {format_count(published)}: name it otherwise, as NAME=FOLDER"
        )


def _by_config(source: str, name: str) -> Candidate:
    # the only teachers for which transformers, and with it torch, is loaded
    from capgap.models.build import shape_of
    from capgap.models.stored import read_config

    counts = shape_of(read_config(source)).parameters()
    return Candidate(name, counts.non_embedding, counts.total, None, source)


def _by_size(name: str) -> Candidate:
    try:
        size = parse_count(name)
    except UserError:
        known = ", ".join(find_family("llama2").models[i].name for i in range(2))
        raise UserError(
            f"--teachers: {name!r} is no published model (such as {known}), no folder, no name on "
            "the Hub (such as Qwen/Qwen2.5-7B) and no size (such as 7B)"
        ) from None
    return Candidate(name, size, size, None)


def _surface_loss(one: Candidate) -> float:
    """What the surface expects of the teacher itself."""
    surface = PUBLISHED_SURFACE.supervised
    read = one.tokens or float(surface.compute_optimal_tokens(one.non_embedding))
    return float(surface.loss(one.non_embedding, read))


def _row(
    student: int,
    tokens: int,
    one: Candidate,
    teacher_loss: float,
    rule: LinearRule,
    gpus: tuple[int, str] | None,
) -> dict[str, Any]:
    loss = float(PUBLISHED_SURFACE.loss(student, tokens, teacher_loss))
    flops = training_flops(student, tokens) + forward_flops(one.total, tokens)
    cautions = []
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
        "measured": None,
        "rests_on": ["the published surface, arXiv 2502.08606"],
        "cautions": cautions,
    }


def _out_of_range(size: float) -> str | None:
    low, high = SURFACE_RANGE
    if low <= size <= high:
        return None
    return f"read from models of {format_count(low)} to {format_count(high)}"


def _outdone(row: dict[str, Any]) -> str:
    other = row["measured"]["no_better_than"]
    return f"{row['teacher']} reads your text no better than {other}, which is no larger"


def _verdict(
    rows: list[dict[str, Any]], by_line: dict[str, Any], by_surface: dict[str, Any], alone: float
) -> str:
    first, surface = rows[0]["teacher"], "the surface"
    if rows[0]["measured"] is not None:
        surface = "the surface, from the teachers' own losses on your text,"
    close = (
        f"the surface puts {by_surface['teacher']} first, but by {{margin:.2%}} of the loss, less "
    )
    close += f"than the {SURFACE_ERROR:.0%} it is good to"
    if rows[0] is by_line is by_surface:
        reason = f"the linear law and {surface.strip(',')} agree on it"
    elif rows[0] is by_line:
        reason = f"the linear law says so; {close.format(margin=by_line['margin'])}"
    elif by_line["margin"] <= SURFACE_ERROR:
        reason = f"the linear law says {by_line['teacher']}, but {_outdone(by_line)}"
    else:
        reason = f"{surface} says so"
        if rows[0] is not by_surface:
            nearer = f"{first} is nearer to the line"
            why = _outdone(by_surface) if is_outdone(by_surface) else nearer
            reason = f"{close.format(margin=rows[0]['margin'])}, and {why}"
        reason += (
            f"; the linear law says {by_line['teacher']}, which the surface puts "
            f"{by_line['margin']:.1%} above. The line knows sizes alone, the surface the teacher's "
            "loss and the tokens"
        )
    line = f"Take {first}: {reason}."
    if rows[0]["expected_loss"] >= alone:
        line += (
            f" By the surface no teacher helps: without one the loss is {alone:.3f}, because "
            "so many tokens teach the student as much."
        )
    return line
