"""Every command as it is typed: what goes to standard output, to standard error, which code."""

import errno
import importlib.metadata
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from capgap.config import (
    find_recipe,
    load_any_recipe,
    load_recipe,
    parse_recipe,
    shipped_recipes,
)
from capgap.corpus.text import Text
from capgap.errors import WorkerDied
from capgap.law.law import read_law
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape
from capgap.report.sentences import sentences
from capgap.sweep import preview, progress, runner
from capgap.sweep.plan import make_plan
from capgap.sweep.recipe import Recipe
from capgap.sweep.schedule import EndMessage, Speed, StepMessage
from capgap.sweep.stages import PARTS
from report_data import Plan, write_output

COMMANDS = ("quickstart", "sweep", "report", "corpus", "sample")
SWEEPS = [
    name for name, path in shipped_recipes().items() if isinstance(load_any_recipe(path), Recipe)
]
HEAVY = ("torch", "transformers", "numpy", "pandas", "altair", "datasets", "vl_convert")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model_folder(small_corpus: Text, tmp_path: Path) -> Path:
    shape = ladder_shape("llama", 14_000, vocabulary=300, positions=16)
    save_model(build_model(shape, seed=0), tmp_path / "model", small_corpus.tokenizer)
    return tmp_path / "model"


# --- help ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["--version"], []])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import json, sys
from capgap.cli import main
sys.argv = ["capgap", *{arguments!r}]
try:
    main()
except SystemExit:
    pass
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr) == []


def test_alone_it_says_what_it_can_do(typed):
    alone, asked = typed(), typed("--help")
    assert alone.out.strip() == asked.out.strip()
    assert alone.err == asked.err == ""
    for command in COMMANDS:
        assert command in asked.out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(typed, command):
    answer = typed(command, "--help")
    assert (answer.code, answer.err) == (0, "")
    # a flag has no value
    assert "<bool>" not in answer.out
    assert "--json" in answer.out


