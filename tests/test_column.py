"""A sweep whose tasks run one by one, each by itself, is the sweep."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from capgap.artifact import locked, read_json, write_json
from capgap.config import load_recipe
from capgap.errors import Interrupted, UserError
from capgap.records import read_records
from capgap.sweep.plan import plan_of
from capgap.sweep.runner import context_of
from capgap.sweep.stages import Column, Sweep
from test_bad_input import OwnWorkers, as_toml, use_own_workers


@pytest.fixture
def recipe(tiny_recipe, text_file, tmp_path):
    tiny_recipe["corpus"] |= {"source": str(text_file), "heldout_tokens": 500}
    tiny_recipe["teachers"] = {"sizes": ["14k", "20k"], "tokens": 768}
    tiny_recipe["students"] = {"sizes": ["8k"], "tokens": [1024], "inits": ["pruned", "fixed"]}
    tiny_recipe["run"] = {"checkpoint_seconds": 0}
    path = tmp_path / "tiny.toml"
    path.write_text(as_toml(tiny_recipe))
    return path


def results(out):
    return {
        record.id: (record.heldout, record.curve, record.after_cut, record.flops)
        for record in read_records(out)
    }


def test_tasks_one_by_one_are_the_sweep(recipe, tmp_path, monkeypatch, typed):
    use_own_workers(monkeypatch)
    whole, out = tmp_path / "whole", tmp_path / "one by one"
    Sweep(recipe=str(recipe), out=whole).run()

    def column(task=None):
        return Column(recipe=str(recipe), task=task, out=out)

    listed = {one["id"]: one for one in column().run()["tasks"]}
    assert not out.exists()
    first, second = "llama-t14k-seed0", "llama-t20k-seed0"
    assert [listed[name]["state"] for name in (first, second)] == ["ready", "ready"]
    # its `fixed` student is cut out of the smallest teacher
    students = f"column-{second}"
    assert (listed[students]["state"], listed[students]["needs"]) == ("waits", [first, second])
    with pytest.raises(UserError, match=f"{students} needs {first}, which is not trained yet"):
        column(students).run()
    with pytest.raises(UserError, match="no task 'column-x' in this sweep"):
        column("column-x").run()
    stops = itertools.chain([False, False, True], itertools.repeat(False))
    with pytest.raises(Interrupted):
        column(first).run(should_stop=stops.__next__)
    # beside another task, and not beside a sweep
    with locked(out, shared=True):
        assert column(first).run()["state"] == "done"
    with locked(out):
        refused = typed("column", recipe, second, "--out", out)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert f"another process is at work in {out}" in refused.err
    for name in listed:
        assert column(name).run()["state"] == "done"
    told = typed("column", recipe, "--out", out)
    assert told.out.count("done") == len(listed)
    OwnWorkers.ran.clear()
    found = Sweep(recipe=str(recipe), out=out).run()
    assert OwnWorkers.ran == []
    assert results(out) == results(whole)
    assert (out / "report.html").exists() or found["best"]
    assert json.loads((out / "sweep.json").read_text())["best"]["cell"] == found["best"]


def test_a_teacher_without_its_files_is_made_again_and_other_versions_are_told(recipe, tmp_path):
    out, name = tmp_path / "out", "llama-t14k-seed0"
    column = Column(recipe=str(recipe), task=name, out=out)
    assert column.run()["warnings"] == []
    before = results(out)
    sweep = read_json(out / "sweep.json")
    write_json(out / "sweep.json", sweep | {"versions": sweep["versions"] | {"torch": "1.0"}})
    # nothing to do, so nothing to tell
    assert column.run()["warnings"] == []
    shutil.rmtree(out / "teachers" / name)
    (told,) = column.run()["warnings"]
    assert re.fullmatch(r"warning: \S+ has torch 2\S+, the sweep began with 1\.0", told)
    assert (out / "teachers" / name).is_dir()
    assert results(out) == before


def test_a_gpu_that_cannot_compute_as_the_sweep_does_is_refused_by_name(
    recipe, tmp_path, monkeypatch
):
    plan = plan_of(load_recipe(recipe, ["training.precision=bf16"]))
    monkeypatch.setattr("capgap.sweep.runner.resolve_device", lambda asked: "cuda:0")
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **how: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    with pytest.raises(UserError, match=r"the GPU of \S+ \(Tesla T4\) has no bf16: use fp32"):
        context_of(plan.recipe, tmp_path, None)


def test_of_two_workers_one_is_killed_and_the_other_does_it_all(
    tiny_recipe, recipe, tmp_path, monkeypatch
):
    tiny_recipe["teachers"]["tokens"] = 25_600
    tiny_recipe["students"]["tokens"] = [51_200]
    tiny_recipe["baselines"] = "best"
    tiny_recipe["run"] = {"checkpoint_seconds": 0.1, "checkpoint_share": 0.9, "workers": 1}
    recipe.write_text(as_toml(tiny_recipe))
    whole, out = tmp_path / "whole", tmp_path / "shared"
    use_own_workers(monkeypatch)
    Sweep(recipe=str(recipe), out=whole).run()
    command = [sys.executable, "-m", "capgap", "sweep", recipe, "--out", out, "--worker"]
    logs = [tmp_path / name for name in ("first", "second")]
    processes = []
    for log in logs:
        with log.open("w") as told:
            processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told))
    first, second = processes
    deadline = time.monotonic() + 180
    # both are at work, and a column is half done
    while not list(out.glob("work/checkpoints/column-*/*/manifest.json")) or any(
        "start " not in log.read_text() for log in logs
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert second.wait(timeout=300) == 0, logs[1].read_text()
    assert results(out) == results(whole)
    assert (out / "report.html").exists()
    # a third call finds everything done
    third = subprocess.run(command, capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert "every task is done; another process wrote the report" in third.stdout
