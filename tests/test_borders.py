"""What machines and users bring that is none of this program's business: one line, exit code 2."""

import os

import pytest

import processes
from capgap.cli import _at_home
from capgap.errors import UserError, border, first_line
from capgap.machine import TORCHRUN, forget_leftovers, started
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape
from capgap.models.stored import read_config
from capgap.sizes import parse_count


@pytest.fixture
def folder(tmp_path, small_corpus):
    path = tmp_path / "model"
    shape = ladder_shape("llama", 20_000, vocabulary=300, positions=32)
    save_model(build_model(shape, seed=0), path, small_corpus.tokenizer)
    return path


def one_line(found, told):
    assert (found.code, found.err.count("\n")) == (2, 1), found.err
    assert told in found.err


@pytest.mark.parametrize(
    "left",
    [{"WORLD_SIZE": "4"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": ""}, {"RANK": "1"}],
)
def test_variables_that_torchrun_did_not_set_are_forgotten(monkeypatch, left):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert started() == (0, 1)
    forget_leftovers()
    assert not set(TORCHRUN) & set(os.environ)


def test_torchruns_own_variables_count_together(monkeypatch):
    told = dict(zip(TORCHRUN, ("1", "2", "1", "localhost", "29500"), strict=True))
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert started() == (1, 2)
    forget_leftovers()
    assert os.environ["RANK"] == "1"
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK=2 and WORLD_SIZE=2"):
        started()


def test_home_within_quotes(monkeypatch, folder):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert _at_home("~/model") == str(folder)
    assert _at_home("--out=~/model") == f"--out={folder}"
    assert [_at_home(word) for word in ("~", "a ~/b", "~user/x", "--set", "x=~/b")] == [
        "~", "a ~/b", "~user/x", "--set", "x=~/b"
    ]  # fmt: skip
    # from a recipe
    assert read_config("~/model").model_type == "llama"


def test_half_a_character_is_told_with_its_place(typed, folder, tmp_path):
    one_line(typed("sample", folder, "caf\udce9", "--tokens", 2), "character 3")
    talks = ('{"messages": [{"role": "user", "content": "Q%s"}, '
             '{"role": "assistant", "content": "A."}]}')  # fmt: skip
    data = tmp_path / "talks.jsonl"
    data.write_text("\n".join([*(talks % number for number in range(5)), talks % "\\ud83d"]))
    asked = ("instruct", folder, "--data", data, "--out", tmp_path / "out")
    one_line(typed(*asked), "line 6 holds half of a character")


@pytest.mark.parametrize("rate", ["nan", "-1", "inf", "0"])
def test_rates_are_above_zero_and_finite(typed, folder, small_corpus, tmp_path, rate):
    asked = ("train", folder, "--corpus", small_corpus.directory, "--window", 16, "--tokens", "4k")
    asked += ("-s", "training.batch_tokens=1024", "--out", tmp_path / "out")
    one_line(
        typed(*asked, "--learning-rate", rate),
        f"--learning-rate '{rate}': Input should be 'auto' or",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["distill", "train"])
def test_a_window_of_nothing(typed, folder, small_corpus, tmp_path, command):
    models = (folder, folder) if command == "distill" else (folder,)
    asked = (command, *models, "--corpus", small_corpus.directory, "--window", 0, "--tokens", "4k")
    one_line(
        typed(*asked, "--out", tmp_path / "out"),
        "--window '0': Input should be greater than or equal to 8",
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = " + "[" * 5000 + "]" * 5000, "is not valid TOML"),
        ("seeds = [" + "9" * 5000 + "]", "is not valid TOML"),
    ],
)
def test_odd_recipes(typed, tmp_path, text, told):
    path = tmp_path / "odd.toml"
    path.write_text(text)
    for command in ("sweep", "run"):
        one_line(typed(command, path, "--dry-run"), told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("corpus.vocabulary=1000000000", "less than or equal to"),
        (f"seeds={list(range(3000))}", "give fewer seeds (3,000)"),
    ],
)
def test_recipes_that_nobody_can_run(typed, override, told):
    one_line(typed("sweep", "quickstart", "--dry-run", "-s", override), told)


def test_pipes_are_not_waited_for(typed, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    one_line(typed("fit", tmp_path / "pipe"), "is no file")
    one_line(typed("sweep", tmp_path / "pipe", "--dry-run"), "is no file")


def test_counts_have_an_end():
    assert parse_count("1000000T") == 10**18
    with pytest.raises(UserError, match="is no count"):
        parse_count("99999999999999999999999999k")


def test_a_terminal_without_a_character_gets_its_escape(folder):
    code = (
        "import sys; from capgap.cli import main; sys.stdout.reconfigure(encoding='ascii'); main()"
    )
    done = processes.run_code(code, "sample", folder, "caf\u00e9", "--tokens", "1")
    assert done.returncode == 0, done.stderr
    assert "caf\\xe9" in done.stdout


def test_what_other_libraries_raise_is_one_line():
    for error, told in (
        (KeyError("a"), "there is no 'a'"),
        (TypeError("Outer:\n  the cause\nmore"), "the cause"),
        (RuntimeError(), "RuntimeError"),
    ):
        assert first_line(error) == told
        with pytest.raises(UserError, match=f"^reading it: {told}$"), border("reading it"):
            raise error
    with pytest.raises(MemoryError), border("reading it"):
        raise MemoryError
    with pytest.raises(UserError, match=r"^ours$"), border("reading it"):
        raise UserError("ours")
