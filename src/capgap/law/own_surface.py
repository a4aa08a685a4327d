"""A table of cells -> loss surfaces of one's own.

A surface is of students from scratch, as the published one: it knows a teacher by its loss alone,
and has no term for weights that were cut out of a teacher.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pandas

from capgap.law.data import Cells, per_token
from capgap.law.law import Surface
from capgap.law.model import Floats
from capgap.law.surface import SupervisedSurface
from capgap.law.surface_fit import (
    DISTILLATION,
    DISTILLATION_FORMS,
    SUPERVISED,
    SUPERVISED_FORMS,
    SurfaceFit,
    fit_distillation,
    fit_supervised,
)

INIT = "scratch"
STARTS = 8


def fit_surfaces(cells: Cells, *, seed: int = 0) -> list[Surface]:
    """One for every architecture: the surface of its students from scratch, of the form with the
    lowest AICc, or the reason why there is none."""
    tokens = cells.document_tokens
    table = cells.frame.assign(
        loss=cells.losses,
        above=per_token(cells.teachers, tokens),
        alone=per_token(cells.baselines, tokens),
    )
    return [
        Surface(architecture=str(architecture), **_of_architecture(rows, seed))
        for architecture, rows in table.groupby("architecture", sort=True)
    ]


def _of_architecture(rows: pandas.DataFrame, seed: int) -> dict[str, Any]:
    """What the surface of one architecture holds, or its `reason`."""
    own = rows[rows["init"] == INIT]
    if own.empty:
        inits = ", ".join(sorted(rows["init"].unique()))
        reason = (
            f"a surface is of students from scratch (init {INIT!r}), and these are {inits}: it "
            "knows a teacher by its loss alone, not the weights that were cut out of one"
        )
        return {"reason": reason}
    teachers = _means(rows, ["teacher_size"], "teacher_parameters", "teacher_tokens", "above")
    names = ("student_parameters", "tokens")
    alone = _means(own, ["student_size", "tokens"], *names, "alone")
    taught = _means(own, ["student_size", "tokens", "teacher_size"], *names, "above", "loss")
    models = np.concatenate([teachers, alone])
    how: dict[str, Any] = {"starts": STARTS, "seed": seed}
    supervised, reason = _best(
        partial(fit_supervised, *models.T, **how),
        SUPERVISED_FORMS,
        len(SUPERVISED),
        models,
        "models trained without a teacher",
    )
    if supervised is None:
        return {"reason": reason}
    entry = {"supervised": supervised.part}
    if not len(teachers):
        return entry | {"reason": "what the teachers were trained on is not known"}
    surface = SupervisedSurface(**supervised.coefficients)
    n, d, above, losses = taught.T
    distilled, reason = _best(
        partial(fit_distillation, n, d, above, losses, surface, **how),
        DISTILLATION_FORMS,
        len(DISTILLATION),
        taught,
        "distilled students whose teacher's loss is known",
    )
    if distilled is None:
        return entry | {"reason": reason}
    return entry | {
        "reason": None,
        "distillation": distilled.part,
        "teacher_tokens": _teacher_tokens(teachers),
        "error": distilled.deviation / float(losses.mean()),
        "teachers": (float(teachers[:, 0].min()), float(teachers[:, 0].max())),
        "cells": sorted({(student, tokens) for student, tokens in taught[:, :2].tolist()}),
    }


def _means(rows: pandas.DataFrame, keys: list[str], *names: str) -> Floats:
    """Means [points, names] over seeds, of what is known."""
    known = rows[np.isfinite(rows[list(names)].to_numpy(float)).all(axis=1)]
    return np.asarray(known.groupby(keys)[list(names)].mean().to_numpy(float))


def _best(
    fit: Callable[..., SurfaceFit],
    forms: Mapping[str, Mapping[str, float]],
    coefficients: int,
    points: Floats,
    what: str,
) -> tuple[SurfaceFit | None, str]:
    """The fit with the lowest AICc, or why there is none; tokens are the second column of points.

    One with a coefficient at a bound, or some that the points do not tell apart, may be the best of
    all for the losses between the points; its status says so.
    """
    one_budget = len(np.unique(points[:, 1])) < 2
    fits, reason = [], f"there are no {what}"
    for form, fixed in forms.items():
        if form.startswith("one_budget") != one_budget:
            continue
        free = coefficients - len(fixed)
        # below this the correction of AICc has no meaning
        if len(points) < free + 2:
            reason = f"{len(points)} {what} are too few: the simplest form needs {free + 2}"
            continue
        one = fit(form=form)
        if one.status == "not_converged":
            reason = f"the fit of the form {form!r} to the {what} did not converge"
        else:
            fits.append((_aicc(one, free), form))
    if not fits:
        return None, reason
    return fit(form=min(fits)[1], intervals=True), ""


def _aicc(fit: SurfaceFit, free: int) -> float:
    """Akaike's criterion for small samples; the scatter is one coefficient more."""
    points, k = fit.points, free + 1
    variance = max(fit.deviation**2 * (points - free) / points, 1e-30)
    correction = 2 * k * (k + 1) / (points - k - 1) if points > k + 1 else math.inf
    return points * math.log(variance) + 2 * k + correction


def _teacher_tokens(teachers: Floats) -> tuple[float, float]:
    """Factor and exponent of a power law through what the teachers were trained on; with one of
    them, in proportion."""
    sizes, tokens = np.log(teachers[:, 0]), np.log(teachers[:, 1])
    if len(np.unique(sizes)) < 2:
        return float(np.exp((tokens - sizes).mean())), 1.0
    exponent, height = np.polyfit(sizes, tokens, 1)
    return float(np.exp(height)), float(exponent)