def test_version_is_that_of_the_package(typed):
    assert typed("--version").out.strip() == importlib.metadata.version("capgap")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["swep"], ["'swep'", "'sweep'"]),
        (["sweep"], ["Missing argument", "recipe"]),
        (["quickstart", "--dryrun"], ["--dryrun", "--dry-run"]),
        (["corpus", "text.txt"], ["--out"]),
        (["sample", "model", "text", "--tokens", "many"], ["--tokens"]),
        (["--dry-run", "quickstart"], ["--dry-run"]),
    ],
)
def test_a_wrong_usage_is_told_with_what_was_meant(typed, here, arguments, words):
    answer = typed(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err
    assert list(here.iterdir()) == []


# --- dry run ------------------------------------------------------------------------------------


PREVIEW_KEYS = {"name", "recipe_hash", "teachers", "cells", "baselines", "runs", "flops"}
PREVIEW_KEYS |= {"workers", "gpus_per_column", "device", "teacher_dtype", "expected_seconds"}
RUN_KEYS = {"id", "kind", "parameters", "shape", "tokens", "learning_rate", "flops"}
RUN_KEYS |= {"expected_seconds"}


def dry_run_keys_are_there(found):
    assert set(found) == PREVIEW_KEYS
    for run in found["runs"]:
        assert set(run) == RUN_KEYS
        assert list(run["flops"]) == list(PARTS)


def test_quickstart_dry_run_measures_and_writes_nothing(typed, here):
    answer = typed("quickstart", "--dry-run", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    dry_run_keys_are_there(found)
    assert found["name"] == "quickstart"
    # at least 5 teachers for 3 students, in minutes on this very machine
    assert found["teachers"] >= 5
    # cut with few and many tokens, and with the same start
    assert found["cells"] == 3 * 3 * found["teachers"]
    assert found["expected_seconds"] > 0
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("name", SWEEPS)
def test_every_shipped_sweep_goes_through_a_dry_run(typed, here, monkeypatch, name):
    monkeypatch.setattr(preview, "measure_speed", lambda *shapes, **options: Speed(1e-6, 1e9))
    answer = typed("sweep", name, "--dry-run", "--json", "--set", "run.workers=1")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    dry_run_keys_are_there(found)
    assert found["recipe_hash"] == load_recipe(find_recipe(name)).hash()
    kinds = [run["kind"] for run in found["runs"]]
    counts = {"teacher": "teachers", "cell": "cells", "baseline": "baselines"}
    assert {kind: kinds.count(kind) for kind in counts} == {
        kind: found[key] for kind, key in counts.items()
    }
    assert len({run["id"] for run in found["runs"]}) == len(kinds)
    # one worker: training alone takes the FLOPs of it at the speed that was measured
    work = found["flops"]["teacher_training"] + found["flops"]["student"]
    assert found["expected_seconds"] > work / 1e9
    assert list(here.iterdir()) == []


def test_dry_run_for_a_person_shows_every_run_whole(typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(preview, "measure_speed", lambda *shapes, **options: Speed(1e-6, 1e9))
    answer = typed("quickstart", "--dry-run")
    runs = json.loads(typed("quickstart", "--dry-run", "--json").out)["runs"]
    for run in runs:
        (line,) = [line for line in answer.out.splitlines() if line.split()[:1] == [run["id"]]]
        assert str(run["shape"]["hidden"]) in line.split()
    assert answer.err == ""


def test_a_folder_called_like_a_recipe_does_not_hide_it(typed, here, monkeypatch):
    (here / "quickstart").mkdir()
    monkeypatch.setattr(preview, "measure_speed", lambda *shapes, **options: Speed(1e-6, 1e9))
    assert typed("quickstart", "--dry-run", "--out", "quickstart").code == 0


# --- sweep: how it ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "folder", "quiet"),
    [
        (["quickstart"], "runs/quickstart", False),
        (["sweep", "quickstart", "-q"], "runs/quickstart", True),
        (["sweep", "-q", "--out", "x", "quickstart"], "x", True),
    ],
)
def test_where_a_sweep_goes(typed, monkeypatch, arguments, folder, quiet):
    asked = []

    def run_sweep(recipe, out, shown, should_stop, on):
        asked.append((recipe.name, out, shown.is_live))
        shown.say("at work")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_sweep", run_sweep)
    answer = typed(*arguments)
    assert answer.code == 130
    assert asked == [("quickstart", Path(folder), False)]
    assert ("at work" in answer.err) != quiet


def interrupted(*_, **__):
    raise KeyboardInterrupt


def terminated(*_):
    os.kill(os.getpid(), signal.SIGTERM)


def worker_died(*_):
    raise WorkerDied("the worker process at llama-t1M-seed0 ended with code -9")


def disk_full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/report.html")


def copy_failed(*_):
    # as shutil.copytree tells it: no number, words alone
    raise OSError([("a", "b", "[Errno 28] No space left on device: 'b'")])


def forbidden(*_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/sweep.json")


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (interrupted, 130, "stopped; what is done is kept in runs/x, the same command continues"),
        (terminated, 143, "stopped; what is done is kept in runs/x, the same command continues"),
        (worker_died, 1, "the worker process at llama-t1M-seed0 ended with code -9"),
        (disk_full, 2, "no disk space left"),
        (copy_failed, 2, "no disk space left"),
        (forbidden, 2, "runs/sweep.json: Permission denied"),
    ],
)
def test_how_a_sweep_ends_is_one_line_and_a_code(typed, here, monkeypatch, end, code, words):
    (here / "runs/x").mkdir(parents=True)
    monkeypatch.setattr(runner, "run_sweep", end)
    answer = typed("quickstart", "--out", "runs/x")
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith(f"capgap: {words}")
    assert answer.err.count("\n") == 1


def test_a_command_that_leaves_no_folder_is_stopped_in_one_line(typed, monkeypatch):
    monkeypatch.setattr("capgap.plan", interrupted)
    answer = typed("plan", "minima-3b")
    assert (answer.code, answer.out, answer.err) == (
        130,
        "",
        "capgap: stopped; nothing was written\n",
    )


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(errno.EBADF, "bug")])
def test_our_own_mistakes_keep_their_traceback(monkeypatch, typed, error):
    def broken(*_):
        raise error

    monkeypatch.setattr(runner, "run_sweep", broken)
    with pytest.raises(type(error), match="bug"):
        typed("quickstart")


# --- report, corpus, sample ---------------------------------------------------------------------


