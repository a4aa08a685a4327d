"""Which teacher for a student of this size and these tokens: what the published laws, and a user's
own, say of the models at hand. Imports no torch."""

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
from capgap.law.rules import PUBLISHED_RULE, LinearRule, SurfaceRule, published_rule
from capgap.sizes import format_count, format_percent, forward_flops, parse_count, training_flops


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


def recommend(
    student: int,
    tokens: int,
    candidates: Sequence[Candidate],
    *,
    own: LinearRule | None = None,
    surfaces: Sequence[SurfaceRule] = (),
    gpus: tuple[int, str] | None = None,
    measurement: Measurement | None = None,
) -> dict[str, Any]:
    """The candidates, best first, with what each rests on (docs/cli.md has the keys).

    `student` in non-embedding parameters. The first of the surfaces, by default the published one,
    gives every candidate an
    expected loss, good to its error. Those whose loss is within that error of the lowest cannot be
    told apart by it: among them the one nearest (in the logarithm) to the linear law's T* is first,
    by the user's own law where there is one, and then the cheaper; all others follow by their loss.
    What other surfaces say is told beside it.

    With a `measurement` of all candidates their own losses on the user's text decide. One factor
    for all puts them on the surface's scale: that of the best of them, which keeps the loss that
    the surface gives it. Among those that the surface cannot tell apart, a candidate whose own
    loss is no lower than a smaller one's comes after the others.
    """
    surface, *others = surfaces or [PUBLISHED_RULE]
    rule = own or published_rule(student)
    anchor, losses = _teacher_losses(surface, candidates, measurement)
    rows = []
    for one in candidates:
        row = _row(student, tokens, one, losses[one.name], rule, surface, gpus)
        if one.tokens is None and anchor in (None, one.name):
            row["cautions"].insert(
                0, f"its training tokens are not known: {surface.teacher_tokens_name} are taken"
            )
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
        if row["margin"] <= surface.error:
            return (0.0, is_outdone(row), *by_line_first(row))
        return (row["margin"], False, *by_line_first(row))

    rows.sort(key=rank)
    by_line = min(rows, key=by_line_first)
    by_surface = min(rows, key=lambda row: row["expected_loss"])
    by_line["rests_on"].append(f"nearest to the linear law of {rule.source}")
    by_surface["rests_on"][0] += ", on which it gives the lowest loss"
    alone = float(surface.surface.supervised.loss(student, tokens))
    beside = [
        _other(one, student, tokens, candidates, rows[0]["teacher"], measurement) for one in others
    ]
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
            "source": surface.source,
            "nearest": by_surface["teacher"],
            "loss_without_teacher": alone,
            "error": surface.error,
            "anchor": anchor,
            "caution": surface.caution(student, tokens),
        },
        "other_surfaces": beside,
        "measure": None if measurement is None else measurement.as_dict(),
        "verdict": " ".join(
            [_verdict(rows, by_line, by_surface, alone, surface), *map(_beside, beside)]
        ),
    }


def _teacher_losses(
    rule: SurfaceRule, candidates: Sequence[Candidate], measurement: Measurement | None
) -> tuple[str | None, dict[str, float]]:
    """Every candidate's own loss on a surface's scale, and whose fixes that scale if they were
    measured."""
    losses = {one.name: rule.teacher_loss(one.non_embedding, one.tokens) for one in candidates}
    return (None, losses) if measurement is None else on_the_scale_of(losses, measurement)


def _other(
    rule: SurfaceRule,
    student: int,
    tokens: int,
    candidates: Sequence[Candidate],
    first: str,
    measurement: Measurement | None,
) -> dict[str, Any]:
    """What a surface that does not rank says of the candidates, and of the one that is first."""
    _, above = _teacher_losses(rule, candidates, measurement)
    losses = {name: float(rule.surface.loss(student, tokens, loss)) for name, loss in above.items()}
    nearest = min(losses, key=lambda name: losses[name])
    return {
        "name": rule.name,
        "source": rule.source,
        "nearest": nearest,
        "first": first,
        "first_margin": losses[first] / losses[nearest] - 1,
        "expected_losses": losses,
        "error": rule.error,
        "caution": rule.caution(student, tokens),
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
    from capgap.models.families import FAMILIES
    from capgap.models.stored import empty_model, read_config

    config = read_config(source)
    if config.model_type in FAMILIES:
        counts = shape_of(config).parameters()
        return Candidate(name, counts.non_embedding, counts.total, None, source)
    model = empty_model(config)
    total = sum(weight.numel() for weight in model.parameters())
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding = sum({id(one.weight): one.weight.numel() for one in tables if one}.values())
    return Candidate(name, total - embedding, total, None, source)


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


def _row(
    student: int,
    tokens: int,
    one: Candidate,
    teacher_loss: float,
    rule: LinearRule,
    surface: SurfaceRule,
    gpus: tuple[int, str] | None,
) -> dict[str, Any]:
    loss = float(surface.surface.loss(student, tokens, teacher_loss))
    flops = training_flops(student, tokens) + forward_flops(one.total, tokens)
    cautions = []
    if one.non_embedding < student:
        cautions.append("it is smaller than the student")
    if not surface.has_read(one.non_embedding):
        cautions.append("its size lies outside of what the surface was read from")
    return {
        "teacher": one.name,
        "non_embedding": one.non_embedding,
        "total": one.total,
        "ratio": one.non_embedding / student,
        "teacher_tokens": one.tokens,
        "teacher_loss": teacher_loss,
        "expected_loss": loss,
        "interval": [loss * (1 - surface.error), loss * (1 + surface.error)],
        "in_linear_interval": rule.low <= one.non_embedding <= rule.high,
        "flops_total": flops,
        "hours": None if gpus is None else hours(flops, gpus),
        "measured": None,
        "rests_on": [f"{surface.name}, {surface.source}"],
        "cautions": cautions,
    }


def _outdone(row: dict[str, Any]) -> str:
    other = row["measured"]["no_better_than"]
    return f"{row['teacher']} reads your text no better than {other}, which is no larger"


def _verdict(
    rows: list[dict[str, Any]],
    by_line: dict[str, Any],
    by_surface: dict[str, Any],
    alone: float,
    rule: SurfaceRule,
) -> str:
    first, surface = rows[0]["teacher"], "the surface"
    if rows[0]["measured"] is not None:
        surface = "the surface, from the teachers' own losses on your text,"
    close = (
        f"the surface puts {by_surface['teacher']} first, but by {{margin:.2%}} of the loss, less "
    )
    close += f"than the {format_percent(rule.error)} it is good to"
    if rows[0] is by_line is by_surface:
        reason = f"the linear law and {surface.strip(',')} agree on it"
    elif rows[0] is by_line:
        reason = f"the linear law says so; {close.format(margin=by_line['margin'])}"
    elif by_line["margin"] <= rule.error:
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


def _beside(other: dict[str, Any]) -> str:
    """What another surface says, and why it does not rank."""
    name = other["name"][0].upper() + other["name"][1:]
    weak = f"; it was {other['caution']}" if other["caution"] else ""
    if other["nearest"] == other["first"]:
        return f"{name} puts it first as well{weak}."
    if other["first_margin"] <= other["error"]:
        told = f"less than the {format_percent(other['error'])} it is good to"
    else:
        told = f"more than the {format_percent(other['error'])} it is good to"
        weak = weak or "; it was read from other text and models than yours"
    return (
        f"{name} puts {other['nearest']} first and {other['first']} {other['first_margin']:.2%} "
        f"above it, {told}{weak}."
    )
