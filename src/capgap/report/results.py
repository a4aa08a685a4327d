"""The files of a sweep's output folder: what the report reads, and its tables as rows of text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from capgap.artifact import read_json
from capgap.errors import UserError
from capgap.law.data import run_rows
from capgap.law.law import Curve, Group, Law, Line, read_law
from capgap.records import RunRecord, read_records
from capgap.report import numbers
from capgap.report.numbers import NOTHING
from capgap.report.sentences import teachers_of

# the order of pages; each has the same look in every report
INITS = ("pruned", "fixed", "scratch", "chain")
PARTS = ("curves", "contrasts", "lines", "lucks", "surfaces", "warnings", "excluded")
NO_LAW = Law.model_validate({"confidence": 0.9} | dict.fromkeys(PARTS, ()))


@dataclass(frozen=True)
class Results:
    """The parsed files of one output folder; what was not written is empty."""

    folder: Path
    sweep: Mapping[str, Any]
    records: tuple[RunRecord, ...]
    law: Law
    samples: Mapping[str, Any]
    search: Mapping[str, Any] = field(default_factory=dict)

    @property
    def law_alone(self) -> bool:
        """Whether there is a law without a sweep behind it."""
        return not self.sweep and not self.records

    @property
    def lines(self) -> list[Line]:
        """The law's, one of each group of curves, in the order of pages."""
        return sorted(self.law.lines, key=lambda line: init_rank(line.group.init))

    @property
    def students(self) -> list[int]:
        """All student sizes: the position in this list decides a student's look."""
        found = {record.student_size for record in self.records if record.student_size}
        return sorted(found | {curve.student_size for curve in self.law.curves})

    def done(self, *kinds: str) -> list[RunRecord]:
        """Records of these kinds ("teacher", "cell", "baseline") that finished."""
        return [one for one in self.records if one.kind in kinds and one.status == "done"]

    def cells_of(self, curve: Curve) -> dict[int, RunRecord]:
        """The finished cells of a curve by the size of their teacher, each of its first seed."""
        names = ("architecture", "init", "tokens", "student_size")
        cells = sorted(self.done("cell"), key=lambda cell: -cell.seed)
        own = [c for c in cells if all(getattr(c, name) == getattr(curve, name) for name in names)]
        return {cell.teacher_size or 0: cell for cell in own}


def load_results(folder: Path) -> Results:
    """Read `sweep.json`, the records, and where they are there `law.json`, `samples.json` and
    `search.json` of an output folder.

    Raises UserError where the folder is not a sweep's output or one of its files is broken.
    """
    if not (folder / "sweep.json").is_file():
        raise UserError(f"{folder} holds no sweep.json: name the output folder of a capgap sweep")
    records = tuple(read_records(folder)) if (folder / "records").is_dir() else ()
    law = read_law(folder / "law.json") if (folder / "law.json").is_file() else NO_LAW
    paths = [folder / f"{name}.json" for name in ("sweep", "samples", "search")]
    sweep, samples, search = (read_json(path) if path.is_file() else {} for path in paths)
    return Results(folder, sweep, records, law, samples, search)


def init_rank(init: str) -> int:
    """Position of an init among all; those that are none of them come last."""
    return INITS.index(init) if init in INITS else len(INITS)


def slug(group: Group) -> str:
    """The group as a part of a file name."""
    tokens = group.tokens or f"{group.tokens_per_parameter:.3g}-per-parameter"
    return safe(f"{group.architecture}-{group.init}-{tokens}")


def safe(name: str) -> str:
    """The name with a hyphen for all that a file name or a link could stumble over."""
    return re.sub(r"[^\w.+-]+", "-", name)


def heldout_loss(record: RunRecord) -> float:
    """Held-out loss in nats per token of a run that finished."""
    assert record.heldout is not None, record.id
    return record.heldout.loss


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
    caption = "Sizes in non-embedding parameters, the cheapest first; costs above the best "
    caption += f"teacher, in nats per token; intervals at {results.law.confidence:.0%}."
    columns = "Student|Teachers that will do|The others cost|Best T/S"
    return [
        Table(str(one.group), columns, list(map(_answer, results.law.of(one.group))), 4, caption)
        for one in results.lines
    ]


def _answer(curve: Curve) -> tuple[str, ...]:
    costs = [p.cost for p in curve.points if p.worse and p.cost is not None]
    will_do, cost = teachers_of(curve), NOTHING
    if all(point.cost is None for point in curve.points):
        will_do = "not known: nothing tells what noise is"
    elif costs:
        cost = numbers.span(costs)
    else:
        will_do = f"all: {will_do}"
    ratio = numbers.with_interval(curve.optimum.ratio, curve.optimum.ratio_interval)
    return numbers.size(curve.student_parameters), will_do, cost, ratio


