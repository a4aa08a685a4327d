"""The report: one self-contained page and a folder of figures, from a sweep's output folder."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import vl_convert
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from capgap.law.law import Law
from capgap.law.rules import own_surface
from capgap.records import write_text_atomically
from capgap.report import charts, draw, numbers, tables
from capgap.report import published_charts as published
from capgap.report import run_charts as runs
from capgap.report.data import Results, load_results
from capgap.report.draw import COLOURS, Absent, Picture
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
    return _write(load_results(out_folder), out_folder / "report.html", out_folder / "figures")


def write_law_report(law: Law, path: Path, *, title: str) -> Path:
    """Write the report of a law without a sweep behind it, one page at `path`, and its pictures as
    PNG and SVG into a folder beside it, `<stem>-figures`; return the page. What only records could
    show is left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(folder=path.parent, sweep={}, records=(), law=law, samples={})
    return _write(results, path, path.parent / f"{path.stem}-figures", title=title)


def report_sections(results: Results) -> Sections:
    """All pictures by section, those without data as `Absent`; of a law without records only what
    it can show alone."""
    law, groups = results.law, [line.group for line in results.lines]
    kinds = sorted({c.architecture for c in law.curves} | {r.architecture for r in results.records})
    makers = (charts.curve_chart, charts.cost_chart)
    found: Sections = {"curves": [make(results, group) for group in groups for make in makers]}
    found["law"] = [charts.contrast_chart(results, kind) for kind in kinds]
    found["law"] += [charts.ratio_chart(results, kind) for kind in kinds]
    found["law"] += [charts.law_chart(results, line) for line in results.lines]
    if results.search:
        found["search"] = [runs.search_chart(results)]
    if not results.law_alone:
        both = (False, True)
        found["gain"] = [runs.gain_map(results, group) for group in groups]
        found["compute"] = [runs.compute_chart(results, k, given=g) for k in kinds for g in both]
        found["teachers"] = [runs.teacher_chart(results, kind) for kind in kinds]
        found["training"] = [
            runs.training_chart(results, g, measure) for g in groups for measure in runs.MEASURES
        ]
    found["surfaces"] = [
        published.own_surface_chart(own, entry.architecture, tokens)
        for entry in law.surfaces
        if (own := own_surface(entry)) is not None
        for tokens in sorted({tokens for _, tokens in own.combinations})
    ]
    found["surfaces"] += [published.published_surface_chart(tokens) for tokens in SURFACE_TOKENS]
    if not results.law_alone:
        found["published"] = [published.benchmark_chart(), published.families_chart()]
    return found


def _write(results: Results, page: Path, folder: Path, *, title: str = "") -> Path:
    sections = report_sections(results)
    pictures = [one for held in sections.values() for one in held if isinstance(one, Picture)]
    folder.mkdir(exist_ok=True)
    for stale in [path for path in folder.iterdir() if path.suffix in (".png", ".svg")]:
        stale.unlink()
    for one in pictures:
        draw.write_picture(one, *(folder / f"{one.name}{suffix}" for suffix in (".png", ".svg")))
    write_text_atomically(page, render_page(results, sections, title, folder.name))
    return page


def render_page(results: Results, sections: Sections, title: str, folder: str) -> str:
    """The whole page as HTML text. Text of models and of the recipe is escaped.

    `title` stands above the page, without one the sweep's name; the pictures lie in `folder`.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["absent"] = lambda figure: isinstance(figure, Absent)
    environment.filters["spec"] = lambda picture: _json(draw.spec_of(picture))
    environment.filters["moment"] = numbers.moment
    sweep, recipe = results.sweep, results.sweep.get("recipe") or {}
    held = [tables.students_table(results)]
    if not results.law_alone:
        held += [tables.teachers_table(results), tables.grid_table(results)]
    return environment.from_string(_resource("page.html.j2")).render(
        name=title or str(recipe.get("name") or results.folder.name),
        results=results,
        law=results.law,
        sweep=sweep,
        figures_folder=quote(folder),
        cells=[run.status for run in results.records if run.kind == "cell"],
        num_teachers=sum(run.kind == "teacher" for run in results.records),
        sentences=answer(results.law, results.search),
        answers=tables.answer_tables(results),
        sections=sections,
        tables=held,
        excluded=tables.excluded_table(results),
        provenance=tables.provenance_tables(results),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
        samples=results.samples.get("texts") or (),
        palettes=[
            Markup("".join(f"--{name}: {pair[ground]};" for name, pair in COLOURS.items()))
            for ground in (0, 1)
        ],
        css=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        runtime=Markup(vl_convert.javascript_bundle(WINDOW)),
        colours=_json(dict(COLOURS.values())),
    )


def _resource(name: str) -> str:
    return files("capgap.report").joinpath(name).read_text(encoding="utf-8")


def _json(value: Any) -> Markup:
    """JSON that is safe inside a script element: no text in it can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c"))
