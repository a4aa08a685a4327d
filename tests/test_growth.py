"""A recipe that only grows goes on in its folder; one that would change a run there is refused."""

import json
from pathlib import Path

import pytest

from capgap.config import parse_recipe
from capgap.errors import UserError
from capgap.records import read_records
from capgap.scrub import scrub
from capgap.sweep import runner
from capgap.sweep.checks import claimed
from capgap.sweep.plan import make_plan
from capgap.sweep.progress import Display
from capgap.sweep.recipe import Recipe
from test_bad_input import OwnWorkers, use_own_workers


def begin(out: Path, recipe: Recipe, *, baselines: bool = False) -> None:
    """As if the sweep had recorded its runs, with or without baselines."""
    marker = {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe.hash()}
    (out / "sweep.json").write_text(json.dumps(marker))
    plan = make_plan(recipe)
    for run in plan.runs.values() if baselines else (*plan.teachers, *plan.cells):
        folder = out / "records" / run.id
        folder.mkdir(parents=True)
        (folder / "record.json").touch()


def changed(data: dict, changes: dict) -> Recipe:
    """`students.sizes` and so on set in a recipe."""
    data = json.loads(json.dumps(data))
    for key, value in changes.items():
        *above, name = key.split(".")
        (data.setdefault(above[0], {}) if above else data)[name] = value
    return parse_recipe(data)


def earlier_hashes(out: Path, recipe: Recipe) -> list[str]:
    with claimed(out, recipe, grown=make_plan(recipe)) as earlier:
        return earlier


@pytest.mark.parametrize(
    "growth",
    [
        {"seeds": [7, 0]},
        {"architectures": ["llama", "gpt_neox"]},
        {"teachers.sizes": ["12k", "14k", "20k", "28k", "40k", "60k"]},
        {"students.sizes": ["8k", "9k", "11k"]},
        {"students.tokens": [2560, 5120], "corpus.max_epochs": 9},
        {"students.inits": ["pruned", "scratch"]},
        {"equal_flops": True},
        {"name": "other", "run": {"workers": 1}, "seeds": [0, 1]},
    ],
)
def test_more_of_the_same_continues(tiny_recipe, tmp_path, growth):
    recipe = parse_recipe(tiny_recipe)
    begin(tmp_path, recipe, baselines=True)
    before = sorted(tmp_path.rglob("*"))
    assert earlier_hashes(tmp_path, changed(tiny_recipe, growth)) == [recipe.hash()]
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == before
    # and the same recipe has grown out of none
    assert earlier_hashes(tmp_path, recipe) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seeds": [1]}, "seeds is [0] there and [1] here"),
        ({"training.alpha": 0.25}, "training.alpha is 0.5 there and 0.25 here"),
        ({"layers": 3}, "layers is null there and 3 here"),
        ({"corpus.window": 32}, "corpus.window is 16 there and 32 here"),
        ({"teachers.sizes": ["14k", "20k"]}, "teachers.sizes is [14000, 20000, 28000, 40000]"),
        ({"seeds": [0, 1], "scoring_tokens": 64}, "scoring_tokens is 512 there and 64 here"),
        # the first init has all budgets, the others may have fewer
        (
            {"students.inits": ["fixed", "pruned"], "students.control_tokens": [5120]},
            "-pruned-2p56k-seed0 would be no part of it",
        ),
        # the same name, three digits of it
        ({"teachers.sizes": [14_000, 20_010, 20_000, 28_000, 40_000]}, "is asked for twice"),
    ],
)
def test_the_key_that_differs_is_named(tiny_recipe, tmp_path, change, words):
    tiny_recipe["students"] |= {"tokens": [2560, 5120], "inits": ["pruned"]}
    begin(tmp_path, parse_recipe(tiny_recipe))
    with pytest.raises(UserError) as refused:
        earlier_hashes(tmp_path, changed(tiny_recipe, change))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_smaller_teacher_changes_students_with_the_same_start(tiny_recipe, tmp_path):
    tiny_recipe["students"]["inits"] = ["pruned", "fixed"]
    begin(tmp_path, parse_recipe(tiny_recipe))
    larger = changed(tiny_recipe, {"teachers.sizes": ["14k", "20k", "28k", "40k", "60k"]})
    assert earlier_hashes(tmp_path, larger)
    smaller = changed(tiny_recipe, {"teachers.sizes": ["12k", "14k", "20k", "28k", "40k"]})
    with pytest.raises(
        UserError,
        match=r"teachers.sizes is .* llama-s8k-t14k-fixed-2p56k-seed0 would be cut out of "
        r"llama-t12k-seed0, and no more out of llama-t14k-seed0",
    ):
        earlier_hashes(tmp_path, smaller)


@pytest.mark.parametrize("asked", ["best", "best_and_largest"])
def test_baselines_of_the_best_do_not_move(tiny_recipe, tmp_path, asked):
    tiny_recipe["baselines"] = asked
    begin(tmp_path, parse_recipe(tiny_recipe), baselines=True)
    for growth in ({"seeds": [0, 1]}, {"teachers.sizes": ["14k", "20k", "28k", "40k", "60k"]}):
        with pytest.raises(UserError, match="others may get the baselines"):
            earlier_hashes(tmp_path, changed(tiny_recipe, growth))
        assert earlier_hashes(tmp_path, changed(tiny_recipe, growth | {"baselines": "all"}))
    # other curves have baselines of their own
    assert earlier_hashes(tmp_path, changed(tiny_recipe, {"students.tokens": [2560, 5120]}))
    fewer = changed(tiny_recipe, {"baselines": "best"})
    if asked == "best":
        more = changed(tiny_recipe, {"baselines": "best_and_largest"})
        assert earlier_hashes(tmp_path, more)
    else:
        with pytest.raises(UserError, match="baselines"):
            earlier_hashes(tmp_path, fewer)