def students_table(results: Results) -> Table:
    """Every student with the best teacher of its curve, beside its baseline."""
    rows = []
    for curve in results.law.curves:
        best = next(p for p in curve.points if p.teacher_size == curve.optimum.best)
        sizes = (curve.tokens, curve.student_parameters, best.teacher_parameters)
        losses = (
            numbers.loss(best.teacher_loss, best.teacher_loss_stderr),
            numbers.loss(best.loss, best.loss_stderr),
            numbers.gain(best.gain, best.gain_stderr),
        )
        rows.append((f"{curve.architecture}, {curve.init}", *map(numbers.size, sizes), *losses))
    columns = "Kind|Tokens|Student|Teacher|Teacher's loss|Loss|Gain"
    caption = "With the best teacher tried, by the fit. Held-out losses in nats per token, ± one "
    caption += "standard error, means over seeds; the gain is over cross-entropy alone."
    return Table("Students", columns, rows, caption=caption)


def teachers_table(results: Results) -> Table:
    """The teachers with their size, training and held-out loss."""
    teachers = results.done("teacher")
    teachers.sort(key=lambda r: (r.architecture, r.seed, r.parameters.non_embedding))
    rows = []
    for one in teachers:
        assert one.heldout is not None, one.id
        sizes = (one.parameters.non_embedding, one.parameters.total, one.tokens)
        rate = "given" if one.learning_rate is None else f"{one.learning_rate:.2g}"
        loss = numbers.loss(one.heldout.loss, one.heldout.loss_stderr)
        bits, took = numbers.loss(one.heldout.bits_per_byte), numbers.duration(one.wall_seconds)
        own = (rate, str(one.seed), loss, bits, took)
        rows.append((one.architecture, *map(numbers.size, sizes), *own))
    columns = "Architecture|Non-embedding|Total|Tokens|Learning rate|Seed|Loss|Bits per byte|Time"
    return Table("Teachers", columns, rows)


def grid_table(results: Results) -> Table:
    """Every cell and baseline of the sweep, failed ones too."""
    names = ("architecture", "init", "tokens", "student_size", "teacher_size", "seed", "kind")
    runs = [run for run in run_rows(results.records) if run["kind"] != "teacher"]
    rows = []
    for run in sorted(runs, key=lambda run: [run[name] or 0 for name in names]):
        what = "distilled" if run["kind"] == "cell" else "CE alone"
        what = what if run["status"] == "done" else f"{what}, {run['status']}"
        sizes = [numbers.size(run[name]) for name in ("tokens", "student_size", "teacher_size")]
        rows.append(
            (
                *(what, run["architecture"], run["init"] or NOTHING, *sizes, str(run["seed"])),
                numbers.loss(run["loss"], run["loss_stderr"]),
                numbers.loss(run["bits_per_byte"]),
                *(numbers.gain(run["gain"]), numbers.loss(run["kl"])),
                numbers.share(run["agreement"]),
                numbers.loss(run["after_cut_loss"]),
                numbers.power(run["flops_total"]) if run["flops_total"] else NOTHING,
                numbers.duration(run["wall_seconds"]),
            )
        )
    columns = "Run|Architecture|Init|Tokens|Student|Teacher|Seed|Loss|Bits per byte|Gain|Last KL|"
    columns += "Agreement|After the cut|FLOPs|Time"
    caption = "Losses, gain and KL in nats per token. A dash is a number that does not exist."
    return Table("The whole grid", columns, rows, 3, caption, folded=True)


def excluded_table(results: Results) -> Table:
    """Failed runs and runs left out of the law, each with its reason."""
    reasons = {one.id: one.reason for one in results.law.excluded}
    for run in results.records:
        if run.failure is not None:
            parts, windows = [run.failure.message], run.failure.windows or []
            parts += [f"at step {run.failure.step}"] if run.failure.step is not None else []
            shown = ", ".join(map(str, windows[:8])) + (" and more" if windows[8:] else "")
            reasons[run.id] = ", ".join([*parts, *([f"windows {shown}"] if windows else [])])
    return Table("Failed or left out", "Run|Reason", sorted(reasons.items()), 2)


def provenance_tables(results: Results) -> list[Table]:
    """Machine, versions and corpus of a sweep, and the time by stage."""
    sweep = results.sweep
    rows = [("Recipe hash", str(sweep.get("recipe_hash") or NOTHING))]
    rows += [(n.capitalize(), numbers.moment(sweep.get(n))) for n in ("started", "finished")]
    for heading in ("machine", "versions", "corpus"):
        for name, value in (sweep.get(heading) or {}).items():
            rows.append((f"{heading.capitalize()}: {name.replace('_', ' ')}", _value_text(value)))
    stages = {n: s for n, s in (sweep.get("stages") or {}).items() if s}
    whole = sum(stages.values())
    times = [
        (name.replace("_", " "), numbers.duration(seconds), numbers.share(seconds / whole))
        for name, seconds in sorted(stages.items(), key=lambda stage: -stage[1])
    ]
    took = f"The whole sweep took {numbers.duration(sweep.get('wall_seconds'))}."
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
