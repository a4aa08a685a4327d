"""All stages of minima-tiny in a shorter cut: from text to a model that answers."""

import json
import re
import shlex
from pathlib import Path

import pytest

import processes
from conftest import made_up_text

ROOT = Path(__file__).parent.parent
SEPARATOR = "<|endoftext|>"
# its own steps are tested elsewhere; here they have to fit together
SHORT = (
    "teacher.size=12k",
    "teacher.vocabulary=300",
    "teacher.tokens=8192",
    "adapt.pieces=20",
    "adapt.tokens=4096",
    "score.tokens=2048",
    "prune.keep=0.687",
    "distill.tokens=4096",
    "instruct.epochs=1",
    "prefer.epochs=1",
)


def run(folder, *more):
    first, second = (folder / f"{name}.txt" for name in ("first", "second"))
    texts = [
        f'teacher.source="{first}"',
        f'adapt.source="{second}"',
        f'adapt.old="{first}"',
        f'corpus=[{{name="first", source="{first}", weight=0.7}}, '
        f'{{name="second", source="{second}", weight=0.3}}]',
    ]
    changes = [part for one in (*SHORT, *texts) for part in ("--set", one)]
    arguments = ["run", "minima-tiny", "--out", str(folder / "out"), *changes, *more]
    return processes.run(*arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    for seed, name in enumerate(("first", "second")):
        text = made_up_text(400, seed=seed)
        # another language: the same grammar in other letters
        if seed == 1:
            text = SEPARATOR.join(
                one.translate(str.maketrans("abdfikl", "äßðøïқł")) for one in text.split(SEPARATOR)
            )
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder, run(folder, "--json")


def test_all_stages_run(finished):
    folder, process = finished
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert "Warning" not in process.stderr
    steps = json.loads(process.stdout)["steps"]
    assert {step["status"] for step in steps.values()} == {"done"}
    assert list(steps)[-1] == "export"
    for name in ("teacher", "adapt", "prune", "distill", "evaluate", "instruct", "prefer"):
        assert steps[name]["result"], name
    assert "bits per byte" in steps["adapt"]["result"]
    assert json.loads((folder / "out" / "run.json").read_text())["steps"] == steps


def test_the_same_command_has_nothing_to_do(finished):
    folder, _ = finished
    again = run(folder)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done before") == again.stderr.count("[") == 13
    assert again.stdout.splitlines()[-2:] == [
        f"run: {folder / 'out'}",
        f"next: capgap chat {folder / 'out/model'}",
    ]


def test_processes_share_the_training(finished, tmp_path):
    folder, _ = finished
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    shared = run(tmp_path, "--until", "teacher", "--set", "hardware.processes=2")
    assert shared.returncode == 0, shared.stderr
    assert "OMP_NUM_THREADS" not in shared.stderr
    one, two = (
        json.loads((place / "out/teacher/training/train.json").read_text())
        for place in (folder, tmp_path)
    )
    assert (one["processes"], two["processes"]) == (1, 2)
    losses = [record["after"]["llama-12k"]["heldout"]["loss"] for record in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_change_concerns_what_rests_on_it(finished):
    folder, _ = finished
    told = run(folder, "--dry-run", "--json", "--set", "prefer.beta=0.3")
    steps = {one["step"]: one for one in json.loads(told.stdout)["steps"]}
    assert [name for name, one in steps.items() if one["state"] == "run"] == [
        "prefer",
        "evaluate-final",
        "export",
    ]
    assert steps["prefer"]["why"] == "beta is 0.3, was 0.1"


def test_what_comes_out_loads_and_tells_its_story(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    # 300 tokens of the teacher and 20 of the adaptation, in a table of whole 64s
    assert model.config.vocab_size == 320
    assert tokenizer.chat_template is not None
    card = (folder / "out" / "model" / "README.md").read_text()
    assert "minima-tiny" in card
    assert "adaptation of the teacher: 20 new pieces" in card
    assert str(folder) not in card
    assert (folder / "out" / "model.gguf").exists()


def test_the_model_answers(finished, typed):
    folder, _ = finished
    asked = ("chat", str(folder / "out" / "model"), "--once", "What is json for?", "--tokens", "8")
    found = typed(*asked, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["tokens"] <= 8


def page_commands(page, number):
    """Command lines of a block of a page, as lists of words."""
    text = (ROOT / "docs" / page).read_text()
    block = re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[number]
    lines = [line.removeprefix("$ ") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("capgap ")]


def test_the_commands_of_the_pruning_page_run(finished, typed, monkeypatch):
    folder, _ = finished
    monkeypatch.chdir(folder)
    # a teacher so small has few cuts and reads little
    names = {"texts/": "first.txt", "TEACHER": "out/adapt/model", "0.4": "0.687"}
    commands = page_commands("pruning.md", 0)
    assert [words[0] for words in commands] == ["corpus", "score", "prune"]
    for words in commands:
        short = ["--window", "128"] if words[0] == "score" else []
        done = typed(*(names.get(word, word) for word in words), *short)
        assert done.code == 0, done.err
    assert (folder / "student" / "pruning.json").exists()


def test_the_commands_of_the_pipeline_page_run(typed):
    (words,) = page_commands("pipeline.md", 0)
    assert words[:2] == ["run", "minima-tiny"]
    done = typed(*words)
    assert done.code == 0, done.err
    assert "prune: would run" in done.out
