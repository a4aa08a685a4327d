"""The commands `cache` and `distill` as a user types them, on models of seconds."""

import itertools
import json
import re
import shlex
import signal

import numpy as np
import pytest
import torch

import processes
from capgap.distill.teacher import Batch, OnlineTeacher, load_teacher
from capgap.errors import Interrupted
from capgap.law.table import load_cells
from capgap.models.build import build_model, load_model, save_model
from capgap.models.shape import ladder_shape
from capgap.stages.distill import Train
from conftest import part_of_library, wait_for_steps
from test_docs import DOCS, code_blocks


@pytest.fixture(scope="module")
def folder(small_corpus, tmp_path_factory):
    """A teacher with a padded table, two students and one of another tokenizer."""
    place = tmp_path_factory.mktemp("models")
    for name, size, words in (
        ("teacher", 20_000, 320),
        ("small", 8_000, 300),
        ("large", 11_000, 300),
    ):
        shape = ladder_shape("llama", size, vocabulary=words, positions=16)
        save_model(build_model(shape, seed=1), place / name, small_corpus.tokenizer)
    return place


def distill(typed, folder, corpus, out, *more, students=("small",), tokens="16k"):
    return typed(
        "distill",
        folder / "teacher",
        *(folder / name for name in students),
        *("--corpus", corpus.directory, "--window", 16, "--tokens", tokens, "--out", out),
        *("-s", "training.batch_tokens=256", *more),
    )


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_students_learn_online_and_from_a_cache_alike(typed, small_corpus, folder, tmp_path):
    online = distill(
        typed,
        folder,
        small_corpus,
        tmp_path / "online",
        *("--json", "--heldout-steps", 25),
        students=("small", "large"),
    )
    assert online.code == 0, online.err
    cached = typed(
        *("cache", folder / "teacher", small_corpus.directory, "--window", 16),
        *("--out", tmp_path / "cache", "--json"),
    )
    assert cached.code == 0, cached.err
    assert json.loads(cached.out)["complete"]
    second = distill(
        typed,
        folder,
        small_corpus,
        tmp_path / "cached",
        *("--cache", tmp_path / "cache", "--json"),
        students=("small", "large"),
    )
    assert second.code == 0, second.err
    first, second = json.loads(online.out), json.loads(second.out)
    for name in ("small", "large"):
        before, after = first["before"][name]["loss"], first["after"][name]["heldout"]["loss"]
        assert after < before - 0.5
        assert second["after"][name]["heldout"]["loss"] == pytest.approx(after, rel=5e-3)
        assert load_model(first["after"][name]["folder"]).config.vocab_size == 300
    assert second["flops"] < first["flops"]
    steps = lines_of(tmp_path / "online")
    assert [line["step"] for line in steps] == list(range(62))
    assert steps[0]["tokens_per_second"] is None
    assert all(line["tokens_per_second"] > 0 and line["utilisation"] > 0 for line in steps[1:])
    assert steps[-1]["students"]["small"]["kl"] > 0
    told = [line["step"] for line in steps if "heldout" in line["students"]["small"]]
    assert told == [24, 49, 61]
    best = first["best"]
    means = {
        line["step"] + 1: sum(one["heldout"] for one in line["students"].values()) / 2
        for line in steps
        if line["step"] in told
    }
    assert best["step"] == min(means, key=means.get)
    for name, one in best["students"].items():
        found = steps[best["step"] - 1]["students"][name]["heldout"]
        assert one["heldout"]["loss"] == pytest.approx(found, rel=1e-6)
        assert load_model(one["folder"]).config.vocab_size == 300
    assert second["best"] is None
    last = first["after"]["large"]["heldout"]["loss"]
    assert steps[-1]["students"]["large"]["heldout"] == last
    # the same command again has nothing to do
    again = distill(
        typed,
        folder,
        small_corpus,
        tmp_path / "online",
        *("--heldout-steps", 25),
        students=("small", "large"),
    )
    assert again.code == 0
    assert len(lines_of(tmp_path / "online")) == 62


