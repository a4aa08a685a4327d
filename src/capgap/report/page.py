"""The report: one self-contained page and a folder of figures, from a sweep's output folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from capgap.records import write_text_atomically
from capgap.report import tables, words
from capgap.report.charts import curve_chart, gain_map, teacher_chart
from capgap.report.compute import compute_chart
from capgap.report.data import Results, kinds_of, load_results
from capgap.report.figures import Absent, Figure, Section
from capgap.report.interactive import to_plotly
from capgap.report.law_charts import law_chart
from capgap.report.static import write_static
from capgap.report.style import DARK, LIGHT, Palette
from capgap.report.training import agreement_chart, cross_entropy_chart, kl_chart

GLOSSARY = (
    ("teacher", "the larger, already trained model whose predictions the student learns from"),
    ("student", "the small model that is made"),
    (
        "non-embedding parameters",
        "a model's weights without the token table, position table and output head: "
        "the size meant by teacher size (T) and student size (S) here",
    ),
    ("T/S", "teacher size divided by student size: the capacity gap"),
    ("keep fraction", "S/T, the part of the teacher that a cut-out student keeps"),
    (
        "init",
        "where the student's first weights come from: pruned = cut out of this teacher, "
        "fixed = the same weights with every teacher, scratch = random, chain = cut out of an "
        "assistant that was cut out of this teacher and distilled from it",
    ),
    ("cross-entropy (CE)", "how surprised a model is by the real next token, in nats"),
    ("held-out loss", "cross-entropy on documents no model was trained on"),
    (
        "KL",
        "how far the student's predictions are from the teacher's: 0 when they are the same",
    ),
    ("baseline", "the same student from the same first weights on the same tokens, CE alone"),
    ("gain", "the baseline's held-out loss minus the distilled student's: positive is better"),
    ("FLOPs", "floating-point operations: 6 per parameter and token to train, 2 for a forward"),
)


def write_report(out_folder: Path) -> Path:
    """Write `report.html` and `figures/*.png|svg` of a sweep's output folder; return the page.

    Reads sweep.json, records/, law.json and samples.json; a sweep that is not finished gives a
    report of what is there. Raises UserError where the folder holds no sweep.
    """
    results = load_results(out_folder)
    sections = list(report_sections(results))
    folder = out_folder / "figures"
    folder.mkdir(exist_ok=True)
    drawn = [f for section in sections for f in section.figures if not isinstance(f, Absent)]
    for stale in (*folder.glob("*.png"), *folder.glob("*.svg")):
        stale.unlink()
    for figure in drawn:
        write_static(figure, folder)
    page = out_folder / "report.html"
    write_text_atomically(page, render_page(results, sections))
    return page


def report_sections(results: Results) -> Iterator[Section]:
    """All figures in the order of the page; those without data as `Absent`."""
    kinds = kinds_of(results)
    architectures = sorted({record.architecture for record in results.records})

    def each_kind(*makers: Any) -> tuple[Figure, ...]:
        return tuple(make(results, kind) for kind in kinds for make in makers)

    yield Section(
        "curves",
        "Loss over teacher size",
        "One line is one student, distilled from every teacher. The star marks the best teacher "
        "with its interval.",
        tuple(
            curve_chart(results, kind, relative=relative)
            for kind in kinds
            for relative in (False, True)
        ),
    )
    yield Section(
        "law",
        "The law",
        "How the best teacher grows with the student, beside the published line.",
        each_kind(law_chart),
    )
    yield Section(
        "gain",
        "Was distillation worth it?",
        "Every cell against the same student trained as long without a teacher.",
        each_kind(gain_map),
    )
    yield Section(
        "compute",
        "Loss against compute",
        "Once with the teacher's training on the bill, once with the teacher already there.",
        tuple(
            compute_chart(results, architecture, teacher_training=counted)
            for architecture in architectures
            for counted in (True, False)
        ),
    )
    yield Section(
        "teachers",
        "The teachers",
        "A curve over teachers is only worth what its teachers are.",
        tuple(teacher_chart(results, architecture) for architecture in architectures),
    )
    yield Section(
        "training",
        "During training",
        "Each student with its best teacher; all other runs are in the records.",
        each_kind(cross_entropy_chart, kl_chart, agreement_chart),
    )


def render_page(results: Results, sections: list[Section]) -> str:
    """The whole page as HTML text. Text of models and of the recipe is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["absent"] = lambda figure: isinstance(figure, Absent)
    template = environment.from_string(_resource("page.html.j2"))
    charts = {
        figure.name: to_plotly(figure)
        for section in sections
        for figure in section.figures
        if not isinstance(figure, Absent)
    }
    counts = {
        status: sum(r.kind == "cell" and r.status == status for r in results.records)
        for status in ("done", "failed")
    }
    return template.render(
        name=str((results.sweep.get("recipe") or {}).get("name") or results.folder.name),
        sweep=results.sweep,
        started=words.moment(results.sweep.get("started")),
        counts=counts,
        num_teachers=sum(r.kind == "teacher" for r in results.records),
        verdict=results.law.get("verdict") or (),
        validity=_warnings(results.law),
        answer=tables.answer_table(results),
        sections=sections,
        tables=(
            tables.students_table(results),
            tables.teachers_table(results),
            tables.grid_table(results),
        ),
        excluded=tables.excluded_table(results),
        provenance=(tables.machine_table(results), tables.stages_table(results)),
        recipe=json.dumps(results.sweep.get("recipe") or {}, indent=2, ensure_ascii=False),
        samples=results.samples.get("texts") or (),
        glossary=GLOSSARY,
        light=_variables(LIGHT),
        dark=_variables(DARK),
        css=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        plotly=Markup(get_plotlyjs()),
        charts=Markup(_script_json(charts)),
    )


def _warnings(law: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(message, where) of every validity warning; one that many curves share is said once."""
    places: dict[str, list[str]] = defaultdict(list)
    for warning in law.get("validity", ()):
        places[warning["message"]].append(warning["where"])
    return [
        (message, "; ".join(found[:2]) + (f" and {len(found) - 2} more" if found[2:] else ""))
        for message, found in places.items()
    ]


def _resource(name: str) -> str:
    return files("capgap.report").joinpath(name).read_text(encoding="utf-8")


def _variables(palette: Palette) -> Markup:
    return Markup("".join(f"--{name}: {value};" for name, value in palette.items()))


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no text in it can close the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
