"""Pictures of what is published: benchmarks, families, labels, and the figure of `recommend`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from capgap.cli import app
from capgap.errors import UserError
from capgap.law.benchmarks import published_results
from capgap.law.families import published_families
from capgap.law.published import PUBLISHED_SURFACE
from capgap.law.recommend import candidates_of, recommend
from capgap.report.advice_charts import advice_chart, families_chart
from capgap.report.figures import Axis, Chart
from capgap.report.interactive import to_plotly
from capgap.report.labels import place_labels
from capgap.report.published_charts import OwnResult, benchmark_chart
from capgap.report.static import check_picture, write_static


def points_of(chart: Any) -> dict[str, tuple[float, float]]:
    """Label -> place of every point that has one."""
    return {
        label: (x, y)
        for series in chart.series
        for label, x, y in zip(series.labels, series.x, series.y, strict=False)
    }


def test_means_are_those_of_the_six_columns() -> None:
    by_name = {model.name: model for model in published_results()}
    assert len(by_name) == 12
    llama = by_name["LLaMA-2-7B"]
    # (46.00 + 34.40 + 31.57 + 12.80 + 32.02 + 14.10) / 6
    assert llama.mean == pytest.approx(28.48, abs=0.005)
    assert list(llama.scores) == ["MMLU", "C-Eval", "DROP", "HumanEval", "BBH", "GSM8K"]
    assert by_name["MiniMA-3B"].flops == 4.0e21
    for model in by_name.values():
        assert len(model.scores) == 6
        assert model.mean == pytest.approx(sum(model.scores.values()) / 6)


def test_every_published_model_is_marked_and_the_front_is_above_all() -> None:
    chart = benchmark_chart([OwnResult("mine", 6e21, 27.0)])
    assert isinstance(chart, Chart)
    places = points_of(chart)
    expected = {model.name: (model.flops, model.mean) for model in published_results()}
    assert places == expected | {"mine": (6e21, 27.0)}
    front = next(one for one in chart.series if one.name == "Pareto front")
    corners = list(zip(front.x, front.y, strict=True))
    held = [name for name, place in expected.items() if place in corners]
    assert held == ["ShearedLLaMA-2.7B", "Phi-2-2.8B", "MiniChat-3B", "MiniChat-2-3B"]
    for flops, mean in expected.values():
        assert mean <= max(y for x, y in corners if x <= flops)
    base = next(one for one in chart.series if one.name.startswith("without"))
    assert max(y for x, y in zip(base.x, base.y, strict=True) if x <= 5e21) == pytest.approx(
        21.66, abs=0.005
    )


def boxes(chart: Any, letters: float, lines: float) -> list[tuple[str, float, float, float, float]]:
    """Where the labels lie in a plot of so many letters and lines."""
    found = []
    for series in chart.series:
        for x, y, text, side in zip(
            series.x, series.y, series.labels, series.label_at, strict=False
        ):
            vertical, horizontal = side.split()
            across = [np.log(v) if chart.x.log else v for v in (x, *chart.x.limits)]
            up = [np.log(v) if chart.y.log else v for v in (y, *chart.y.limits)]
            left = letters * (across[0] - across[1]) / (across[2] - across[1])
            left += {"left": -len(text) - 1.3, "center": -len(text) / 2, "right": 1.3}[horizontal]
            low = lines * (up[0] - up[1]) / (up[2] - up[1])
            low += {"bottom": -1.7, "middle": -0.5, "top": 0.7}[vertical]
            found.append((text, left, low, left + len(text), low + 1))
    return found


def test_labels_of_published_models_do_not_overlap() -> None:
    held = boxes(benchmark_chart(), 74, 18)
    assert len(held) == 12
    for i, (name, left, low, right, high) in enumerate(held):
        assert left > -8, name
        assert right < 74, name
        for other in held[i + 1 :]:
            apart = right <= other[1] or other[3] <= left or high <= other[2] or other[4] <= low
            assert apart, (name, other[0])


def test_a_label_moves_away_from_its_neighbour_and_from_a_line() -> None:
    x, y = Axis("x", "u", limits=(0.0, 74.0)), Axis("y", "u", limits=(0.0, 18.0))
    assert place_labels([(30, 9)], ["alone"], x, y) == ("middle right",)
    first, second = place_labels([(30, 9), (33, 9)], ["left one", "right one"], x, y)
    assert (first, second) == ("middle left", "middle right")
    (side,) = place_labels([(30, 9)], ["on a line"], x, y, lines=[((0, 74), (9, 9))])
    assert side.split()[0] in ("top", "bottom")
    assert place_labels([(73, 9)], ["at the edge"], x, y)[0].endswith("left")


def test_every_member_of_every_family_is_marked_with_its_family() -> None:
    chart = families_chart()
    assert isinstance(chart, Chart)
    by_title = {one.name: one for one in chart.series}
    looks = set()
    for family in published_families().values():
        series = by_title[family.title]
        sizes = sorted(model.parameters().non_embedding for model in family.models)
        assert list(series.x) == sizes
        looks.add(series.marker)
    # told apart without colour
    assert len(looks) == len(published_families())


def test_advice_shows_what_was_recommended() -> None:
    found = recommend(10**9, 80 * 10**9, candidates_of("pythia", ["9B"]))
    chart = advice_chart(found)
    lowest = min(row["expected_loss"] for row in found["recommendations"])
    places = points_of(chart)
    for row in found["recommendations"]:
        ((label, place),) = [(k, v) for k, v in places.items() if k.split()[0] == row["teacher"]]
        assert place[0] == row["non_embedding"]
        if row["expected_loss"] <= 1.1 * lowest:
            assert place[1] == row["expected_loss"]
        else:
            # on the edge, with its loss in words
            assert place[1] == pytest.approx(1.1 * lowest, rel=0.01)
            assert label.endswith(f"({row['expected_loss']:.2f})")
    best = PUBLISHED_SURFACE.best_teacher(1e9, 80e9)
    (valley,) = [one for one in chart.series if one.marker == "star"]
    assert (valley.x[0], valley.y[0]) == pytest.approx((best.ratio * 1e9, best.loss))
    (shade,) = [one for one in chart.series if one.hatch]
    assert shade.x == pytest.approx((2e9, 1e10 / 3))
    curve = next(one for one in chart.series if one.name == "surface, compute-optimal tokens")
    band = next(one for one in chart.series if one.name == "its error of 1%")
    assert np.array(band.y_high) == pytest.approx(1.01 * np.array(curve.y))
    assert [one.name for one in chart.series][-1] == "your teachers"
    # at fewer tokens it is 93B, far above all candidates
    far = advice_chart(recommend(10**9, 20 * 10**9, candidates_of("pythia", [])))
    assert not [one for one in far.series if one.marker == "star"]
    assert any("outside of the picture: 93B" in note for note in far.notes)


def test_both_renderers_draw_what_is_published(tmp_path: Path) -> None:
    own = benchmark_chart([OwnResult("mine", 6e21, 27.0)])
    for chart in (own, families_chart()):
        assert isinstance(chart, Chart)
        assert chart.x.unit
        assert chart.y.unit
        notes = to_plotly(chart)["layout"].get("annotations", [])
        assert len(notes) == len(points_of(chart))
        for path in write_static(chart, tmp_path):
            assert path.stat().st_size > 20_000
    note = next(n for n in to_plotly(own)["layout"]["annotations"] if n["text"] == "mine")
    assert 10 ** note["x"] == pytest.approx(6e21)


ASKED = ("recommend", "--student", "3B", "--tokens", "126B", "--family", "llama2")


@pytest.mark.parametrize(("name", "start"), [("advice.png", b"\x89PNG"), ("advice.SVG", b"<?xml")])
def test_recommend_draws_its_advice(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    done = CliRunner().invoke(app, [*ASKED, "--figure", str(path)])
    assert done.exit_code == 0, done.output
    assert "Take Llama-2-" in done.stdout
    assert path.read_bytes().startswith(start)
    if start == b"<?xml":
        assert "Llama-2-70B" in path.read_text()


@pytest.mark.parametrize("name", ["advice.pdf", "advice"])
def test_a_picture_of_an_unknown_kind_is_refused_in_one_line(
    tmp_path: Path, name: str, typed: Callable[..., Any]
) -> None:
    found = typed(*ASKED, "--figure", tmp_path / name)
    assert (found.code, found.out) == (2, "")
    assert found.err.count("\n") == 1
    assert name in found.err
    assert ".png or .svg" in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_picture_needs_a_folder_and_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        check_picture(tmp_path / "nowhere" / "a.png")
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        check_picture(tmp_path / "a.png")