def test_before_there_are_baselines_the_best_may_move(tiny_recipe, tmp_path):
    tiny_recipe["baselines"] = "best"
    begin(tmp_path, parse_recipe(tiny_recipe))
    assert earlier_hashes(tmp_path, changed(tiny_recipe, {"seeds": [0, 1]}))


def test_growth_adds_up_and_goes_back(tiny_recipe, tmp_path):
    recipe, more = parse_recipe(tiny_recipe), changed(tiny_recipe, {"seeds": [0, 1]})
    begin(tmp_path, more)
    marker = json.loads((tmp_path / "sweep.json").read_text()) | {"grown_from": [recipe.hash()]}
    (tmp_path / "sweep.json").write_text(json.dumps(marker))
    assert earlier_hashes(tmp_path, more) == [recipe.hash()]
    most = changed(tiny_recipe, {"seeds": [0, 1, 2]})
    assert earlier_hashes(tmp_path, most) == [recipe.hash(), more.hash()]


def test_what_was_asked_for_but_never_run_may_go(tiny_recipe, tmp_path):
    recipe, more = parse_recipe(tiny_recipe), changed(tiny_recipe, {"seeds": [0, 1]})
    begin(tmp_path, recipe)
    marker = {"recipe": more.model_dump(mode="json"), "recipe_hash": more.hash()}
    (tmp_path / "sweep.json").write_text(json.dumps(marker))
    assert earlier_hashes(tmp_path, recipe) == [more.hash()]
    begin(tmp_path, changed(tiny_recipe, {"seeds": [1]}))
    (tmp_path / "sweep.json").write_text(json.dumps(marker))
    with pytest.raises(UserError, match=r"so that llama-t14k-seed1 would be no part of it"):
        earlier_hashes(tmp_path, recipe)


def test_a_secret_is_no_difference(tiny_recipe, tmp_path):
    """sweep.json has it as `***`."""
    tiny_recipe["corpus"]["source"] = "https://someone:first@example.org/text"
    recipe = parse_recipe(tiny_recipe)
    begin(tmp_path, recipe)
    marker = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps(scrub(marker)))
    other = changed(tiny_recipe, {"corpus.source": "https://someone:second@example.org/text"})
    assert earlier_hashes(tmp_path, other) == [recipe.hash()]


def test_a_sweep_that_grew_is_what_it_would_be_at_once(
    tiny_recipe, text_file, tmp_path, monkeypatch
):
    """A teacher, an init, a budget and a seed more: what is there stays, the rest is the same. So
    it is on a processor where `auto` would be another precision."""
    use_own_workers(monkeypatch)
    # of four reports
    monkeypatch.setattr("capgap.report.draw.write_picture", lambda picture, *paths: None)
    monkeypatch.setenv("CAPGAP_AUTO_PRECISION", "fp32")
    tiny_recipe["corpus"] |= {"source": str(text_file), "heldout_tokens": 500}
    tiny_recipe["teachers"] = {"sizes": ["14k"], "tokens": 768}
    tiny_recipe["students"] = {"sizes": ["8k"], "tokens": [512]}
    growth = {
        "teachers.sizes": ["14k", "20k"],
        "students.inits": ["pruned", "fixed"],
        "students.tokens": [512, 1024],
        "seeds": [0, 1],
    }
    less, more = parse_recipe(tiny_recipe), changed(tiny_recipe, growth)
    grown, at_once = tmp_path / "grown", tmp_path / "at_once"
    display = Display(str)
    runner.run_sweep(less, grown, display)
    before = {path: path.read_bytes() for path in grown.glob("records/*/record.json")}
    assert len(before) == 3
    results = []
    for out, auto in ((grown, "bf16"), (at_once, "fp32")):
        monkeypatch.setenv("CAPGAP_AUTO_PRECISION", auto)
        results.append(runner.run_sweep(more, out, display))
    assert {path: path.read_bytes() for path in before} == before
    records, expected = (
        {
            record.id: (record.heldout, record.curve, record.after_cut, record.flops)
            for record in read_records(out)
        }
        for out in (grown, at_once)
    )
    assert records == expected
    assert results[0]["verdict"] == results[1]["verdict"]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["best"] in (grown / "student" / "README.md").read_text()
    assert json.loads((grown / "sweep.json").read_text())["grown_from"] == [less.hash()]
    # and again nothing is left to do
    OwnWorkers.ran.clear()
    runner.run_sweep(more, grown, display)
    assert OwnWorkers.ran == []


def test_a_search_does_not_grow(tiny_recipe, tmp_path):
    """Its rounds would have been others, had there been more to choose from."""
    begin(tmp_path, parse_recipe(tiny_recipe))
    more = changed(tiny_recipe, {"seeds": [0, 1]})
    words = r"seeds is \[0\] there and \[0, 1\] here"
    with pytest.raises(UserError, match=words), claimed(tmp_path, more):
        pass
    (tmp_path / "search.json").write_text("{}")
    with pytest.raises(UserError, match=words):
        earlier_hashes(tmp_path, more)
