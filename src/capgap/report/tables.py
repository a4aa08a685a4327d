"""The tables of the page as rows of finished text. Pure functions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from capgap.law.data import BaselineKey, baseline_key, baselines_by_key
from capgap.law.law import Curve
from capgap.records import RunRecord
from capgap.report.data import Results, done, heldout_loss
from capgap.report.numbers import (
    NOTHING,
    duration,
    gain,
    loss,
    moment,
    power,
    share,
    size,
    with_interval,
)
from capgap.report.sentences import runs_of

GRID = "Run|Architecture|Init|Tokens|Student|Teacher|Seed|Loss|Bits per byte|Gain|Last KL|"
GRID += "Agreement|After the cut|FLOPs|Time"


class Table(NamedTuple):
    """A table with its heading; the first `text_columns` columns are set left, the rest right.
    The names of columns are parted by bars."""

    title: str
    columns: str
    rows: list[tuple[str, ...]]
    text_columns: int = 1
    caption: str = ""
    folded: bool = False


def answer_tables(results: Results) -> list[Table]:
    """For every student of every group the teachers that will do, cheapest first."""
    columns = "Student|Teachers that will do|The others cost|Best T/S"
    caption = "Sizes in non-embedding parameters, the cheapest first; costs above the best "
    caption += f"teacher, in nats per token; intervals at {results.law.confidence:.0%}."
    by_group = {str(line.group): results.law.of(line.group) for line in results.lines}
    return [Table(g, columns, list(map(_answer, own)), 4, caption) for g, own in by_group.items()]


def _answer(curve: Curve) -> tuple[str, ...]:
    optimum, costs = curve.optimum, [p.cost for p in curve.points if p.worse and p.cost is not None]
    will_do, cost = runs_of(curve), NOTHING
    if all(point.cost is None for point in curve.points):
        will_do = "not known: nothing tells what noise is"
    elif costs:
        cost = " to ".join(dict.fromkeys(f"{end:.3f}" for end in (min(costs), max(costs))))
    else:
        will_do = f"all: {will_do}"
    ratio = with_interval(optimum.ratio, optimum.ratio_interval)
    return size(curve.student_parameters), will_do, cost, ratio


def students_table(results: Results) -> Table:
    """Every student with the best teacher of its curve, beside its baseline."""
    rows = []
    for curve in results.law.curves:
        best = next(p for p in curve.points if p.teacher_size == curve.optimum.best)
        sizes = map(size, (curve.tokens, curve.student_parameters, best.teacher_parameters))
        above = loss(best.teacher_loss, best.teacher_loss_stderr)
        own = loss(best.loss, best.loss_stderr), gain(best.gain, best.gain_stderr)
        rows.append((f"{curve.architecture}, {curve.init}", *sizes, above, *own))
    columns = "Kind|Tokens|Student|Teacher|Teacher's loss|Loss|Gain"
    caption = "With the best teacher tried, by the fit. Held-out losses in nats per token, ± one "
    caption += "standard error, means over seeds; the gain is over cross-entropy alone."
    return Table("Students", columns, rows, caption=caption)


def teachers_table(results: Results) -> Table:
    """The teachers with their size, training and held-out loss."""
    teachers = done(results.records, "teacher")
    teachers.sort(key=lambda r: (r.architecture, r.seed, r.parameters.non_embedding))
    rows = []
    for one in teachers:
        sizes = map(size, (one.parameters.non_embedding, one.parameters.total, one.tokens))
        rate = "given" if one.learning_rate is None else f"{one.learning_rate:.2g}"
        last = *_losses(one), duration(one.wall_seconds)
        rows.append((one.architecture, *sizes, rate, str(one.seed), *last))
    columns = "Architecture|Non-embedding|Total|Tokens|Learning rate|Seed|Loss|Bits per byte|Time"
    return Table("Teachers", columns, rows)


def _losses(run: RunRecord) -> tuple[str, str]:
    """Held-out loss, and bits per byte."""
    if run.heldout is None:
        return NOTHING, NOTHING
    return loss(run.heldout.loss, run.heldout.loss_stderr), loss(run.heldout.bits_per_byte)


def grid_table(results: Results) -> Table:
    """Every cell and baseline of the sweep, failed ones too."""
    matched = baselines_by_key(results.records)
    names = ("architecture", "init", "tokens", "student_size", "teacher_size", "seed", "kind")
    runs = [run for run in results.records if run.kind != "teacher"]
    runs.sort(key=lambda run: [getattr(run, name) or 0 for name in names])
    caption = "Losses, gain and KL in nats per token. A dash is a number that does not exist."
    rows = [_grid_row(run, matched) for run in runs]
    return Table("The whole grid", GRID, rows, 3, caption, folded=True)


def _grid_row(run: RunRecord, matched: Mapping[BaselineKey, RunRecord]) -> tuple[str, ...]:
    baseline = matched.get(baseline_key(run)) if run.kind == "cell" else None
    gained = None
    if baseline is not None and run.status == "done":
        gained = heldout_loss(baseline) - heldout_loss(run)
    what = "distilled" if run.kind == "cell" else "CE alone"
    what = what if run.status == "done" else f"{what}, {run.status}"
    sizes = map(size, (run.tokens, run.student_size, run.teacher_size))
    place = (what, run.architecture, run.init or NOTHING, *sizes, str(run.seed))
    last = [[v for v in values if v is not None] for values in (run.curve.kl, run.curve.agreement)]
    kl, agreement = (values[-1] if values else None for values in last)
    cut = loss(run.after_cut.loss if run.after_cut else None)
    took = power(run.flops.total) if run.flops.total else NOTHING
    found = (*_losses(run), gain(gained), loss(kl), share(agreement), cut)
    return (*place, *found, took, duration(run.wall_seconds))


def excluded_table(results: Results) -> Table:
    """Failed runs and runs left out of the law, each with its reason."""
    reasons = {one.id: one.reason for one in results.law.excluded}
    for run in results.records:
        if run.failure is not None:
            told, windows = [run.failure.message], run.failure.windows or []
            told += [f"at step {run.failure.step}"] if run.failure.step is not None else []
            shown = ", ".join(map(str, windows[:8])) + (" and more" if windows[8:] else "")
            reasons[run.id] = ", ".join([*told, *([f"windows {shown}"] if windows else [])])
    return Table("Failed or left out", "Run|Reason", sorted(reasons.items()), 2)


def provenance_tables(results: Results) -> list[Table]:
    """What was run on what, and where the time went."""
    sweep = results.sweep
    dates = [(name.capitalize(), moment(sweep.get(name))) for name in ("started", "finished")]
    rows = [("Recipe hash", str(sweep.get("recipe_hash") or NOTHING)), *dates]
    for heading in ("machine", "versions", "corpus"):
        for name, value in (sweep.get(heading) or {}).items():
            rows.append((f"{heading.capitalize()}: {name.replace('_', ' ')}", _value_text(value)))
    stages = [(n, s) for n, s in (sweep.get("stages") or {}).items() if s is not None]
    whole = sum(seconds for _, seconds in stages)
    stages.sort(key=lambda stage: -stage[1])
    times = [(n.replace("_", " "), duration(s), share(s / whole)) for n, s in stages if whole > 0]
    took = f"The whole sweep took {duration(sweep.get('wall_seconds'))}."
    machine = Table("Machine, versions, corpus", "", list(rows), 2)
    return [machine, Table("Time by stage", "Stage|Time|Share", list(times), caption=took)]


def _value_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return f"{len(value)} entries" if len(value) > 8 else ", ".join(map(_value_text, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return NOTHING if value is None else str(value)
