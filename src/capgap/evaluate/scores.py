"""Scores of evaluation sets: parts put together, and the mean of the six.

Imports no torch and no harness.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from capgap.errors import UserError
from capgap.evaluate.sets import SETS, SIX, BenchmarkSet

Metrics = dict[str, tuple[float | None, float | None]]


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
    the parts. Shares are 0 to 1; docs/evaluation.md tells the keys."""
    weights = [part.questions if one.by_question else 1 for part in parts.values()]
    metrics = {
        name: _weighted([part.metrics[name] for part in parts.values()], weights)
        for name in next(iter(parts.values())).metrics
    }
    score, error = metrics[one.metric]
    each = {
        name: {
            "score": part.metrics[one.metric][0],
            "score_stderr": part.metrics[one.metric][1],
            "questions": part.questions,
            "cut_prompts": part.cut_prompts,
        }
        for name, part in parts.items()
    }
    return {
        "missing": None,
        "metric": one.metric,
        "score": score,
        "score_stderr": error,
        "metrics": {
            name: {"value": value, "stderr": error} for name, (value, error) in metrics.items()
        },
        "questions": sum(part.questions for part in parts.values()),
        "of_questions": sum(part.of_questions for part in parts.values()),
        "cut_prompts": sum(part.cut_prompts for part in parts.values()),
        "parts": each if one.has_parts else {},
    }


def _weighted(
    numbers: Sequence[tuple[float | None, float | None]], weights: Sequence[int]
) -> tuple[float | None, float | None]:
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


def six_mean(
    sets: Mapping[str, Mapping[str, Any]], *, limit: int | None
) -> tuple[float | None, str | None]:
    """The plain mean of the six in percent, as it is published, or None and why.

    It stands for whole sets, each with its published number of shots, alone.
    """
    unasked = [name for name in SIX if name not in sets]
    reasons = [f"without {', '.join(unasked)}"] if unasked else []
    reasons += [f"{n}: {sets[n]['missing']}" for n in SIX if n in sets and sets[n]["missing"]]
    measured = [name for name in SIX if name in sets and not sets[name]["missing"]]
    for name in measured:
        if sets[name]["shots"] != SETS[name].shots:
            reasons.append(f"{name} with {sets[name]['shots']} shots, not {SETS[name].shots}")
        if sets[name]["score"] is None:
            reasons.append(f"{name} has no finite score")
    if limit is not None and measured:
        reasons.append(f"--limit {limit} asks no whole sets")
    if reasons:
        return None, "; ".join(reasons)
    return 100 * fmean(float(sets[name]["score"]) for name in SIX), None


def comparable(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those of the six that stand beside published scores: measured whole, with their own shots."""
    return [
        name
        for name in SIX
        if name in sets
        and sets[name]["score"] is not None
        and sets[name]["questions"] == sets[name]["of_questions"]
        and sets[name]["shots"] == SETS[name].shots
    ]


def known_flops(model: str) -> float | None:
    """FLOPs of the distillation that wrote this folder, from its distill.json; None where unknown.

    A distillation writes OUT/distill.json and its students below OUT/students. What it tells is of
    all its students and of the whole run, so neither one of several nor OUT/best has its own.
    """
    folder = Path(model).absolute()
    record = folder.parent.parent / "distill.json"
    if folder.parent.name != "students" or not record.is_file():
        return None
    try:
        found = json.loads(record.read_text())
        is_alone = len(found.get("after", {})) < 2
        return float(found["flops"]) if found.get("finished") and is_alone else None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"cannot read {record} ({error}): give flops") from None