def test_report_says_the_verdict_and_where_the_page_is(typed, tmp_path):
    out = write_output(tmp_path / "o", Plan(students=(40_000,), law=False, samples=False))
    answer = typed("report", out, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert sorted(found) == ["law", "report", "verdict"]
    assert sentences(read_law(found["law"])) == found["verdict"]
    assert Path(found["report"]).read_text().startswith("<!")

    person = typed("report", out)
    assert (person.code, person.err) == (0, "")
    *said, place = person.out.splitlines()
    assert said == found["verdict"]
    assert place == f"report: {found['report']}"


def test_corpus_answers_with_one_object(typed, text_file, tmp_path):
    command = ["corpus", text_file, "--out", tmp_path / "c", "--vocabulary", "300", "--json"]
    answer = typed(*command)
    assert answer.code == 0
    assert answer.err.startswith("300 documents of 1 files (1 *.txt); held out: ")
    found = json.loads(answer.out)
    identity = {"corpus_hash", "tokenizer_hash"}
    assert set(found) == {"folder", "train_tokens", "vocabulary", "manifest"} | identity
    manifest = json.loads(Path(found["manifest"]).read_text())
    assert found["train_tokens"] == manifest["train"]["tokens"]
    assert found["vocabulary"] == 300
    made = Path(found["manifest"]).stat().st_mtime_ns
    assert json.loads(typed(*command).out) == found
    assert Path(found["manifest"]).stat().st_mtime_ns == made
    assert "vocabulary 300" in typed(*command[:-1]).out
    other = typed(*command[:-2], "310")
    assert other.code == 2
    assert "/c holds another corpus (vocabulary is 310, was 300): choose" in other.err
    assert len(other.err.splitlines()) == 1
    assert Path(found["manifest"]).stat().st_mtime_ns == made


def test_corpus_tells_its_progress_on_standard_error(typed, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("capgap.stages.corpus.paced", lambda say: lambda text: say(text()))
    loud = typed("corpus", text_file, "--out", tmp_path / "a", "--vocabulary", "300", "--json")
    json.loads(loud.out)
    assert "corpus, read" in loud.err
    assert "corpus, tokenize" in loud.err
    quiet = typed("corpus", text_file, "--out", tmp_path / "b", "--vocabulary", "300", "--quiet")
    assert (quiet.code, quiet.err) == (0, "")


def test_corpus_stopped_by_the_user_leaves_nothing(typed, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("capgap.stages.corpus.corpus_progress", lambda say: interrupted)
    assert typed("corpus", text_file, "--out", tmp_path / "c").code == 130
    assert list(tmp_path.iterdir()) == []


def test_progress_keeps_brackets_of_names(capsys):
    """`data/[ab]*.txt` is a glob, not markup."""
    for quiet in (False, True):
        progress.make_display(Console(stderr=True), quiet=quiet).say("the corpus data/[ab]*.txt")
    assert capsys.readouterr().err == "the corpus data/[ab]*.txt\n"


def test_bars_on_a_terminal_say_what_runs_and_how_far_it_is(tiny_recipe):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=200, color_system=None)
    display = progress.make_display(console, quiet=False)
    teacher, *_ = make_plan(parse_recipe(tiny_recipe)).teachers
    with display:
        display.expect([teacher], [])
        display.started(teacher, "worker 1")
        display.step(StepMessage(teacher.id, teacher.tokens // 2, 1000.0, 3.5))
        display.bars.refresh()
        assert display.share == pytest.approx(0.5)
        display.ended(teacher, EndMessage(teacher.id, "done", "a warning", busy=61.0))
    shown = screen.getvalue()
    assert f"teacher {teacher.id}" in shown
    assert "2.56k of 5.12k tokens, 1,000 tokens/s, loss 3.500" in shown
    assert re.search(r"0 of 1 tasks, 0:\d\d so far, about --:-- to go", shown)
    assert "a warning" in shown
    assert f"done teacher {teacher.id} in 1:01" in shown


def test_sample_continues_a_text(typed, model_folder):
    command = ["sample", model_folder, "Kaba lo", "--tokens", "6"]
    answer = typed(*command, "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert sorted(found) == ["model", "prompt", "text"]
    assert found["model"] == str(model_folder)
    assert found["prompt"] == "Kaba lo"
    person = typed(*command)
    assert (person.out, person.err) == (f"Kaba lo{found['text']}\n", "")
    assert json.loads(typed(*command, "--seed", "1", "--json").out)["text"] != found["text"]
    greedy = [typed(*command, "--temperature", "0", "--seed", seed).out for seed in (0, 1)]
    assert greedy[0] == greedy[1]


def test_sample_begins_a_document_without_a_text(typed, model_folder):
    answer = typed("sample", model_folder, "--tokens", "3", "--json")
    assert json.loads(answer.out)["prompt"] == ""


@pytest.mark.parametrize(
    "words",
    [
        ("distill", "./nowhere", "student", "--corpus", "corpus", "--tokens", "1M", "--out", "o"),
        ("score", "./nowhere", "--corpus", "corpus", "--out", "s"),
        ("train", "--size", "8k", "--corpus", "nowhere", "--tokens", "1M", "--out", "o"),
        ("train", "--size", "8k", "--corpus", "./nowhere.txt", "--tokens", "1M", "--out", "o"),
        ("prune", "./nowhere", "--scores", "s", "--keep", "0.5", "--out", "p"),
        ("evaluate", "./nowhere"),
        ("export", "./nowhere", "--out", "e"),
        ("sample", "./nowhere", "hello"),
        ("chat", "./nowhere", "--once", "hello"),
        ("instruct", "./nowhere", "--data", "x", "--out", "o"),
        ("sweep", "nowhere"),
        ("run", "nowhere"),
        ("fit", "nowhere.csv"),
        ("report", "nowhere"),
    ],
)
def test_a_wrong_path_is_told_before_anything_heavy_is_loaded(words, tmp_path):
    """torch and pandas take seconds."""
    code = (
        "import sys\n"
        "from capgap.cli import main\n"
        f"sys.argv = ['capgap', *{words!r}]\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print(sorted({'torch', 'pandas', 'transformers'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "[]\n"
    assert not list(tmp_path.iterdir())
