"""The page in a real browser, and the files beside it."""

import html
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from capgap.errors import UserError
from capgap.law.data import cells_of
from capgap.law.fit import fit
from capgap.law.law import Law
from capgap.report.draw import Absent
from capgap.report.page import report_sections, write_law_report, write_report
from capgap.report.results import NO_LAW, Results, load_results
from capgap.report.sentences import sentences
from law_surface import ladder, sweep
from report_data import TEACHERS, Plan, write_output

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDE, PHONE = 1280, 390
MOST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def page_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = Plan(failed=("llama-s70k-t250k-pruned-400k-seed0",))
    return write_report(write_output(tmp_path_factory.mktemp("report"), plan))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install Debian's package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield running
        running.close()


@dataclass
class Opened:
    """A page in the browser with all it complained about and asked for."""

    page: Any
    complaints: list[str]
    requests: list[str]


def _open(browser: Any, path: Path, *, scheme: str = "light", width: int = WIDE) -> Opened:
    """Opens a page and goes down it: charts are drawn when they come into view."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True
    )
    opened = Opened(context.new_page(), [], [])
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(path.as_uri())
    for figure in opened.page.locator("[data-chart]").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".chart svg").wait_for()
    return opened


@pytest.fixture(scope="module")
def light(browser: Any, page_path: Path) -> Opened:
    """The page wide and light, shared by the tests that only look."""
    return _open(browser, page_path)


DRAWN = """() => [...document.querySelectorAll('[data-chart]')].map(figure => ({
    name: figure.dataset.chart,
    marks: figure.querySelectorAll('.chart .role-mark path, .chart .role-mark line').length,
    width: figure.querySelector('.chart svg').getBoundingClientRect().width,
    box: figure.querySelector('.chart').getBoundingClientRect().width,
}))"""
COLOURS = """() => {
    const chart = document.querySelector('[data-chart^="curves"] .chart');
    return {
        page: getComputedStyle(document.body).backgroundColor,
        text: getComputedStyle(document.body).color,
        chart: getComputedStyle(chart.querySelector('svg')).backgroundColor,
        title: getComputedStyle(chart.querySelector('.role-axis-title text')).fill,
        tick: getComputedStyle(chart.querySelector('.role-axis-label text')).fill,
        line: getComputedStyle(chart.querySelector('.mark-line path')).stroke,
    };
}"""


@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_every_chart_is_drawn_quietly_and_nothing_is_fetched(
    browser: Any, page_path: Path, light: Opened, width: int
) -> None:
    opened = light if width == WIDE else _open(browser, page_path, width=width)
    drawn = opened.page.evaluate(DRAWN)
    figures = [
        figure.name
        for held in report_sections(load_results(page_path.parent)).values()
        for figure in held
        if not isinstance(figure, Absent)
    ]
    assert [chart["name"] for chart in drawn] == figures
    assert len(figures) == 16
    for chart in drawn:
        assert chart["marks"] > 0 or chart["name"].startswith("gain"), chart
        assert chart["width"] <= chart["box"] + 1, chart
    assert opened.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert opened.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in opened.requests), opened.requests
    assert len([url for url in opened.requests if url.startswith("file:")]) == 1


def test_the_answer_stands_on_a_phone_without_scrolling(browser: Any, page_path: Path) -> None:
    page = _open(browser, page_path, width=PHONE).page
    assert page.evaluate(
        "[...document.querySelectorAll('#answer .scroll')]"
        ".every(table => table.scrollWidth <= table.clientWidth)"
    )
    assert "Teachers that will do" in page.evaluate(
        "getComputedStyle(document.querySelector('#answer td'), '::before').content"
    )


def _luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)" by the rule of WCAG 2."""
    numbers = [float(part) / 255 for part in colour.split("(")[1].rstrip(")").split(",")[:3]]
    red, green, blue = (
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(first: str, second: str) -> float:
    high, low = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_and_charts_are_readable_in_both_schemes(
    browser: Any, page_path: Path, light: Opened, scheme: str
) -> None:
    opened = light if scheme == "light" else _open(browser, page_path, scheme=scheme)
    colours = opened.page.evaluate(COLOURS)
    assert (_luminance(colours["page"]) > 0.5) == (scheme == "light")
    assert (_luminance(colours["chart"]) > 0.5) == (scheme == "light")
    assert _contrast(colours["text"], colours["page"]) >= 7
    for part in ("title", "tick", "line"):
        assert _contrast(colours[part], colours["chart"]) >= 4.5, part


def test_charts_follow_a_change_of_scheme_and_print_light(light: Opened) -> None:
    page = light.page
    before = page.evaluate(COLOURS)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(1500)
    dark = page.evaluate(COLOURS)
    assert dark["chart"] != before["chart"]
    assert dark["title"] != before["title"]
    page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    page.wait_for_timeout(1500)
    assert page.evaluate(COLOURS)["chart"] == before["chart"]
    page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    page.wait_for_timeout(1500)
    assert page.evaluate(COLOURS) == dark
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(1500)
    assert page.evaluate(COLOURS) == before


def test_text_of_models_is_shown_and_never_run(light: Opened) -> None:
    page = light.page
    text = page.locator("#samples pre").first.inner_text()
    assert "</script><script>window.broken = true</script>" in text
    assert '\n    """Read <b>it</b>."""\n    return' in text
    assert page.evaluate("window.broken") is None
    assert "the loss is not finite, at step 12, windows 3, 77" in page.inner_text("#warnings")


def test_headings_step_down_one_at_a_time_and_figures_have_captions(light: Opened) -> None:
    page = light.page
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].map(h => Number(h.tagName[1]))"
    )
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate(
        "[...document.querySelectorAll('figure')].every("
        "f => f.querySelector('figcaption') && f.querySelector('[role=img]').ariaLabel.length > 40)"
    )


