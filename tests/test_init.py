"""`capgap init` and `recommend --write`: what they write is read by the commands that come next."""

import json
import sys

import pytest

from capgap.config import load_any_recipe
from capgap.pipeline.recipe import RunRecipe
from capgap.sweep.recipe import Recipe

ONE = {"text": "texts/", "teachers": "Qwen2.5-1.5B", "students": "300M", "tokens": "5B"}
SEVERAL = ONE | {
    "teachers": "EleutherAI/pythia-160m, EleutherAI/pythia-410m",
    "students": "30M,60M",
}


def options(answers: dict[str, str]) -> list[str]:
    return [word for name, value in answers.items() for word in (f"--{name}", value)]


def test_one_teacher_is_a_run(typed, tmp_path):
    out = tmp_path / "mine.toml"
    found = json.loads(typed("init", out, *options(ONE), "--gpus", "8xA100", "--json").out)
    assert found["next"] == [f"capgap plan {out}", f"capgap run {out} --dry-run"]
    recipe = load_any_recipe(out)
    assert isinstance(recipe, RunRecipe)
    assert (recipe.teacher.model, recipe.prune.params) == ("Qwen2.5-1.5B", 300_000_000)
    assert (recipe.distill.tokens, recipe.hardware.gpus) == (5 * 10**9, "8xA100")
    assert recipe.corpus[0].source == "texts/"
    planned = typed("plan", out)
    assert planned.code == 0, planned.err


def test_several_teachers_are_a_sweep(typed, tmp_path):
    out = tmp_path / "grid.toml"
    answer = typed("init", out, *options(SEVERAL))
    assert answer.code == 0, answer.err
    assert f"next: capgap sweep {out} --dry-run" in answer.out
    recipe = load_any_recipe(out)
    assert isinstance(recipe, Recipe)
    assert recipe.teachers.models == ("EleutherAI/pythia-160m", "EleutherAI/pythia-410m")
    assert recipe.students.sizes == (30_000_000, 60_000_000)
    assert recipe.students.tokens == (1_250_000_000, 5_000_000_000)


def test_all_parameters_may_be_meant(typed, tmp_path):
    typed("init", tmp_path / "mine.toml", *options(ONE | {"students": "300M total"}))
    cut = load_any_recipe(tmp_path / "mine.toml").prune
    assert (cut.params, cut.total_params) == (None, 300_000_000)


def test_in_a_terminal_it_asks(typed, tmp_path, monkeypatch):
    asked = []

    answers = {"Teachers": ONE["teachers"], "Sizes": ONE["students"], "Tokens": ONE["tokens"]}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        "builtins.input",
        lambda question: asked.append(question) or answers.get(question.split()[0].strip(","), ""),
    )
    found = typed("init", tmp_path / "mine.toml")
    assert found.code == 0, found.err
    assert len(asked) == 5
    assert load_any_recipe(tmp_path / "mine.toml").corpus[0].source == "stdlib"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"teachers": ""}, "--teachers is needed"),
        ({"students": "3Q"}, "'3Q' is no count"),
        ({"tokens": "many"}, "'many' is no count"),
        ({"tokens": "100"}, "distill.tokens"),
        ({"gpus": "8xP100"}, "8xP100"),
    ],
)
def test_answers_that_make_no_recipe(typed, tmp_path, change, line):
    answer = typed("init", tmp_path / "mine.toml", *options(ONE | change))
    assert (answer.code, answer.out) == (2, "")
    assert line in answer.err
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(typed, tmp_path):
    (tmp_path / "mine.toml").write_text("mine")
    assert "exists" in typed("init", tmp_path / "mine.toml", *options(ONE)).err
    assert (tmp_path / "mine.toml").read_text() == "mine"


def test_advice_writes_the_recipe_of_the_run(typed, tmp_path):
    out = tmp_path / "mine.toml"
    asked = ["recommend", "--student", "300M", "--tokens", "5B", "--family", "qwen2.5"]
    told = typed(*asked).out
    assert "next: capgap init mine.toml" in told
    found = json.loads(typed(*asked, "--gpus", "H100", "--write", out, "--json").out)
    assert found["next"] == f"capgap plan {out}"
    recipe = load_any_recipe(out)
    assert recipe.teacher.model == found["take"]
    assert recipe.hardware.gpus == "H100"
    assert typed("plan", out).code == 0
    assert "exists" in typed(*asked, "--write", out).err