def test_distillations_from_two_teachers_are_cells(typed, small_corpus, folder, tmp_path):
    small = folder / "small"
    asked = ("--corpus", small_corpus.directory, "--window", 16, "--tokens", "4k")
    for command, name in (("distill", "teacher"), ("distill", "large"), ("train", "")):
        models = (folder / name, small) if name else (small,)
        out = ("--out", tmp_path / "runs" / (name or "alone"), "-s", "training.batch_tokens=256")
        done = typed(command, *models, *asked, *out)
        assert done.code == 0, done.err
    cells = load_cells(tmp_path / "runs")
    assert list(cells.frame["init"]) == ["fixed", "fixed"]
    assert cells.frame["teacher_size"].is_monotonic_increasing
    record = json.loads((tmp_path / "runs" / "teacher" / "distill.json").read_text())
    assert cells.losses[1] == pytest.approx(record["after"]["small"]["heldout"]["loss"])
    assert np.isfinite(cells.baselines).all()
    assert np.isfinite(cells.teachers).all()


def test_text_is_prepared_on_the_way_and_found_again(typed, text_file, folder, tmp_path):
    def run(command, *models, out="run", text=text_file, more=()):
        return typed(
            *(command, *models, "--corpus", text, "--window", 16, "--tokens", "2k"),
            *("--out", tmp_path / out, "-s", "training.batch_tokens=256", *more),
        )

    first = run("distill", folder / "teacher", folder / "small")
    assert first.code == 0, first.err
    corpus = tmp_path / "run" / "corpus"
    line = f"tokens of {text_file} by the tokenizer of {folder / 'teacher'}, in {corpus}"
    assert first.err.count(line) == 1
    record = json.loads((tmp_path / "run" / "distill.json").read_text())
    assert record["sources"][0]["folder"] == str(corpus)
    assert f"--corpus {corpus} --window 16" in first.out
    made = (corpus / "manifest.json").stat().st_mtime_ns
    again = run("distill", folder / "teacher", folder / "small")
    assert (again.code, again.out) == (0, first.out)
    assert (corpus / "manifest.json").stat().st_mtime_ns == made
    # a prepared folder is taken as it is, and gives the same
    second = run("distill", folder / "teacher", folder / "small", out="second", text=corpus)
    assert second.code == 0, second.err
    assert not (tmp_path / "second" / "corpus").exists()
    other = json.loads((tmp_path / "second" / "distill.json").read_text())
    assert other["after"]["small"]["heldout"] == record["after"]["small"]["heldout"]
    # two texts, one of them prepared; the tokenizer is the first model's
    mixed = run("train", folder / "small", "--corpus", corpus, out="mixed")
    assert mixed.code == 0, mixed.err
    assert f"by the tokenizer of {folder / 'small'}, in {tmp_path / 'mixed' / 'corpus-2'}" in (
        mixed.err
    )
    # a new model alone has no tokenizer yet
    alone = run("train", "--size", "20k", out="alone")
    assert alone.code == 0, alone.err
    assert "by a new tokenizer" in alone.err
    # read as `capgap corpus` would
    few = run("train", folder / "small", out="few", more=("--max-documents", 5))
    assert few.code == 0, few.err
    manifest = json.loads((tmp_path / "few" / "corpus" / "manifest.json").read_text())
    assert manifest["documents"]["read"] == 5
    # a folder of something else is left alone
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").touch()
    refused = run("train", folder / "small", out="else")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "holds something else" in refused.err
    assert [one.name for one in (tmp_path / "else").iterdir()] == ["thesis.tex"]


