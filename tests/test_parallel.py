"""Several processes train as one does: the same weights, losses and failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import processes
import ranks as trial
from capgap.models.build import build_model, load_model, save_model
from capgap.models.parallel import ALONE
from capgap.models.shape import ladder_shape
from conftest import wait_for_steps

LOW = "bf16_gathered"


def torchrun(count, *command):
    """The launcher itself; what it starts otherwise is started by tests/processes.py."""
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "torch.distributed.run"),
            *("--standalone", "--nproc-per-node", str(count)),
            *("-m", "capgap", *map(str, command)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started_by_a_run(count, *command):
    """As `capgap run` starts a step."""
    return subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-m", "capgap.pipeline.processes", str(count)),
            *map(str, command),
        ],
        env=os.environ | {"PYTHONWARNINGS": "error"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(count, asked):
    """What the trial printed."""
    if count == 1:
        return trial.run(asked, ALONE)
    done = processes.run_ranks(count, json.dumps(asked), main=trial.main)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def corpus(small_corpus):
    return str(small_corpus.directory)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """One process with one micro-batch."""
    out = tmp_path_factory.mktemp("alone") / "weights"
    return trial.run({"corpus": corpus, "out": str(out)}, ALONE), load_file(out)


def assert_equal(found, out, alone):
    expected, weights = alone
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, weights[name], rtol=1e-9, atol=1e-11, msg=name)
    for name, curve in expected["curves"].items():
        for column, values in curve.items():
            assert found["curves"][name][column] == pytest.approx(values, rel=1e-9), column
    for mine, its in zip(found["heldout"][::-1], expected["heldout"][::-1], strict=False):
        assert mine == pytest.approx(its, rel=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_ranks_with_two_micro_batches_equal_one_with_four(
    corpus, alone, tmp_path, checkpointing
):
    one = run(1, {"corpus": corpus, "out": str(tmp_path / "one"), "micro": 2})
    assert_equal(one, tmp_path / "one", alone)
    asked = {"corpus": corpus, "out": str(tmp_path / "two"), "micro": 2}
    two = run(2, asked | {"checkpointing": checkpointing})
    assert len(two["heldout"]) == 3
    assert_equal(two, tmp_path / "two", alone)


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory):
    """The checkpoints of two ranks that were stopped in the middle."""
    folder = tmp_path_factory.mktemp("stopped")
    asked = {"corpus": corpus, "out": str(folder / "weights"), "stop_after": 5}
    found = run(2, asked | {"checkpoints": str(folder / "checkpoints")})
    assert found["stopped"]
    assert found["steps"] == 5
    return folder / "checkpoints"


@pytest.mark.parametrize("count", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_with_others(corpus, alone, stopped, tmp_path, count):
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(stopped, checkpoints)
    asked = {"corpus": corpus, "out": str(tmp_path / "weights")}
    found = run(count, asked | {"checkpoints": str(checkpoints)})
    assert not found["stopped"]
    assert len(found["heldout"]) == 2
    assert_equal(found, tmp_path / "weights", alone)


def test_two_copies_of_two_ranks_each_stopped_go_on_as_two_ranks(corpus, alone, tmp_path):
    """HSDP, whose checkpoint others read as any."""
    asked = {"corpus": corpus, "out": str(tmp_path / "weights"), "shard_size": 2, "micro": 1}
    checkpoints = {"checkpoints": str(tmp_path / "checkpoints")}
    assert_equal(run(4, asked), tmp_path / "weights", alone)
    assert run(4, asked | checkpoints | {"stop_after": 5})["stopped"]
    for more in ({"shard_size": 2}, {"shard_size": None}):
        found = run(2 if more["shard_size"] is None else 4, asked | checkpoints | more)
        assert_equal(found, tmp_path / "weights", alone)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(corpus, alone, tmp_path):
    asked = {"corpus": corpus, "out": str(tmp_path / "weights"), "spoil": True}
    found = run(2, asked)
    failure = found["failures"]["llama"]
    assert failure["step"] == 0
    assert failure["message"].endswith("on rank 1")
    indices = trial.batch_indices(
        seed=5, step=0, batch_windows=8, num_windows=alone_windows(corpus)
    )
    assert failure["windows"] == indices[4:].tolist()
    # the other student went on as if nothing had been
    assert found["failures"]["gpt2"] is None
    for name, value in load_file(tmp_path / "weights").items():
        if name.startswith("gpt2"):
            torch.testing.assert_close(value, alone[1][name], rtol=1e-9, atol=1e-11)


def alone_windows(corpus):
    return trial.Text.open([(corpus, None)], trial.WINDOW).windows


@pytest.fixture(scope="module")
def models(small_corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, size in (("teacher", 20_000), ("student", 8_000)):
        shape = ladder_shape("llama", size, vocabulary=300, positions=16)
        save_model(build_model(shape, seed=1), folder / name, small_corpus.tokenizer)
    return folder


def distill(models, corpus, out, *more):
    return (
        *("distill", models / "teacher", models / "student", "--corpus", corpus),
        *("--window", 16, "--out", out, "-s", "training.batch_tokens=256", *more),
    )


def test_the_command_stopped_under_torchrun_goes_on_alone(models, corpus, tmp_path):
    measured = ("--heldout-steps", 40, "-s", "training.precision=fp32")
    command = distill(models, corpus, tmp_path / "out", "--tokens", "60k", *measured)
    started = torchrun(2, *command)
    wait_for_steps(tmp_path / "out", 20)
    started.send_signal(signal.SIGTERM)
    _, told = started.communicate(timeout=120)
    assert told.count("the same command continues") == 1
    assert started.returncode != 0
    metrics = tmp_path / "out" / "metrics.jsonl"
    before = len(metrics.read_text().splitlines())
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))
    again = processes.run(*command)
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(234))
    whole = distill(models, corpus, tmp_path / "whole", "--tokens", "60k", *measured)
    done = processes.run_ranks(2, *whole)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"held-out loss [\d.]+ -> ", done.stdout)) == 1
    assert 20 <= before < 234
    one, other = (
        load_model(tmp_path / name / "students" / "student").state_dict()
        for name in ("out", "whole")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_autocast_does_the_same_to_sharded_weights(models, corpus, tmp_path):
    """Held-out loss before and after, and the step's in between."""
    found = {}
    for name, count, precision in (("one", 1, "bf16"), ("two", 2, "bf16"), ("low", 2, LOW)):
        more = ("--tokens", "2k", "-s", f"training.precision={precision}", "--learning-rate", 1e-3)
        done = processes.run_ranks(count, *distill(models, corpus, tmp_path / name, *more))
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "distill.json").read_text())
    one, two = found["one"], found["two"]
    assert (one["processes"], two["processes"]) == (1, 2)
    before, after = (
        [record[when]["student"] for record in (one, two)] for when in ("before", "after")
    )
    assert before[1]["loss"] == pytest.approx(before[0]["loss"], rel=1e-6)
    losses = [record["heldout"]["loss"] for record in after]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0] < before[0]["loss"]
    # weights that are exchanged in bf16 make held-out losses of bf16, and nearly the same students
    low = found["low"]
    assert low["resolved"]["precision"] == LOW
    for when in ("before", "after"):
        loss, its = (
            record[when]["student"]["heldout"] if when == "after" else record[when]["student"]
            for record in (low, two)
        )
        assert loss["loss"] != its["loss"]
        assert loss["loss"] == pytest.approx(its["loss"], rel=2e-3)
    alone = processes.run(*distill(models, corpus, tmp_path / "alone", *more))
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)
    assert "training.precision 'bf16_gathered', but one process alone: use bf16" in alone.stderr


