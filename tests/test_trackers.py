"""Trackers are told what metrics.jsonl has, go on where a run goes on, and never end a run."""

import json
import os
import sqlite3
import struct

import pytest

import processes
from capgap.machine import install_command
from capgap.models.build import build_model, save_model
from capgap.models.shape import ladder_shape
from capgap.train import trackers
from capgap.train.trackers import Tracker, Trackers, check_trackers
from talks import save_base, talks, write_lines

LINE = {
    "step": 0,
    "tokens": 256,
    "tokens_per_second": None,
    "utilisation": None,
    "students": {"small": {"loss": 3.0, "kl": None, "learning_rate": 0.01, "gradient_norm": 2.0}},
}
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(small_corpus, tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, size in (("teacher", 20_000), ("small", 8_000)):
        shape = ladder_shape("llama", size, vocabulary=300, positions=16)
        save_model(build_model(shape, seed=1), place / name, small_corpus.tokenizer)
    return place


def arguments(folder, corpus, out, *more):
    return (
        *("distill", folder / "teacher", folder / "small", "--corpus", corpus.directory),
        *("--window", 16, "--tokens", "2560", "--out", out, "--heldout-steps", 5),
        *(
            "-s",
            "training.batch_tokens=256",
            "-s",
            "run.checkpoint_seconds=0.001",
            "-s",
            "run.checkpoint_share=0.9",
            *more,
        ),
    )


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def scalars(folder):
    """Tag -> [(step, value)] of TensorBoard's event files, as its own reader has them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def assert_same(told, lines):
    """What a tracker has of every number is what metrics.jsonl has."""
    for key in ("loss", "ce", "kl", "learning_rate", "gradient_norm", "heldout"):
        wanted = [
            (line["step"], line["students"]["small"][key])
            for line in lines
            if line["students"]["small"].get(key) is not None
        ]
        assert [step for step, _ in told[f"small/{key}"]] == [step for step, _ in wanted], key
        for (_, value), (_, number) in zip(told[f"small/{key}"], wanted, strict=True):
            assert value == pytest.approx(number, rel=1e-6)


def test_tensorboard_has_every_step(typed, small_corpus, folder, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    done = typed(*arguments(folder, small_corpus, out, "--track", "tensorboard"))
    assert done.code == 0, done.err
    told = scalars(out / "trackers/tensorboard")
    assert_same(told, lines_of(out))
    assert [step for step, _ in told["tokens"]] == list(range(10))
    assert "tokens_per_second" in told


@pytest.mark.parametrize("stage", ["instruct", "prefer"])
def test_tuning_is_told_too(typed, tmp_path, stage):
    """Every number of every step."""
    pytest.importorskip("tensorboard")
    answers = [(one[0]["content"], one[1]["content"]) for one in talks()]
    lines = {
        "instruct": [list(pair) for pair in answers],
        "prefer": [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in answers],
    }
    data = write_lines(tmp_path / "data.jsonl", lines[stage])
    base, out = save_base(tmp_path / "base"), tmp_path / "run"
    more = ("--batch", 4, "--epochs", 2, "--device", "cpu", "--template", "minichat")
    words = (stage, base, "--data", data, "--out", out, *more, "--track", "tensorboard")
    done = typed(*words)
    assert done.code == 0, done.err
    told, lines = scalars(out / "trackers/tensorboard"), lines_of(out)
    assert [line["step"] for line in lines] == list(range(10))
    for key in set(lines[0]) - {"step"}:
        wanted = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines]
        assert told[key] == wanted, key
    unknown = typed(*words[:-1], "tensorbord", "--json")
    assert (unknown.code, unknown.err.count("\n")) == (2, 1)
    assert "did you mean tensorboard?" in unknown.err


@pytest.mark.parametrize("again", [3, 0])
def test_a_killed_run_goes_on_without_a_step_twice(tmp_path, again):
    """Steps 0 to 5, killed; the next process goes on from a checkpoint, or from the beginning."""
    pytest.importorskip("tensorboard")

    def process(steps, first, logged):
        one = Trackers(("tensorboard",), tmp_path, "run", {}, print)
        one.begin(first, logged)
        for step in steps:
            one.log(LINE | {"step": step, "tokens_per_second": 100.0 + first})
        one.close()

    process(range(6), 0, None)
    process(range(again, 8), again, 5)
    told = scalars(tmp_path / "tensorboard")["tokens_per_second"]
    first = [(step, 100.0) for step in range(again)]
    assert told == [*first, *((step, 100.0 + again) for step in range(again, 8))]


@pytest.mark.parametrize("first", [3, 0])
def test_steps_that_were_told_are_not_told_again(tmp_path, monkeypatch, first):
    """And the run that was told of them goes on, also where it begins again."""
    found, runs = [], []

    def opened(run):
        runs.append(run)
        return Tracker(lambda values, step: found.append(step), lambda: found.append("closed"))

    monkeypatch.setitem(trackers.OPENERS, "wandb", opened)
    one = Trackers(("wandb", "wandb"), tmp_path, "run", {}, print)
    one.begin(first, 5)
    for step in range(first, 8):
        one.log(LINE | {"step": step})
    one.close()
    assert found == [6, 7, "closed"]
    assert [run.continues for run in runs] == [True]
    # killed before it came as far as the process before
    for steps, logged in ((range(first, 5), 7), (range(first, 9), 4)):
        one = Trackers(("wandb",), tmp_path, "run", {}, print)
        one.begin(first, logged)
        for step in steps:
            one.log(LINE | {"step": step})
    assert found == [6, 7, "closed", 8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_it_works_without_a_network_and_tells_no_secret(small_corpus, folder, tmp_path, name):
    """In a process of its own, since both read their environment once."""
    pytest.importorskip(name)
    out = tmp_path / "run"
    shape = ladder_shape("llama", 8_000, vocabulary=300, positions=16)
    # a token that somebody wrote into a name
    place = tmp_path / SECRET
    save_model(build_model(shape, seed=1), place / "small", small_corpus.tokenizer)
    words = [str(one) for one in arguments(folder, small_corpus, out, "--track", name, "--json")]
    words[2] = str(place / "small")
    values = {"WANDB_MODE": "offline", "WANDB_API_KEY": "k" * 40, "HF_TOKEN": SECRET}
    environment = os.environ | values | {"WANDB_CACHE_DIR": str(tmp_path / "cache")}
    done = processes.run(*words, env=environment)
    assert done.returncode == 0, done.stderr
    # but of the student, which reads better than its teacher
    told = [line for line in done.stderr.splitlines() if "than its teacher" not in line]
    assert not [line for line in told if "warning" in line]
    assert json.loads(done.stdout)["finished"]  # nothing else on standard output
    told = {"trackio": trackio_rows, "wandb": wandb_rows}[name](out)
    assert_same(told, lines_of(out))
    for path in out.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
            assert b"k" * 40 not in path.read_bytes(), path
    assert "***/small" in (out / "distill.json").read_text()


def trackio_rows(out):
    (database,) = (out / "trackers/trackio").glob("*.db")
    found: dict = {}
    with sqlite3.connect(database) as opened:
        columns = "run_name, step, metrics"
        for run, step, text in opened.execute(f"select {columns} from metrics order by step"):
            assert run == "run"
            for key, value in json.loads(text).items():
                found.setdefault(key, []).append((step, value))
    opened.close()
    return found


def wandb_rows(out):
    from wandb.proto import wandb_internal_pb2

    (path,) = (out / "trackers/wandb").glob("wandb/offline-run-*/run-*.wandb")
    found: dict = {}
    for data in log_records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        row = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for key, value in row.items():
            found.setdefault(key, []).append((row["_step"], value))
    return found


def log_records(data):
    """What wandb keeps in LevelDB's log format: blocks of 32 KiB, behind 7 bytes of its own;
    records of checksum (4), length (2) and kind (1: whole, 2 to 4: first, middle and last part)."""
    place, parts = 7, []
    while place < len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []


def test_a_tracker_that_fails_ends_alone(typed, small_corpus, folder, tmp_path, monkeypatch):
    def log(values, step):
        if step == 3:
            raise ConnectionError(f"no way to https://me:{SECRET}@tracker.example\nmore")

    def close():
        raise AssertionError("it has failed before")

    monkeypatch.setitem(trackers.OPENERS, "tensorboard", lambda run: Tracker(log, close))
    out = tmp_path / "run"
    done = typed(*arguments(folder, small_corpus, out, "--track", "tensorboard"))
    assert done.code == 0, done.err
    assert done.err.count("warning: tensorboard failed") == 1
    assert "training goes on without it" in done.err
    assert SECRET not in done.err
    assert len(lines_of(out)) == 10


def test_a_tracker_changes_nothing_of_the_run(typed, small_corpus, folder, tmp_path):
    pytest.importorskip("tensorboard")
    for name, more in (("plain", ()), ("told", ("--track", "tensorboard"))):
        done = typed(*arguments(folder, small_corpus, tmp_path / name, *more))
        assert done.code == 0, done.err
    first, second = (
        (tmp_path / name / "students/small/model.safetensors").read_bytes()
        for name in ("plain", "told")
    )
    assert first == second


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tensorbord", "did you mean tensorboard?"),
        ("mlflow", "take tensorboard, trackio, wandb"),
    ],
)
def test_unknown_trackers_are_one_line(typed, small_corpus, folder, tmp_path, name, told):
    done = typed(*arguments(folder, small_corpus, tmp_path / "run", "--track", name))
    assert done.code == 2
    assert told in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_is_not_installed_is_said_before_any_work(
    typed, small_corpus, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    done = typed(*arguments(folder, small_corpus, tmp_path / "run", "--track", "trackio"))
    assert done.code == 2
    assert install_command("trackio") in done.err
    assert not (tmp_path / "run").exists()


def test_wandb_needs_a_key_or_to_be_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(Exception, match="run `wandb login`, or set WANDB_MODE=offline"):
        check_trackers(("wandb",))
    netrc.write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_trackers(("wandb",))
    netrc.unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(("wandb",))