def test_a_student_that_should_be_the_teacher(typed, small_corpus, folder, tmp_path):
    def run(command, *models, out):
        return typed(
            *(command, *models, "--corpus", small_corpus.directory, "--window", 16),
            *("--tokens", "4k", "--out", tmp_path / out, "-s", "training.batch_tokens=256"),
        )

    for name in ("large", "small"):
        done = run("train", folder / name, out=name)
        assert done.code == 0, done.err
    large, small = (tmp_path / name / "models" / name for name in ("large", "small"))
    known = json.loads((tmp_path / "large" / "train.json").read_text())
    loss = known["after"]["large"]["heldout"]["loss"]
    untrained = json.loads((tmp_path / "small" / "train.json").read_text())["before"]["small"]

    swapped = run("distill", folder / "small", large, out="run")
    assert (swapped.code, swapped.out) == (2, "")
    (line,) = [line for line in swapped.err.splitlines() if line.startswith("capgap: ")]
    assert "large is larger and better than its teacher" in line
    assert f"held-out loss {loss:.4f} and {untrained['loss']:.4f})" in line
    assert f"`capgap distill {large} {folder / 'small'}`" in line
    # nothing was trained, and the right request takes the same folder
    right = run("distill", large, folder / "small", out="run")
    assert right.code == 0, right.err
    assert "than its teacher" not in right.err
    assert right.out.splitlines()[0] == f"teacher: held-out loss {loss:.4f}, {large}"

    larger = run("distill", small, folder / "large", out="larger")
    assert larger.code == 0, larger.err
    losses = [
        known["before"]["large"]["loss"],
        json.loads((tmp_path / "larger" / "distill.json").read_text())["teacher"]["heldout"][
            "loss"
        ],
    ]
    told = f"held-out loss {losses[0]:.4f} and {losses[1]:.4f})"
    assert "warning: large is larger than its teacher (11" in larger.err
    assert told in larger.err

    better = run("distill", folder / "teacher", small, out="better")
    assert better.code == 0, better.err
    assert "warning: small reads the held-out text better than its teacher" in better.err


def start_distilling(folder, corpus, out, *more):
    """A process with 234 steps to go."""
    return processes.Started(
        *("distill", folder / "teacher", folder / "small"),
        *("--corpus", corpus.directory, "--window", "16", "--tokens", "60k"),
        *("--out", out, "-s", "training.batch_tokens=256", *more),
    )


@pytest.fixture(scope="module")
def uninterrupted(small_corpus, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start_distilling(folder, small_corpus, out)
    _, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    return load_model(out / "students" / "small").state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_and_continued_equals_uninterrupted(
    small_corpus, folder, uninterrupted, tmp_path, number
):
    # a kill leaves what was written before
    often = ("-s", "run.checkpoint_seconds=0.1", "-s", "run.checkpoint_share=0.9")
    stopped = start_distilling(folder, small_corpus, tmp_path / "stopped", *often)
    wait_for_steps(tmp_path / "stopped", 20)
    stopped.send_signal(number)
    _, told = stopped.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert stopped.returncode == 128 + number
        assert "the same command continues" in told
    assert not (tmp_path / "stopped" / "students").exists()
    again = start_distilling(folder, small_corpus, tmp_path / "stopped", *often)
    _, told = again.communicate(timeout=240)
    assert again.returncode == 0, told
    found = load_model(tmp_path / "stopped" / "students" / "small").state_dict()
    for name, value in uninterrupted.items():
        assert torch.equal(value, found[name])
    lines = lines_of(tmp_path / "stopped")
    assert [line["step"] for line in lines] == list(range(234))
    # it did not begin anew: a process does not know how long its first step took
    first = [line["step"] for line in lines if line["tokens_per_second"] is None]
    assert first[-1] > 0


def test_a_student_that_its_last_step_spoils_has_failed(typed, small_corpus, folder, tmp_path):
    found = distill(
        *(typed, folder, small_corpus, tmp_path / "out", "--learning-rate", "1e38", "--json"),
        *("--heldout-steps", 1),
        tokens="256",
    )
    assert found.code == 1
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert record["finished"]
    assert "non-finite held-out loss" in record["after"]["small"]["failure"]["message"]
    assert record["after"]["small"]["heldout"] is None


def test_mistakes_are_one_line(typed, small_corpus, folder, tmp_path):
    other = typed(
        *("cache", folder / "small", small_corpus.directory, "--window", 16),
        *("--out", tmp_path / "other", "-q"),
    )
    assert other.code == 0, other.err
    out = tmp_path / "out"
    wrong = {
        "another teacher": distill(typed, folder, small_corpus, out, "--cache", tmp_path / "other"),
        "is not a multiple of window": distill(
            typed, folder, small_corpus, out, "-s", "training.batch_tokens=250"
        ),
        "did you mean 'alpha'": distill(typed, folder, small_corpus, out, "-s", "training.alpa=1"),
        "is less than one batch": distill(typed, folder, small_corpus, out, tokens="100"),
        "'<|pad|>' is no token": distill(
            typed, folder, small_corpus, out, "-s", 'training.ignored_tokens=["<|pad|>"]'
        ),
        "--heldout-steps '0' is no count": distill(
            typed, folder, small_corpus, out, "--heldout-steps", 0
        ),
        "two students have one name": distill(
            typed, folder, small_corpus, out, students=("small", "small")
        ),
        "no prepared corpus": typed(
            *("cache", folder / "teacher", folder, "--out", tmp_path / "new", "--window", 16)
        ),
        "reads at most 16 tokens": typed(
            *("cache", folder / "teacher", small_corpus.directory, "--out", tmp_path / "new")
        ),
        "--part '3/2'": typed(
            *("cache", folder / "teacher", small_corpus.directory, "--window", 16),
            *("--out", tmp_path / "new", "--part", "3/2"),
        ),
        "top-k 300 is not less": typed(
            *("cache", folder / "teacher", small_corpus.directory, "--window", 16),
            *("--out", tmp_path / "new", "--top-k", 300),
        ),
    }
    for words, answer in wrong.items():
        assert answer.code == 2, (words, answer.err)
        assert words in answer.err
        assert answer.err.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_an_offloaded_teacher_says_the_same(folder):
    windows = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    plain = load_teacher(folder / "teacher", "cpu")
    away = load_teacher(folder / "teacher", "cpu", offload=True)
    layer = next(iter(away.parts.backbone.layers))
    assert all(parameter.is_meta for parameter in layer.parameters())
    batch = Batch(windows)
    for one, other in ((plain, away), (away, plain)):
        assert torch.equal(one.signal(batch, 300).hidden, other.signal(batch, 300).hidden)


def test_a_teacher_computes_in_its_own_dtype_under_the_students_autocast(folder):
    windows = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(0))
    teacher = load_teacher(folder / "teacher", "cpu")
    expected = OnlineTeacher(load_model(folder / "teacher")).signal(Batch(windows), 300)
    with torch.autocast("cpu", torch.bfloat16):
        found = teacher.signal(Batch(windows), 300)
    assert torch.equal(found.hidden, expected.hidden)
    assert found.dtype is None
    assert load_teacher(folder / "teacher", "cpu", dtype="bf16").dtype == "bfloat16"