def uneven(models, corpus, out):
    """15 windows a batch."""
    return distill(models, corpus, out, "--tokens", "10k", "-s", "training.batch_tokens=240")


def test_mistakes_are_told_once(models, corpus, tmp_path):
    wrong = torchrun(2, *uneven(models, corpus, tmp_path / "out"))
    _, told = wrong.communicate(timeout=120)
    assert wrong.returncode == 1  # torchrun's own
    ours = [line for line in told.splitlines() if line.startswith("capgap:")]
    assert ours == [
        "capgap: a batch of 15 windows cannot be shared evenly by 2 processes: change "
        "training.batch_tokens or --nproc-per-node"
    ]
    assert "exitcode  : 2" in told
    assert not (tmp_path / "out").exists()


def test_a_run_s_processes_end_with_the_exit_code_of_a_mistake(models, corpus, tmp_path):
    wrong = started_by_a_run(2, *uneven(models, corpus, tmp_path / "out"))
    _, told = wrong.communicate(timeout=120)
    assert wrong.returncode == 2
    assert told.startswith("capgap: a batch of 15 windows cannot be shared evenly by 2 processes")
    assert told.count("\n") == 1


def test_a_run_s_processes_save_their_state_when_they_are_stopped(models, corpus, tmp_path):
    out = tmp_path / "out"
    command = distill(models, corpus, out, "--tokens", "60k")
    first = started_by_a_run(2, *command)
    wait_for_steps(out, 20)
    first.send_signal(signal.SIGINT)
    _, told = first.communicate(timeout=120)
    assert first.returncode == 130
    assert told.count("the same command continues") == 1
    assert "Traceback" not in told
    assert list((out / "checkpoints").glob("step-*"))
    again = processes.run_ranks(2, *command)
    assert again.returncode == 0, again.stderr
    record = json.loads((out / "distill.json").read_text())
    assert (record["finished"], record["processes"]) == (True, 2)