def test_a_page_is_small_loads_nothing_and_escapes_what_it_shows(page_path: Path) -> None:
    text = page_path.read_text()
    assert len(text.encode()) < MOST_BYTES
    # what is inside of scripts is no element
    elements = re.sub(r"(<script[^>]*>).*?</script>", r"\1", text, flags=re.S)
    for address in re.findall(
        r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]*)', elements
    ):
        assert address.startswith("data:"), address
    policy = "default-src 'none'; script-src 'unsafe-inline'"
    assert policy in text
    assert "unsafe-eval" not in text
    # the page's own, and one for each chart
    assert elements.count("<script") == elements.count("data-chart=") + 3
    assert "window.broken = true</script>" not in text
    assert "&lt;/script&gt;&lt;script&gt;window.broken = true" in text
    results = load_results(page_path.parent)
    assert html.escape(sentences(results.law)[0], quote=False) in text.replace("&#39;", "'")


@pytest.mark.parametrize(
    "plan",
    [
        Plan(teachers=(), law=False, samples=False, finished=False),
        Plan(students=(40_000,), teachers=TEACHERS[:2], samples=False, finished=False),
    ],
)
def test_a_sweep_that_has_barely_begun_gives_a_page(
    browser: Any, tmp_path: Path, plan: Plan
) -> None:
    opened = _open(browser, write_report(write_output(tmp_path, plan)), width=PHONE)
    assert "not finished" in opened.page.inner_text("#answer")
    assert opened.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    assert opened.complaints == []


def test_every_figure_has_its_picture_and_a_second_report_leaves_no_old_one(
    page_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(page_path.parent, folder)
    (folder / "figures" / "old.png").touch()
    before = {path.name: path.read_bytes() for path in (folder / "figures").glob("*.svg")}
    write_report(folder)
    names = {path.name for path in (folder / "figures").iterdir()}
    assert "old.png" not in names
    assert len(names) == 32
    assert all((folder / "figures" / name).read_bytes() == before[name] for name in before)
    for path in (folder / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


LAW_ALONE = ["answer", "curves", "law", "surfaces", "tables", "warnings", "terms"]


@pytest.fixture(scope="module")
def law() -> Law:
    records = sweep(
        [30_000, 50_000, 80_000], lambda s: ladder(s, 1.5, 7), lambda s: 2.2 * s, seed_noise=0.001
    )
    return fit(cells_of(records), draws=200)


@pytest.fixture(scope="module")
def law_page(law: Law, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page whose name and title need care in links and in HTML."""
    path = tmp_path_factory.mktemp("law") / "new" / "my #1 law.html"
    assert write_law_report(law, path, title="cells of <mine> & yours") == path
    return path


def test_a_law_alone_gives_a_page_of_what_it_can_show(law: Law, law_page: Path) -> None:
    text = law_page.read_text()
    assert re.findall(r'<section id="([^"]+)"', text) == LAW_ALONE
    assert re.findall(r'<a href="#([^"]+)"', text.partition("<nav")[2])[:6] == LAW_ALONE[1:]
    assert "cells of &lt;mine&gt; &amp; yours" in text
    for senseless in ("not finished", "0 teachers", "No samples", "The recipe", "Nothing has been"):
        assert senseless not in text
    folder = law_page.parent / "my #1 law-figures"
    results = Results(law_page.parent, sweep={}, records=(), law=law, samples={})
    figures = [figure for held in report_sections(results).values() for figure in held]
    # these students have no teacher in common
    assert [one.name for one in figures if isinstance(one, Absent)] == ["contrasts-llama"]
    figures = [figure for figure in figures if not isinstance(figure, Absent)]
    expected = {f"{figure.name}.{kind}" for figure in figures for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == expected
    for target in re.findall(r'href="([^"#]+\.(?:png|svg))"', text):
        assert (law_page.parent / unquote(target)).is_file()
    assert len(expected) == 2 * 6


def test_a_law_without_curves_gives_a_page(tmp_path: Path) -> None:
    text = write_law_report(NO_LAW, tmp_path / "empty.html", title="nothing").read_text()
    assert "The law holds no curve." in text


def test_odd_names_of_kinds_make_plain_file_names(law: Law, tmp_path: Path) -> None:
    odd = {"architecture": "my/own model", "init": "cut & tuned"}
    lines = [
        line.model_copy(update={"group": line.group.model_copy(update=odd)}) for line in law.lines
    ]
    curves = [curve.model_copy(update=odd) for curve in law.curves]
    named = law.model_copy(update={"lines": tuple(lines), "curves": tuple(curves)})
    write_law_report(named, tmp_path / "page.html", title="odd")
    names = {path.name for path in (tmp_path / "page-figures").iterdir()}
    assert "law-my-own-model-cut-tuned-400000.png" in names
    assert "ratios-my-own-model.svg" in names


def test_a_folder_that_is_no_sweep_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no sweep\.json"):
        write_report(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        write_report(tmp_path)
