"""Pictures of what is published: benchmarks, families, surfaces, and the figure of `recommend`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from capgap.cli import app
from capgap.errors import UserError
from capgap.law.advise import recommend
from capgap.law.published import (
    PUBLISHED_SURFACE,
    candidates_of,
    published_families,
    published_results,
)
from capgap.report.draw import Frame, check_picture, linear_axis, log_axis, look, row, write_picture
from capgap.report.published_charts import (
    NEAR,
    VALLEY,
    OwnResult,
    advice_chart,
    benchmark_chart,
    families_chart,
    published_surface_chart,
    surface_chart,
)
from report_data import rows_of


def test_means_are_those_of_the_six_columns() -> None:
    by_name = {model.name: model for model in published_results()}
    assert len(by_name) == 12
    # (46.00 + 34.40 + 31.57 + 12.80 + 32.02 + 14.10) / 6
    assert by_name["LLaMA-2-7B"].mean == pytest.approx(28.48, abs=0.005)
    assert by_name["MiniMA-3B"].flops == 4.0e21
    for model in by_name.values():
        assert len(model.scores) == 6
        assert model.mean == pytest.approx(sum(model.scores.values()) / 6)


def test_every_published_model_is_marked_and_the_front_is_above_all() -> None:
    picture = benchmark_chart([OwnResult("mine", 6e21, 27.0)])
    places = {one["text"]: (one["x"], one["y"]) for one in rows_of(picture, "text")}
    expected = {model.name: (model.flops, model.mean) for model in published_results()}
    assert {name: pytest.approx(place, rel=1e-5) for name, place in places.items()} == (
        expected | {"mine": (6e21, 27.0)}
    )
    marks = {(one["x"], one["y"]) for one in rows_of(picture, "point")}
    assert marks == set(places.values())
    front = [one for one in rows_of(picture, "line") if one["key"] == "Pareto front"]
    held = [name for name, place in places.items() if place in [(o["x"], o["y"]) for o in front]]
    assert set(held) == {"ShearedLLaMA-2.7B", "Phi-2-2.8B", "MiniChat-3B", "MiniChat-2-3B"}
    for flops, mean in expected.values():
        assert mean <= 1.0001 * max(one["y"] for one in front if one["x"] <= 1.0001 * flops)


def test_a_name_moves_away_from_its_neighbour_and_from_a_line() -> None:
    frame = Frame(log_axis("x", (1.0, 100.0)), linear_axis("y", (0.0, 27.0)), {"a": look(0)})

    def sides(*rows: dict[str, Any], lines: Any = ()) -> dict[str, str]:
        found = frame.name(list(rows), lines)
        return {
            one["text"]: layer.mark.align
            for layer in found
            for one in layer.data.to_dict()["values"]
        }

    assert sides(row("a", 10.0, 13.0, text="alone")) == {"alone": "left"}
    pair = sides(row("a", 10.0, 13.0, text="left one"), row("a", 10.6, 13.0, text="right one"))
    assert pair == {"left one": "right", "right one": "left"}
    level = [row("a", x, 13.0) for x in np.geomspace(1, 100, 100).tolist()]
    assert sides(row("a", 10.0, 13.0, text="on a line"), lines=level) == {"on a line": "center"}
    assert sides(row("a", 95.0, 13.0, text="at the edge")) == {"at the edge": "right"}


def test_families_have_their_larger_members_each_with_a_look_of_its_own() -> None:
    rows = rows_of(families_chart(), "point")
    for family in published_families().values():
        sizes = [model.non_embedding for model in family.models]
        held = sorted(one["x"] for one in rows if one["key"] == family.title)
        assert held == sorted(size for size in sizes if size > 3_000_000_000)
    looks = [look(place) for place in range(len(published_families()))]
    # told apart without colour
    assert len({(one.shape, one.dash) for one in looks}) == len(looks)


def test_advice_shows_what_was_recommended() -> None:
    found = recommend(10**9, 80 * 10**9, candidates_of("pythia", ["9B"]))
    picture = advice_chart(found)
    lowest = min(one.expected_loss for one in found.recommendations)
    marks = {one["x"]: one for one in rows_of(picture, "point")}
    texts = {one["text"].split()[0]: one["text"] for one in rows_of(picture, "text")}
    for one in found.recommendations:
        mark = marks[one.non_embedding]
        assert bool(mark["style"].get("filled")) != one.told_worse
        if one.expected_loss <= 1.1 * lowest:
            assert mark["y"] == pytest.approx(one.expected_loss, rel=1e-5)
        else:
            # on the edge, with its loss in words
            assert mark["y"] == pytest.approx(1.1 * lowest, rel=1e-4)
            assert texts[one.teacher].endswith(f"({one.expected_loss:.2f})")
    (upright,) = [one for one in rows_of(picture, "rule") if "low" not in one]
    assert upright["x"] == pytest.approx(found.linear_law.teacher, rel=1e-5)
    shade = sorted({one["x"] for one in rows_of(picture, "area")})
    assert shade == pytest.approx(found.linear_law.interval, rel=1e-5)
    assert f"Take {found.take}" in picture.alt


def test_a_surface_shows_its_valley_and_what_costs_little() -> None:
    picture = published_surface_chart(20)
    valley = {one["x"]: one["y"] for one in rows_of(picture, "line") if one["key"] == VALLEY}
    assert len(valley) == 25
    for size, teacher in list(valley.items())[::8]:
        best = PUBLISHED_SURFACE.best_teacher(size, 20 * size)
        assert teacher == pytest.approx(best.ratio * size, rel=0.01)
        near = [one for one in rows_of(picture, "area") if (one["x"], one["key"]) == (size, NEAR)]
        narrow = near[-1]
        assert narrow["low"] == pytest.approx(best.within[0] * size, rel=0.05)
        assert near[0]["low"] <= near[1]["low"] <= narrow["low"] <= teacher
    with pytest.raises(AssertionError):
        surface_chart(PUBLISHED_SURFACE, "n", "t", students=(1e8, 1e9), teachers=(1e8, 1e10))


ASKED = ("recommend", "--student", "3B", "--tokens", "126B", "--family", "llama2")


@pytest.mark.parametrize(("name", "start"), [("advice.png", b"\x89PNG"), ("advice.SVG", b"<svg")])
def test_recommend_draws_its_advice(tmp_path: Path, name: str, start: bytes) -> None:
    path = tmp_path / name
    done = CliRunner().invoke(app, [*ASKED, "--figure", str(path)])
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(start)
    if start == b"<svg":
        assert "Llama-2-70B" in path.read_text()


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.svg", "b.svg", "a.png", "b.png")]
    for path in paths:
        write_picture(benchmark_chart(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[2].read_bytes() == paths[3].read_bytes()
    # text is drawn: without a font there would be next to nothing
    assert paths[2].stat().st_size > 20_000


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
