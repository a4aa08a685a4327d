"""The report: one self-contained page and a folder of figures, from a sweep's output folder."""

import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from capgap.artifact import write_text
from capgap.law.law import Law
from capgap.law.rules import own_surface
from capgap.report import charts, draw, numbers, results
from capgap.report import published_charts as published
from capgap.report import run_charts as runs
from capgap.report.draw import COLOURS, Absent, Picture
from capgap.report.results import Results
from capgap.report.sentences import answer

# tokens per student parameter of the published surfaces that are drawn
SURFACE_TOKENS = (20, 80)
WINDOW = "window.vegaEmbed = vegaEmbed;"
Sections = dict[str, list[Picture | Absent]]


def write_report(out_folder: Path) -> Path:
    """Write `report.html` and `figures/*.png|svg` of a sweep's output folder; return the page.

    Reads sweep.json, records/, law.json, samples.json and search.json; a sweep that is not finished
    gives a report of what is there. Raises UserError where the folder holds no sweep.
    """
    found = results.load_results(out_folder)
    return _write(found, out_folder / "report.html", out_folder / "figures")


def write_law_report(law: Law, path: Path, *, title: str) -> Path:
    """Write the report of a law without a sweep behind it, one page at `path`, and its pictures as
    PNG and SVG into a folder beside it, `<stem>-figures`; return the page. What only records could
    show is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = Results(folder=path.parent, sweep={}, records=(), law=law, samples={})
    return _write(found, path, path.parent / f"{path.stem}-figures", title=title)


def report_sections(found: Results) -> Sections:
    """All pictures by section, those without data as `Absent`; of a law without records only what
    it can show alone."""
    law, lines = found.law, found.lines
    groups = [line.group for line in lines]
    kinds = sorted({c.architecture for c in law.curves} | {r.architecture for r in found.records})
    makers = (charts.curve_chart, charts.cost_chart)
    sections: Sections = {
        "curves": [make(found, group) for group in groups for make in makers],
        "law": [
            *(charts.contrast_chart(found, kind) for kind in kinds),
            *(charts.ratio_chart(found, kind) for kind in kinds),
            *(charts.law_chart(found, line) for line in lines),
        ],
    }
    if found.search:
        sections["search"] = [runs.search_chart(found)]
    if not found.law_alone:
        both = (False, True)
        sections |= {
            "gain": [runs.gain_map(found, group) for group in groups],
            "compute": [runs.compute_chart(found, kind, given=g) for kind in kinds for g in both],
            "teachers": [runs.teacher_chart(found, kind) for kind in kinds],
            "training": [runs.training_chart(found, g, m) for g in groups for m in runs.MEASURES],
        }
    own = [
        published.own_surface_chart(rule, entry.architecture, tokens)
        for entry in law.surfaces
        if (rule := own_surface(entry)) is not None
        for tokens in sorted({tokens for _, tokens in rule.combinations})
    ]
    sections["surfaces"] = [*own, *map(published.published_surface_chart, SURFACE_TOKENS)]
    if not found.law_alone:
        sections["published"] = [published.benchmark_chart(), published.families_chart()]
    return sections


def _write(found: Results, page: Path, folder: Path, *, title: str = "") -> Path:
    sections = report_sections(found)
    folder.mkdir(exist_ok=True)
    for stale in [path for path in folder.iterdir() if path.suffix in (".png", ".svg")]:
        stale.unlink()
    for one in (figure for figures in sections.values() for figure in figures):
        if isinstance(one, Picture):
            draw.write_picture(one, folder / f"{one.name}.png", folder / f"{one.name}.svg")
    write_text(page, render_page(found, sections, title, folder.name))
    return page


def render_page(found: Results, sections: Sections, title: str, folder: str) -> str:
    """The whole page as HTML text. Text of models and of the recipe is escaped.

    `title` stands above the page, without one the sweep's name; the pictures lie in `folder`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["absent"] = lambda figure: isinstance(figure, Absent)
    environment.filters["spec"] = lambda picture: _json(draw.spec_of(picture))
    environment.filters["moment"] = numbers.moment
    recipe = found.sweep.get("recipe") or {}
    tables = [results.students_table(found)]
    if not found.law_alone:
        tables += [results.teachers_table(found), results.grid_table(found)]
    template = files("capgap.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=title or str(recipe.get("name") or found.folder.name),
        results=found,
        law=found.law,
        sweep=found.sweep,
        figures_folder=quote(folder),
        cells=[run.status for run in found.records if run.kind == "cell"],
        num_teachers=sum(run.kind == "teacher" for run in found.records),
        sentences=answer(found.law, found.search),
        answers=results.answer_tables(found),
        sections=sections,
        tables=tables,
        excluded=results.excluded_table(found),
        provenance=results.provenance_tables(found),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        samples=found.samples.get("texts") or (),
        palettes=[
            Markup("".join(f"--{name}: {pair[ground]};" for name, pair in COLOURS.items()))
            for ground in (0, 1)
        ],
        runtime=_runtime(),
        colours=_json(dict(COLOURS.values())),
    )


@cache
def _runtime() -> Markup:
    """The JavaScript that draws; made once, since that takes a second and more."""
    return Markup(vl_convert.javascript_bundle(WINDOW))


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element: no text in it can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))
