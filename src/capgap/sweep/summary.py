"""The tables of a sweep from its records, and what is said at its end. Imports no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from capgap.errors import UserError
from capgap.law.data import cells_of, write_grid
from capgap.law.fit import fit
from capgap.law.law import Law, read_law
from capgap.law.table import has_distillations, read_distillations
from capgap.records import read_records, write_json_atomically
from capgap.report.page import write_law_report, write_report
from capgap.report.sentences import answer
from capgap.sizes import clock_time
from capgap.sweep.context import SEARCH_FILE
from capgap.sweep.progress import table

STAGE_NAMES = {
    "corpus": "corpus",
    "batches": "batches",
    "teacher_forward": "teacher forward",
    "forward": "forward",
    "loss": "loss and its gradient",
    "backward": "backward",
    "optimizer": "optimizer",
    "evaluation": "evaluation",
    "pruning": "pruning",
    "checkpoint": "checkpoints",
    "report": "law and report",
    "python": "Python around torch",
}


@dataclass(frozen=True)
class SweepResult:
    """Where a finished sweep's results lie. `stages` are seconds of work by stage."""

    out: Path
    report: Path
    student: Path | None
    best: str | None
    verdict: list[str]
    stages: dict[str, float]
    wall_seconds: float
    peak_memory_bytes: int
    failed: list[str]

    def as_dict(self) -> dict[str, Any]:
        """The keys of `capgap sweep --json` (docs/cli.md)."""
        return asdict(self) | {
            "out": str(self.out),
            "report": str(self.report),
            "student": None if self.student is None else str(self.student),
            "stages": {name: round(seconds, 3) for name, seconds in self.stages.items()},
            "wall_seconds": round(self.wall_seconds, 3),
        }


def fit_tables(out: Path) -> Law:
    """Writes grid.csv and law.json from the records; returns the law."""
    records = read_records(out)
    write_grid(records, out / "grid.csv")
    law = fit(cells_of(records))
    write_json_atomically(out / "law.json", law.as_dict())
    return law


def refresh(out: Path) -> dict[str, Any]:
    """Fits and draws again; returns paths and verdict. UserError where there is neither a sweep nor
    the runs of `capgap distill`."""
    if not (out / "sweep.json").exists() and has_distillations(out):
        law = fit(read_distillations(out))
        write_json_atomically(out / "law.json", law.as_dict())
        page = write_law_report(law, out / "report.html", title=out.name)
        return {"report": str(page), "law": str(out / "law.json"), "verdict": verdict_of(out)}
    if not (out / "sweep.json").exists():
        raise UserError(f"{str(out)!r} is no output folder of a sweep (it has no sweep.json)")
    if not any(out.glob("records/*/record.json")):
        raise UserError(f"no run of the sweep in {out} is finished yet: try again later")
    fit_tables(out)
    page = write_report(out)
    return {"report": str(page), "law": str(out / "law.json"), "verdict": verdict_of(out)}


def verdict_of(out: Path) -> list[str]:
    """The answer of an output folder in sentences."""
    search = out / SEARCH_FILE
    trace = json.loads(search.read_text()) if search.exists() else None
    return answer(read_law(out / "law.json"), trace)


def print_summary(result: SweepResult, console: Console) -> None:
    """The answer, where the results lie, and each stage's share of the work."""
    for sentence in result.verdict:
        console.print(f"- {sentence}", highlight=False, markup=False)
    console.print()
    work = table("Where the work went", "stage", "seconds", "share")
    total = sum(result.stages.values())
    for name, label in STAGE_NAMES.items():
        if name in result.stages:
            seconds = result.stages[name]
            work.add_row(label, f"{seconds:.1f}", f"{seconds / total:.1%}")
    console.print(work)
    console.print(
        f"{clock_time(result.wall_seconds)} on the clock for {clock_time(total)} of work; all "
        f"processes together took at most {result.peak_memory_bytes / 1e9:.1f} GB of memory\n",
        highlight=False,
    )
    if result.failed:
        console.print(f"[red]failed:[/] {', '.join(result.failed)}")
    # a path must not be broken into lines, and brackets in it are no markup
    if result.student is not None:
        line = f"best student: {result.best} in {result.student}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    line = f"report: {result.report}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
