"""The curves of a sweep -> loss surfaces of its own, as law.json has them, and back.

N and D as in `surface`. A surface is of students from scratch, as the published one: it knows a
teacher by its loss alone, and has no term for weights that were cut out of a teacher.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from capgap.law.cells import CurveData, Floats
from capgap.law.noise import mean_losses
from capgap.law.surface import DistillationSurface, SupervisedSurface, TeacherTokens
from capgap.law.surface_fit import (
    DISTILLATION_FORMS,
    SUPERVISED_FORMS,
    SurfaceFit,
    fit_distillation,
    fit_supervised,
)
from capgap.sizes import format_count

INIT = "scratch"
STARTS = 8
Range = tuple[float, float]


@dataclass(frozen=True)
class OwnSurface:
    """A surface fitted to a sweep, with what it was read from.

    `teacher_tokens`: what its teachers were trained on. `error`: root mean square of the residuals
    of the students' losses, as a share of their mean. Ranges of non-embedding parameters and of
    training tokens.
    """

    architecture: str
    surface: DistillationSurface
    teacher_tokens: TeacherTokens
    error: float
    students: Range
    teachers: Range
    tokens: Range


@dataclass(frozen=True)
class _Points:
    """Arrays [points]: means over seeds, losses in nats per token."""

    parameters: Floats
    tokens: Floats
    teacher_losses: Floats
    losses: Floats

    @property
    def budgets(self) -> int:
        return len(np.unique(self.tokens))


def fit_surfaces(curves: Sequence[CurveData], *, seed: int = 0) -> list[dict[str, Any]]:
    """One entry of law.json's `surfaces` for every architecture: the surface of its students from
    scratch, of the form with the lowest AICc, or the reason why there is none.
    """
    architectures = sorted({data.kind.architecture for data in curves})
    return [
        _of_architecture(name, [data for data in curves if data.kind.architecture == name], seed)
        for name in architectures
    ]


def surfaces_of(law: Mapping[str, Any]) -> list[OwnSurface]:
    """The fitted surfaces of a law.json."""
    return [_read(entry) for entry in law.get("surfaces", ()) if entry["status"] == "fitted"]


def surface_sentence(entry: Mapping[str, Any]) -> str:
    """What a surface says of the middle of its students, at its ends of tokens, for the verdict."""
    architecture = entry["architecture"]
    if entry["status"] != "fitted":
        return f"{architecture}: no loss surface was fitted: {entry['reason']}."
    own = _read(entry)
    student = math.sqrt(own.students[0] * own.students[1])
    told = "; ".join(_best_on(own, student, tokens) for tokens in sorted(set(own.tokens)))
    return (
        f"{architecture}, {INIT}: a loss surface (form {entry['distillation']['form']!r}) fits "
        f"{entry['distillation']['points']} cells to {own.error:.2%} of the loss; by it the best "
        f"teacher of a student of {format_count(round(student))} is {told}."
    )


def _best_on(own: OwnSurface, student: float, tokens: float) -> str:
    """Among teachers of the sizes that the surface was read from."""
    ratios = (own.teachers[0] / student, own.teachers[1] / student)
    best = own.surface.best_teacher(
        student, tokens, teacher_tokens=own.teacher_tokens, ratios=ratios, tolerance=own.error
    )
    where = f"on {format_count(round(tokens))} tokens"
    low, high = (format_count(round(ratio * student)) for ratio in best.within)
    alike = f"all from {low} to {high} are within that error"
    if best.ratio <= 1.001 * ratios[0]:
        return f"{where} the smallest of the sweep or a smaller one ({alike})"
    if best.ratio >= ratios[1] / 1.001:
        return f"{where} the largest of the sweep or a larger one ({alike})"
    size = format_count(round(best.ratio * student))
    return f"{where} one of {size} (T/S {best.ratio:.2f}; {alike})"


def _read(entry: Mapping[str, Any]) -> OwnSurface:
    supervised = SupervisedSurface(**entry["supervised"]["coefficients"])
    low, high = (entry[name] for name in ("students", "teachers"))
    return OwnSurface(
        architecture=entry["architecture"],
        surface=DistillationSurface(supervised, **entry["distillation"]["coefficients"]),
        teacher_tokens=TeacherTokens(**entry["teacher_tokens"]),
        error=entry["error"],
        students=(low[0], low[1]),
        teachers=(high[0], high[1]),
        tokens=(entry["tokens"][0], entry["tokens"][1]),
    )


def _of_architecture(architecture: str, curves: Sequence[CurveData], seed: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "architecture": architecture,
        "init": INIT,
        "status": "not_fitted",
        "reason": None,
        "supervised": None,
        "distillation": None,
        "teacher_tokens": None,
        "error": None,
        "students": None,
        "teachers": None,
        "tokens": None,
    }
    own = [data for data in curves if data.kind.init == INIT]
    if not own:
        inits = ", ".join(sorted({data.kind.init for data in curves}))
        reason = (
            f"a surface is of students from scratch (init {INIT!r}), and these are {inits}: it "
            "knows a teacher by its loss alone, not the weights that were cut out of one"
        )
        return entry | {"reason": reason}
    teachers, alone, cells = _teachers(curves), _alone(own), _cells(own)
    models = _joined(teachers, alone)
    supervised, reason = _best(
        SUPERVISED_FORMS,
        models,
        "models trained without a teacher",
        lambda form, intervals: fit_supervised(
            models.parameters,
            models.tokens,
            models.losses,
            form=form,
            starts=STARTS,
            seed=seed,
            intervals=intervals,
        ),
    )
    if supervised is None:
        return entry | {"reason": reason}
    entry["supervised"] = _describe(supervised)
    surface = supervised.surface
    assert isinstance(surface, SupervisedSurface)
    if not len(teachers.losses):
        return entry | {"reason": "what the teachers were trained on is not known"}
    distilled, reason = _best(
        DISTILLATION_FORMS,
        cells,
        "distilled students whose teacher's loss is known",
        lambda form, intervals: fit_distillation(
            cells.parameters,
            cells.tokens,
            cells.teacher_losses,
            cells.losses,
            surface,
            form=form,
            starts=STARTS,
            seed=seed,
            intervals=intervals,
        ),
    )
    if distilled is None:
        return entry | {"reason": reason}
    return entry | {
        "status": "fitted",
        "distillation": _describe(distilled),
        "teacher_tokens": asdict(_teacher_tokens(teachers)),
        "error": distilled.deviation / float(cells.losses.mean()),
        "students": _range(cells.parameters),
        "teachers": _range(teachers.parameters),
        "tokens": _range(cells.tokens),
    }


def _best(
    forms: Mapping[str, Mapping[str, float]],
    points: _Points,
    what: str,
    fit: Callable[[str, bool], SurfaceFit],
) -> tuple[SurfaceFit | None, str]:
    """The fit with the lowest AICc, or why there is none.

    One with a coefficient at a bound, or some that the points do not tell apart, may be the best of
    all for the losses between the points; its status says so.
    """
    one_budget = points.budgets < 2
    found, said = [], f"there are no {what}"
    for form in forms:
        if form.startswith("one_budget") != one_budget:
            continue
        free = _coefficients(forms, form)
        # below this the correction of AICc has no meaning
        if len(points.losses) < free + 2:
            said = f"{len(points.losses)} {what} are too few: the simplest form needs {free + 2}"
            continue
        result = fit(form, False)
        if result.status == "not_converged":
            said = f"the fit of the form {form!r} to the {what} did not converge"
        else:
            found.append((_aicc(result, free), result))
    if not found:
        return None, said
    chosen = min(found, key=lambda pair: pair[0])[1]
    return fit(chosen.form, True), ""


def _coefficients(forms: Mapping[str, Mapping[str, float]], form: str) -> int:
    full = 6 if forms is SUPERVISED_FORMS else 9
    return full - len(forms[form])


def _aicc(fit: SurfaceFit, free: int) -> float:
    """Akaike's criterion for small samples; the scatter is one coefficient more."""
    cells, k = fit.cells, free + 1
    variance = max(fit.deviation**2 * (cells - free) / cells, 1e-30)
    correction = 2 * k * (k + 1) / (cells - k - 1) if cells > k + 1 else math.inf
    return cells * math.log(variance) + 2 * k + correction


