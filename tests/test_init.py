"""`capgap init` and `recommend --write`: what they write is read by the commands that come next."""

import json
import sys
from pathlib import Path

import pytest
import typer

import capgap
from capgap.cli import app, commands
from capgap.config import load_any_recipe
from capgap.law.published import find_model
from capgap.pipeline.recipe import RunRecipe
from capgap.stage import Stage
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
    answer = typed("init", out, *options(ONE), "--gpus", "8xA100")
    assert answer.out == f"written: {out}\nnext: capgap plan {out}\n"
    recipe = load_any_recipe(out)
    assert isinstance(recipe, RunRecipe)
    assert (recipe.teacher.model, recipe.prune.params) == ("Qwen2.5-1.5B", 300_000_000)
    assert (recipe.distill.tokens, recipe.hardware.gpus) == (5 * 10**9, "8xA100")
    assert recipe.corpus[0].source == "texts/"
    planned = typed("plan", out)
    assert planned.code == 0, planned.err
    assert planned.out.endswith(f"\nnext: capgap run {out}\n")


def test_several_teachers_are_a_sweep(typed, tmp_path):
    out = tmp_path / "grid.toml"
    assert json.loads(typed("init", out, *options(SEVERAL), "--json").out) == {"recipe": str(out)}
    recipe = load_any_recipe(out)
    assert isinstance(recipe, Recipe)
    assert recipe.teachers.models == ("EleutherAI/pythia-160m", "EleutherAI/pythia-410m")
    assert recipe.students.sizes == (30_000_000, 60_000_000)
    assert recipe.students.tokens == (1_250_000_000, 5_000_000_000)


def test_all_parameters_may_be_meant(typed, tmp_path):
    typed("init", tmp_path / "mine.toml", *options(ONE | {"students": "300M total"}))
    cut = load_any_recipe(tmp_path / "mine.toml").prune
    assert cut.params == "300000000 total"


def test_in_a_terminal_it_asks(typed, tmp_path, monkeypatch):
    asked = []

    answers = {name: ONE[name] for name in ("teachers", "students", "tokens")}
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        "builtins.input",
        lambda question: asked.append(question) or answers.get(question.split()[0], ""),
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
    assert "next: capgap init mine.toml --text TEXT --teachers Qwen2.5-" in told
    found = json.loads(typed(*asked, "--gpus", "H100", "--write", out, "--json").out)
    recipe = load_any_recipe(out)
    assert recipe.teacher.model == found["take"]
    assert recipe.hardware.gpus == "H100"
    assert typed("plan", out).code == 0
    assert "exists" in typed(*asked, "--write", out).err


FOUND = {
    "kind": "run",
    "written": True,
    "take": "Phi-4",
    "folder": "made",
    "chat_template": True,
    "sources": [{"folder": "made/corpus"}],
    "after": {"student": {"folder": "made/students/student", "failure": None}},
    "steps": {"export": {"status": "done"}, "instruct": {"status": "done"}},
}


def stages() -> list[Stage]:
    out = Path("out")
    corpus = ("corpus=0.5", "other=0.5")
    loop = {"corpus": corpus, "tokens": "1M", "out": out}
    return [
        capgap.Prepare(source="text", tokenizer="teacher", out=out),
        capgap.Score(teacher="teacher", corpus="corpus", out=out),
        capgap.Prune(teacher="teacher", scores="scores", keep=0.5, out=out),
        capgap.Cache(teacher="teacher", corpus=corpus, out=out),
        capgap.Distill(teacher="teacher", students=("student",), **loop),
        capgap.Train(models=("student",), **loop),
        capgap.Adapt(model="model", new="texts", tokens="1M", pieces=10, out=out),
        capgap.Evaluate(model="model", tasks=("heldout",), corpus=("corpus",)),
        capgap.Instruct(model="model", data="talks.jsonl", out=out),
        capgap.Prefer(model="model", data="pairs.jsonl", out=out),
        capgap.Export(model="model", out=out),
        capgap.Quickstart(),
        capgap.Sweep(recipe="laptop", dry_run=True),
        capgap.Search(recipe="laptop"),
        commands.Fit(source="cells.csv"),
        commands.Plan(recipe="laptop"),
        commands.Run(recipe="minima-tiny"),
        commands.Recommend(student="300M", tokens="5B", family="phi4", gpus="H100"),
        commands.Init(out=out),
    ]


@pytest.mark.parametrize("stage", stages(), ids=lambda stage: stage.title())
def test_what_comes_next_is_a_command(stage):
    """Of which every option is one, and none that it needs is missing."""
    words = [str(word) for word in stage.after(FOUND)]
    parameters = {one.name: one for one in typer.main.get_command(app).commands[words[0]].params}
    needed = {name for name, one in parameters.items() if one.required}
    known = {option: name for name, one in parameters.items() for option in one.opts}
    given = {known[word] for word in words if word.startswith("--")}
    arguments = {name for name, one in parameters.items() if one.param_type_name == "argument"}
    assert needed <= given | arguments
    assert len(words) > 1


def test_a_dry_run_leads_to_the_same_command():
    """With its overrides and its folder."""
    how = {"out": Path("mine"), "set": ("seeds=[1]",), "dry_run": True}
    words = ("laptop", "--set", "seeds=[1]", "--out", "mine")
    assert capgap.Sweep(recipe="laptop", **how).after({}) == ("sweep", *words)
    asked = commands.Run(recipe="minima-tiny", from_="prune", **how)
    assert asked.after({}) == ("run", "minima-tiny", *words[1:], "--from", "prune")


def test_a_student_may_be_named(typed, tmp_path):
    out = tmp_path / "mine.toml"
    asked = ["recommend", "--student", "Qwen2.5-0.5B", "--tokens", "5B", "--family", "qwen2.5"]
    assert typed(*asked, "--write", out).code == 0
    assert load_any_recipe(out).prune.params == find_model("Qwen2.5-0.5B").non_embedding


def test_without_a_teacher_to_take_nothing_is_written(typed, tmp_path):
    out = tmp_path / "mine.toml"
    asked = ["recommend", "--student", "9B", "--tokens", "5B", "--family", "llama3.2"]
    answer = typed(*asked, "--write", out)
    assert f"{out} is not written: no teacher is to be taken" in answer.out
    assert not out.exists()
