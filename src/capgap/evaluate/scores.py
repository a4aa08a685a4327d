"""Scores of evaluation sets: parts put together, the mean of the six, beside published models.

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
from capgap.law.benchmarks import published_results

Metrics = dict[str, tuple[float | None, float | None]]


@dataclass(frozen=True)
class Part:
    """A part of a set: its numbers, each with a standard error or None, and what was asked."""

    metrics: Metrics
    questions: int
    of_questions: int
    cut_prompts: int


@dataclass(frozen=True)
class SetScores:
    """A model on a set. Shares are 0 to 1; `parts` as the set has them, none where it has one."""

    metric: str
    metrics: Metrics
    questions: int
    of_questions: int
    cut_prompts: int
    parts: dict[str, Part]
    shots: int
    task_version: str
    max_gen_toks: dict[str, int] | None
    programs: dict[str, int] | None
    sandbox: str | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """What the record has of it; docs/evaluation.md tells the keys."""
        score, error = self.metrics[self.metric]
        return {
            "missing": None,
            "metric": self.metric,
            "score": score,
            "score_stderr": error,
            "metrics": {
                name: {"value": value, "stderr": error}
                for name, (value, error) in self.metrics.items()
            },
            "questions": self.questions,
            "of_questions": self.of_questions,
            "cut_prompts": self.cut_prompts,
            "shots": self.shots,
            "task_version": self.task_version,
            "max_gen_toks": self.max_gen_toks,
            "programs": self.programs,
            "sandbox": self.sandbox,
            "seconds": round(self.seconds, 1),
            "parts": {
                name: {
                    "score": part.metrics[self.metric][0],
                    "score_stderr": part.metrics[self.metric][1],
                    "questions": part.questions,
                    "cut_prompts": part.cut_prompts,
                }
                for name, part in self.parts.items()
            },
        }


def missing_set(reason: str) -> dict[str, Any]:
    """What the record has of a set that was not measured."""
    return {"missing": reason, "score": None, "score_stderr": None}


def combine(one: BenchmarkSet, parts: Mapping[str, Part], **about: Any) -> SetScores:
    """The parts of a set as one score: over all questions, or as the mean of the parts."""
    names = next(iter(parts.values())).metrics
    weights = [part.questions if one.by_question else 1 for part in parts.values()]
    metrics = {
        name: _weighted([part.metrics[name] for part in parts.values()], weights) for name in names
    }
    return SetScores(
        one.metric,
        metrics,
        sum(part.questions for part in parts.values()),
        sum(part.of_questions for part in parts.values()),
        sum(part.cut_prompts for part in parts.values()),
        dict(parts) if one.has_parts else {},
        **about,
    )


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


def beside_published(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """Those of the six that were measured whole, with their published number of shots, in percent,
    over the published figures; None without any.

    {"columns": titles, "rows": [(name, scores in that order)], "errors": this model's standard
    errors, or None}; the first row is this model's.
    """
    titles = {SETS[name].title: name for name in SIX}
    known = [title for title, name in titles.items() if name in sets and _whole(name, sets[name])]
    if not known:
        return None
    rows = [("this model", [100 * float(sets[titles[title]]["score"]) for title in known])]
    rows += [(m.name, [m.scores[title] for title in known]) for m in published_results()]
    errors = [sets[titles[title]]["score_stderr"] for title in known]
    percent = [None if error is None else 100 * float(error) for error in errors]
    return {"columns": known, "rows": rows, "errors": percent}


def _whole(name: str, one: Mapping[str, Any]) -> bool:
    """A part of a set, or other shots, stand for nothing that is published."""
    if one["missing"] or one["score"] is None:
        return False
    return one["questions"] == one["of_questions"] and one["shots"] == SETS[name].shots


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
        raise UserError(f"cannot read {record} ({error}): give --flops") from None


def parse_flops(text: str) -> float:
    """`4e21` as a number; UserError for what is none above 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not (found > 0 and math.isfinite(found)):
        raise UserError(f"--flops {text!r}: give a number above 0, such as 4e21")
    return found
