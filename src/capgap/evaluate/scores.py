"""Scores of evaluation sets: parts put together, the mean of the six, and what a person reads.

Imports no torch and no harness.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.artifact import read_json
from capgap.evaluate.sets import SETS, SIX, BenchmarkSet
from capgap.stage import text_table

# A value and its standard error
Number = tuple[float | None, float | None]
Metrics = dict[str, Number]
Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """A part of a set: its numbers, each with a standard error or None, and what was asked."""

    metrics: Metrics
    questions: int
    of_questions: int
    cut_prompts: int


def missing_set(reason: str) -> dict[str, Any]:
    """What the record has of a set that was not measured."""
    return {"missing": reason, "score": None, "score_stderr": None}


def combine(one: BenchmarkSet, parts: Mapping[str, Part]) -> dict[str, Any]:
    """What the record has of a set, out of its parts: one score over all questions, or the mean of
    the parts. Shares are 0 to 1; docs/evaluation.md has the keys."""
    weights = [part.questions if one.by_question else 1 for part in parts.values()]
    metrics = {
        name: _weighted([part.metrics[name] for part in parts.values()], weights)
        for name in next(iter(parts.values())).metrics
    }

    def scored(number: Number) -> dict[str, Any]:
        return dict(zip(("score", "score_stderr"), number, strict=True))

    each = {
        name: scored(part.metrics[one.metric])
        | {"questions": part.questions, "cut_prompts": part.cut_prompts}
        for name, part in parts.items()
    }
    counts = ("questions", "of_questions", "cut_prompts")
    return {
        "missing": None,
        "metric": one.metric,
        **scored(metrics[one.metric]),
        "metrics": {name: {"value": v, "stderr": error} for name, (v, error) in metrics.items()},
        **{key: sum(getattr(part, key) for part in parts.values()) for key in counts},
        "parts": each if one.has_parts else {},
    }


def _weighted(numbers: Sequence[Number], weights: Sequence[int]) -> Number:
    """The mean by weight, and its standard error where the parts are what they are and only their
    questions are drawn; None where one is."""
    total = sum(weights)
    values = [value for value, _ in numbers if value is not None]
    errors = [error for _, error in numbers if error is not None]
    if len(values) < len(numbers):
        return None, None
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    if len(errors) < len(numbers):
        return mean, None
    squares = ((e * w) ** 2 for e, w in zip(errors, weights, strict=True))
    return mean, math.sqrt(math.fsum(squares)) / total


def _faults(name: str, result: Mapping[str, Any]) -> list[str]:
    """Why a set's score is not one as it is published."""
    if result["missing"]:
        return [f"{name}: {result['missing']}"]
    faults = []
    if result["shots"] != SETS[name].shots:
        faults.append(f"{name} with {result['shots']} shots, not {SETS[name].shots}")
    return faults + ([] if result["score"] is not None else [f"{name} has no finite score"])


def six_mean(sets: Results, *, limit: int | None) -> tuple[float | None, str | None]:
    """The plain mean of the six in percent, as it is published, or None and why.

    It stands for whole sets, each with its published number of shots, alone.
    """
    unasked = [name for name in SIX if name not in sets]
    asked = [name for name in SIX if name in sets]
    reasons = [f"without {', '.join(unasked)}"] if unasked else []
    reasons += [fault for name in asked for fault in _faults(name, sets[name])]
    if limit is not None and not all(sets[name]["missing"] for name in asked):
        reasons.append(f"limit {limit} asks no whole sets")
    if reasons:
        return None, "; ".join(reasons)
    return 100 * fmean(float(sets[name]["score"]) for name in SIX), None


def comparable(sets: Results) -> list[str]:
    """Those of the six that stand beside published scores: measured whole, with their own shots."""
    return [
        name
        for name in SIX
        if name in sets
        and not _faults(name, sets[name])
        and sets[name]["questions"] == sets[name]["of_questions"]
    ]


def known_flops(model: str) -> float | None:
    """FLOPs of the distillation that wrote this folder, from its distill.json; None where unknown.

    A distillation writes OUT/distill.json and its students below OUT/students. The file is about
    all its students and the whole run, so neither one of several nor OUT/best has its own.
    """
    folder = Path(model).absolute()
    path = folder.parent.parent / "distill.json"
    if folder.parent.name != "students" or not path.is_file():
        return None
    record = read_json(path, finished=bool)
    is_own = record["finished"] and len(record.get("after", {})) < 2
    return record.get("flops") if is_own else None


def record_text(record: dict[str, Any]) -> str:
    """The sets, held-out losses, what is missing, and the six beside published models."""
    tasks: dict[str, Any] = record["tasks"]
    measured = {name: one for name, one in tasks.items() if not one["missing"]}
    lines = [_sets(measured)] if measured else []
    lines += [_heldout(folder, one) for folder, one in (record["heldout"] or {}).items()]
    lines += [f"{name}: missing, {one['missing']}" for name, one in tasks.items() if one["missing"]]
    names = comparable(tasks)
    if names:
        lines += ["", _published({name: tasks[name] for name in names})]
    if record["mean_percent"] is not None:
        lines.append(f"mean of the six: {record['mean_percent']:.2f}")
    elif measured and record["mean_missing"]:
        lines.append(f"no mean of the six: {record['mean_missing']}")
    return "\n".join(lines)


def _sets(measured: Results) -> str:
    rows = []
    for name, one in measured.items():
        part = one["questions"] < one["of_questions"]
        asked = f"{one['questions']:,}" + (f" of {one['of_questions']:,}" if part else "")
        cut = f"{one['cut_prompts']:,}" if one["cut_prompts"] else ""
        shares = (
            "" if one[key] is None else f"{100 * one[key]:.2f}" for key in ("score", "score_stderr")
        )
        rows.append((SETS[name].title, *shares, str(one["shots"]), asked, cut))
    return text_table(("set", "score", "±", "shots", "questions", "cut prompts"), rows, left=1)


def _heldout(folder: str, one: Mapping[str, Any]) -> str:
    if one["missing"]:
        return f"held-out loss on {folder}: missing, {one['missing']}"
    loss, bits = (
        _with_error(one[key], one[f"{key}_stderr"], 4) for key in ("loss", "bits_per_byte")
    )
    return f"held-out loss on {folder}: {loss} nats a token, {bits} bits a byte"


def _published(tasks: Results) -> str:
    """Published scores have no errors."""
    from capgap.law.published import published_results

    titles = [SETS[name].title for name in tasks]
    own = (_with_error(one["score"], one["score_stderr"], 2, 100) for one in tasks.values())
    rows = [("this model", *own)]
    for model in published_results():
        rows.append((model.name, *(f"{model.scores[title]:.2f}" for title in titles)))
    return text_table(("beside arXiv 2311.07052", *titles), rows, left=1)


def _with_error(value: float, error: float | None, digits: int, scale: float = 1) -> str:
    known = "" if error is None else f" ± {scale * error:.{digits}f}"
    return f"{scale * value:.{digits}f}{known}"
