"""The report: one self-contained page and a folder of figures, from a sweep's output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from capgap.law.validity import grouped_warnings
from capgap.records import write_text_atomically
from capgap.report import tables, words
from capgap.report.data import Results, load_results
from capgap.report.figures import Absent, Section
from capgap.report.interactive import to_plotly
from capgap.report.sections import report_sections
from capgap.report.static import write_static
from capgap.report.style import DARK, LIGHT, Palette

LAW_TABLES = (tables.students_table,)
TABLES = (*LAW_TABLES, tables.teachers_table, tables.grid_table)
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

    Reads sweep.json, records/, law.json, samples.json and search.json; a sweep that is not finished
    gives a report of what is there. Raises UserError where the folder holds no sweep.
    """
    return _write(load_results(out_folder), out_folder / "report.html", out_folder / "figures")


def write_law_report(law: Mapping[str, Any], path: Path, *, title: str) -> Path:
    """Write the report of a law without a sweep behind it, one page at `path`, and its pictures as
    PNG and SVG into a folder beside it, `<stem>-figures`; return the page.

    `law` is the content of a law.json. What only records could show is left out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(folder=path.parent, sweep={}, records=(), law=law, samples={})
    return _write(results, path, path.parent / f"{path.stem}-figures", title=title)


def _write(results: Results, page: Path, folder: Path, *, title: str = "") -> Path:
    sections = list(report_sections(results))
    folder.mkdir(exist_ok=True)
    drawn = [f for section in sections for f in section.figures if not isinstance(f, Absent)]
    for stale in (*folder.glob("*.png"), *folder.glob("*.svg")):
        stale.unlink()
    for figure in drawn:
        write_static(figure, folder)
    text = render_page(results, sections, title=title, figures_folder=folder.name)
    write_text_atomically(page, text)
    return page


def render_page(
    results: Results, sections: list[Section], *, title: str = "", figures_folder: str = "figures"
) -> str:
    """The whole page as HTML text. Text of models and of the recipe is escaped.

    `title` stands above the page, without one the sweep's name; `figures_folder` lies beside it.
    """
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
        name=title or str((results.sweep.get("recipe") or {}).get("name") or results.folder.name),
        law_alone=results.law_alone,
        num_curves=len(results.law.get("curves", ())),
        figures_folder=quote(figures_folder),
        sweep=results.sweep,
        started=words.moment(results.sweep.get("started")),
        counts=counts,
        num_teachers=sum(r.kind == "teacher" for r in results.records),
        verdict=results.law.get("verdict") or (),
        validity=grouped_warnings(results.law),
        answer=tables.answer_table(results),
        sections=sections,
        tables=[make(results) for make in (LAW_TABLES if results.law_alone else TABLES)],
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


def _resource(name: str) -> str:
    return files("capgap.report").joinpath(name).read_text(encoding="utf-8")


def _variables(palette: Palette) -> Markup:
    return Markup("".join(f"--{name}: {value};" for name, value in palette.items()))


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element: no text in it can close the element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