def _describe(fit: SurfaceFit) -> dict[str, Any]:
    coefficients = asdict(fit.surface)
    coefficients.pop("supervised", None)
    return {
        "form": fit.form,
        "status": fit.status,
        "coefficients": coefficients,
        "intervals": {name: list(ends) for name, ends in (fit.intervals or {}).items()},
        "at_bounds": list(fit.at_bounds),
        "condition": fit.condition,
        "deviation": fit.deviation,
        "points": fit.cells,
    }


def _cells(curves: Sequence[CurveData]) -> _Points:
    """Every pair of student and teacher whose teacher's loss is known."""
    rows = []
    for data in curves:
        losses = mean_losses(data.cell_documents, data.document_tokens)
        above = mean_losses(data.teacher_documents, data.document_tokens)
        for teacher in range(data.num_teachers):
            own = (data.cell_teacher == teacher) & np.isfinite(above)
            if own.any():
                row = (data.student_parameters, data.kind.tokens)
                rows.append((*row, float(above[own].mean()), float(losses[own].mean())))
    return _points(rows)


def _alone(curves: Sequence[CurveData]) -> _Points:
    """Every student's baseline; it is the same for all of its teachers."""
    rows = []
    for data in curves:
        losses = mean_losses(data.baseline_documents, data.document_tokens)
        by_seed = dict(zip(data.cell_seed, losses, strict=True))
        known = [loss for loss in by_seed.values() if np.isfinite(loss)]
        if known:
            row = (data.student_parameters, data.kind.tokens)
            rows.append((*row, math.nan, float(np.mean(known))))
    return _points(rows)


def _teachers(curves: Sequence[CurveData]) -> _Points:
    """Every teacher of known tokens and loss, once."""
    rows = {}
    for data in curves:
        losses = mean_losses(data.teacher_documents, data.document_tokens)
        for teacher, tokens in enumerate(data.teacher_tokens):
            known = losses[(data.cell_teacher == teacher) & np.isfinite(losses)]
            if np.isfinite(tokens) and tokens > 0 and len(known):
                size = float(data.teacher_parameters[teacher])
                rows[data.teacher_sizes[teacher]] = (size, tokens, math.nan, float(known.mean()))
    return _points(list(rows.values()))


def _points(rows: Sequence[tuple[float, ...]]) -> _Points:
    table = np.array(rows, dtype=float).reshape(-1, 4)
    return _Points(*table.T)


def _joined(one: _Points, other: _Points) -> _Points:
    return _Points(
        *(
            np.concatenate([getattr(one, name), getattr(other, name)])
            for name in ("parameters", "tokens", "teacher_losses", "losses")
        )
    )


def _teacher_tokens(teachers: _Points) -> TeacherTokens:
    """A power law through what the teachers were trained on; with one of them, in proportion."""
    sizes, tokens = np.log(teachers.parameters), np.log(teachers.tokens)
    if len(np.unique(sizes)) < 2:
        return TeacherTokens(float(np.exp((tokens - sizes).mean())))
    exponent, height = np.polyfit(sizes, tokens, 1)
    return TeacherTokens(float(np.exp(height)), float(exponent))


def _range(values: Floats) -> list[float]:
    return [float(values.min()), float(values.max())]
