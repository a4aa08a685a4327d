"""A sweep whose columns are shared by several processes is that of one process a column."""

import json
import signal
import subprocess
import sys
import time

import pytest

from capgap.errors import Interrupted
from capgap.records import read_records
from capgap.sweep.stages import Column, Sweep
from processes import kill_alone
from test_bad_input import as_toml, use_own_workers


@pytest.fixture
def data(tiny_recipe, text_file):
    tiny_recipe["corpus"] |= {"source": str(text_file), "heldout_tokens": 500}
    tiny_recipe["teachers"] = {"sizes": ["14k", "20k"], "tokens": 768}
    inits = ["pruned", "fixed", "chain"]
    tiny_recipe["students"] = {"sizes": ["8k"], "tokens": [2048], "inits": inits}
    tiny_recipe["training"] |= {"precision": "fp32"}
    tiny_recipe["run"] = {"workers": 1, "device": "cpu"}
    return tiny_recipe


def written(data, path, **run):
    path.write_text(as_toml(data | {"run": data["run"] | run}))
    return path


def begin(recipe, out, *more):
    """The sweep as a process of its own, and its log."""
    log = out.with_name(f"{out.name}.log")
    command = [sys.executable, "-W", "error", "-m", "capgap", "sweep", recipe, "--out", out, *more]
    with log.open("w") as told:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told), log


def results(out):
    return {one.id: (one.heldout, one.curve, one.after_cut) for one in read_records(out)}


def test_two_processes_a_column_equal_one(data, tmp_path, monkeypatch):
    shared, log = begin(written(data, tmp_path / "two.toml", gpus_per_column=2), tmp_path / "two")
    use_own_workers(monkeypatch)
    Sweep(recipe=str(written(data, tmp_path / "one.toml")), out=tmp_path / "one").run()
    assert shared.wait(timeout=300) == 0, log.read_text()
    one, two = (read_records(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 6
    for alone, together in zip(one, two, strict=True):
        assert alone.id == together.id
        assert together.flops == alone.flops
        assert together.heldout.loss == pytest.approx(alone.heldout.loss, rel=1e-4), alone.id
        for name in ("ce", "gradient_norm"):
            values = getattr(alone.curve, name)
            assert getattr(together.curve, name) == pytest.approx(values, rel=1e-3), alone.id
        if alone.after_cut is not None:
            assert together.after_cut.loss == pytest.approx(alone.after_cut.loss, rel=1e-4)


def test_killed_and_stopped_it_goes_on_to_the_same_bits(data, tmp_path):
    data["teachers"]["tokens"] = 12_800
    data["students"] |= {"tokens": [51_200], "inits": ["pruned"]}
    often = {"gpus_per_column": 2, "checkpoint_seconds": 0.1, "checkpoint_share": 0.9}
    recipe = written(data | {"baselines": "best"}, tmp_path / "two.toml", **often)
    out = tmp_path / "out"

    def steps():
        return {path.parent for path in out.glob("work/checkpoints/column-*/*/manifest.json")}

    def half_done(process, log):
        deadline, before = time.monotonic() + 200, steps()
        while not steps() - before:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    killed, log = begin(recipe, out)
    half_done(killed, log)
    kill_alone(killed)
    stopped, log = begin(recipe, out)
    half_done(stopped, log)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(timeout=120) == 143, log.read_text()
    assert "stopping: every worker saves its state" in log.read_text()
    assert "the same command continues" in log.read_text()
    assert steps()
    whole, log = begin(recipe, tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, log.read_text()
    again, log = begin(recipe, out)
    assert again.wait(timeout=300) == 0, log.read_text()
    assert results(out) == results(tmp_path / "whole")


def test_a_task_by_itself_is_shared_and_stops(data, tmp_path):
    data["teachers"]["tokens"] = 12_800
    recipe, out = written(data, tmp_path / "two.toml", gpus_per_column=2), tmp_path / "out"
    column = Column(recipe=str(recipe), task="llama-t14k-seed0", out=out)

    def is_at_work():
        return bool(list(out.glob("work/leases/*/1")))

    with pytest.raises(Interrupted):
        column.run(should_stop=is_at_work)
    assert not (out / "records").exists()
    assert column.run()["state"] == "done"
    assert (out / "work" / "importance" / "llama-t14k-seed0.safetensors").exists()


def test_what_cannot_be_shared_is_refused(data, typed, tmp_path):
    for run, told in (
        ({"gpus_per_column": 3}, "run.gpus_per_column 3 does not divide a batch of 16 windows"),
        ({"shard_size": 3}, "run.shard_size 3 does not divide run.gpus_per_column 1"),
        (
            {"gpus_per_column": 4, "shard_size": 3},
            "run.shard_size 3 does not divide run.gpus_per_column 4",
        ),
        (
            {"gpus_per_column": 2, "teacher_device": "cpu"},
            "run.gpus_per_column share the teacher too: no run.teacher_device",
        ),
    ):
        answer = typed("sweep", written(data, tmp_path / "x.toml", **run), "--out", tmp_path / "x")
        assert (answer.code, answer.err.count("\n")) == (2, 1)
        assert told in answer.err
    gathered = ("--set", "training.precision=bf16_gathered")
    answer = typed("sweep", written(data, tmp_path / "x.toml"), *gathered, "--out", tmp_path / "x")
    assert "'bf16_gathered' needs run.gpus_per_column above 1: use bf16" in answer.err
    two = written(data, tmp_path / "two.toml", gpus_per_column=2)
    refused = typed("plan", two, "--gpus", "1xA100")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "run.gpus_per_column=2: ask for no more GPUs than 1, all here" in refused.err
    assert "each of 2 GPUs a column, 2 at once: " in typed("plan", two, "--gpus", "5xA100").out
    one = typed("plan", written(data, tmp_path / "one.toml"), "--gpus", "5xA100", "--json").out
    shared = json.loads(typed("plan", two, "--gpus", "5xA100", "--json").out)
    assert shared["memory"]["weights"] == json.loads(one)["memory"]["weights"] // 2
