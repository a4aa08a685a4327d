"""benchmarks/gpu.py: every measurement runs, and none takes another with it."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def test_all_of_it_runs_at_toy_size(tmp_path: Path) -> None:
    """From a folder elsewhere, and without the package installed but by its place."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--toy", "--device", "cpu", "--out", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    listed = subprocess.run([sys.executable, SCRIPT, "--list"], capture_output=True, text=True)
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*/*.json")}
    assert sorted(found) == sorted(names)
    for name, (entry,) in found.items():
        assert "figures" in entry or "not installed" in entry["skipped"], name
        assert {"commit", "code", "date", "command", "machine", "versions"} <= entry.keys()
    figures = {name: entry["figures"] for name, (entry,) in found.items() if "figures" in entry}
    for name in ("right-losses", "right-training"):
        assert figures[name]["passed"] > 3
    errors = [error for key, error in figures["logits"].items() if key.startswith("error")]
    assert len(errors) == 2
    assert max(errors) < 0.005
    assert figures["waits"]["waits a step"] == 0
    assert figures["compile"]["versions of the layers"] == figures["compile"]["versions needed"]
    # both loops began with the same weights and the same tokens
    assert figures["peer-plain"]["loss"] > 0
    column = figures["step-column"]
    assert column["tokens/s"] > 0
    assert len(column["longest kernels"]) == 10


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def vanish(place: object) -> None:
    os._exit(3)


def stay(place: object) -> None:
    time.sleep(600)


def fail(place: object) -> None:
    print("what a library says")
    raise ValueError("this card has no such thing")


def figures(place: object) -> dict[str, float]:
    return {"answer": 42.0}


def pieces(gpu: ModuleType, *names: str, **more: object) -> list:
    return [
        gpu.Measurement(name, name.title(), 5, (), ("test_gpu_benchmark", name), **more)
        for name in names
    ]


def ran(gpu: ModuleType, monkeypatch, out: Path, wanted: list, *options: str) -> int:
    monkeypatch.setattr(gpu, "MEASUREMENTS", wanted)
    machine = {"cpu": "Test 1", "device": "cpu"}
    context = multiprocessing.get_context("spawn")
    monkeypatch.setattr(gpu, "start", lambda place: (context, machine))
    arguments = gpu.parse_arguments(["--device", "cpu", "--out", str(out), *options])
    return gpu.run(wanted, arguments, time.monotonic())


def test_one_that_fails_is_written_and_the_next_goes_on(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 20.0)
    wanted = pieces(gpu, "vanish", "fail", "figures")
    assert ran(gpu, monkeypatch, tmp_path, wanted, "--commit", "abc") == 2
    folder = tmp_path / "cpu-test-1"
    last = {one.name: gpu.entries(folder / f"{one.name}.json")[-1] for one in wanted}
    assert "exit code 3" in last["vanish"]["failure"]
    assert "ValueError: this card has no such thing" in last["fail"]["failure"]
    assert "what a library says" in last["fail"]["log"]
    assert last["figures"]["figures"] == {"answer": 42.0}
    assert "fail: " in capsys.readouterr().out
    # what failed is taken again, what is there is not
    again = []
    monkeypatch.setattr(
        gpu, "measured", lambda _, one, place: again.append(one.name) or {"figures": {}}
    )
    ran(gpu, monkeypatch, tmp_path, wanted, "--missing", "--commit", "abc")
    assert again == ["vanish", "fail"]


def test_one_that_takes_too_long_is_ended(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "LIMIT_SECONDS", 1.0)
    began = time.monotonic()
    assert ran(gpu, monkeypatch, tmp_path, pieces(gpu, "stay")) == 1
    assert time.monotonic() - began < 60
    (entry,) = gpu.entries(tmp_path / "cpu-test-1" / "stay.json")
    assert entry["failure"] == "not done after 1 s"


def test_what_is_older_than_its_code_is_missing(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    source = tmp_path / "source.py"
    source.write_text("one")
    (one,) = pieces(gpu, "figures")
    one = gpu.Measurement(one.name, one.title, 5, ("source.py",), one.call)
    monkeypatch.setattr(gpu, "measured", lambda *_: {"figures": {}})
    folder = tmp_path / "cpu-test-1"
    assert gpu.is_missing(one, folder)
    ran(gpu, monkeypatch, tmp_path, [one], "--commit", "abc")
    assert not gpu.is_missing(one, folder)
    source.write_text("two")
    assert gpu.is_missing(one, folder)
    ran(gpu, monkeypatch, tmp_path, [one], "--commit", "def")
    ran(gpu, monkeypatch, tmp_path, [one], "--commit", "def")
    commits = [entry["commit"] for entry in gpu.entries(folder / "figures.json")]
    assert commits == ["abc", "def"]


def test_none_begins_that_would_not_fit(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "measured", lambda *_: pytest.fail("measured"))
    ran(gpu, monkeypatch, tmp_path, pieces(gpu, "figures"), "--budget", "4")
    assert "figures: not begun, 4 s are left" in capsys.readouterr().out


def test_a_package_that_is_not_there_is_told(gpu, monkeypatch, tmp_path):
    wanted = pieces(gpu, "figures", packages=("no_such_package",))
    assert ran(gpu, monkeypatch, tmp_path, wanted) == 0
    (entry,) = gpu.entries(tmp_path / "cpu-test-1" / "figures.json")
    assert entry["skipped"] == "not installed: no_such_package"
    assert not gpu.is_missing(wanted[0], tmp_path / "cpu-test-1")


def test_the_table_tells_what_was_not_measured(gpu, monkeypatch, tmp_path):
    wanted = pieces(gpu, "figures", "fail")
    monkeypatch.setattr(gpu, "MEASUREMENTS", wanted)
    assert "| Figures |  | not measured |" in gpu.table(tmp_path)
    monkeypatch.setattr(
        gpu,
        "measured",
        lambda _, one, place: (
            {"figures": {"speed": 1234.5, "share": 0.4567, "list": [1], "gone": None}}
            if one.name == "figures"
            else {"failure": "ValueError: no"}
        ),
    )
    ran(gpu, monkeypatch, tmp_path, wanted, "--commit", "abc")
    lines = gpu.table(tmp_path).splitlines()
    assert lines[0] == "| measurement | figure | a GPU | cpu-test-1 |"
    assert lines[2:6] == [
        "| Figures | speed | not measured | 1,234 |",
        "|  | share | not measured | 0.457 |",
        "|  | gone | not measured | - |",
        "| Fail |  | not measured | failed |",
    ]
    assert lines[-1].startswith("- Test 1, python 3")
    assert lines[-1].endswith("commit abc")


def test_the_page_has_the_table_of_the_files(gpu, tmp_path):
    page = tmp_path / "benchmarks.md"
    page.write_text(gpu.PAGE.read_text())
    gpu.write_table(page, gpu.RESULTS)
    assert page.read_text() == gpu.PAGE.read_text()


def test_mistakes_are_told(gpu, capsys, tmp_path):
    for asked, told in (
        (["--only", "limit"], "--only limit: take some of limits, right-losses"),
        (["--toy"], "--toy measures nothing: give it an --out of its own"),
    ):
        with pytest.raises(SystemExit) as ended:
            gpu.parse_arguments(asked)
        assert ended.value.code == 2
        assert told in capsys.readouterr().err


def test_gaps_between_kernels_are_time_without_work(gpu):
    from card.steps import idle_share

    assert idle_share([]) is None
    assert idle_share([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0)]) == 0.2
    # one that lies within another
    assert idle_share([(0.0, 4.0), (1.0, 2.0), (3.0, 4.0), (6.0, 8.0)]) == 0.25