def test_the_commands_of_the_page_run(typed, tmp_path, monkeypatch):
    """Those of docs/distillation.md, on a third of its text and a tenth of its tokens."""
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks((DOCS / "distillation.md").read_text(), "sh")
    (teacher,) = re.findall("^TEACHER=(.*)$", block, re.MULTILINE)
    library = part_of_library(tmp_path / "library", "asyncio")
    block = block.replace("$TEACHER", teacher).replace("$LIB", str(library))
    commands = [shlex.split(line) for line in block.splitlines() if line.startswith("capgap")]
    assert len(commands) == 9
    for words in commands:
        done = typed(*(re.sub(r"^(\d\d)0k$", r"\1k", word) for word in words[1:]))
        assert done.code == 0, done.err
    assert sorted(path.name for path in (tmp_path / "cached/students").iterdir()) == [
        "fifth",
        "half",
    ]
    assert any((tmp_path / "run/trackers/tensorboard").iterdir())


def test_what_auto_became_holds_on_another_machine(small_corpus, folder, tmp_path, monkeypatch):
    settings = {"training": {"batch_tokens": 256}, "running": {"checkpoint_seconds": 0}}

    def run(name, stops=()):
        asked = {"corpus": small_corpus.directory, "tokens": 2048, "window": 16}
        stage = Train(models=[str(folder / "small")], out=tmp_path / name, **asked, **settings)
        return stage.run(should_stop=itertools.chain(stops, itertools.repeat(False)).__next__)

    monkeypatch.setenv("CAPGAP_AUTO_PRECISION", "bf16")
    whole = run("whole")
    with pytest.raises(Interrupted):
        run("moved", [False, False, True])
    monkeypatch.setenv("CAPGAP_AUTO_PRECISION", "fp32")
    moved = run("moved")
    assert moved["resolved"] == {"precision": "bf16", "teacher_dtype": "stored"}
    assert moved["after"]["small"]["heldout"] == whole["after"]["small"]["heldout"]
    assert run("other")["after"]["small"]["heldout"] != whole["after"]["small"]["heldout"]
