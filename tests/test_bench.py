"""The harness of benchmarks/distillation.py on a model of seconds."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import processes
from capgap.models.shape import ladder_shape

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PACKAGES = {"trl-gkd": "trl", "trl-distillation": "trl", "trl": "trl", "liger": "liger_kernel"}


def measure_one() -> None:
    from peers.measure import main

    main()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its processes are forked; but for one engine's, which are started as they are."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distillation

    started = distillation.run_child

    def run_child(asked: dict[str, Any]) -> dict[str, Any]:
        if asked["engine"] == "ours":
            return started(asked)
        done = processes.run(json.dumps(asked), main=measure_one)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    monkeypatch.setattr(distillation, "run_child", run_child)
    return distillation


@pytest.mark.parametrize(
    ("part", "engine"),
    [
        ("step", "ours-column"),
        ("step", "ours-cached"),
        ("step", "liger"),
        ("step", "trl-gkd"),
        ("step", "trl-distillation"),
        ("loss", "ours"),
        ("loss", "liger"),
        ("loss", "trl"),
    ],
)
def test_engines_compute_the_same(
    bench: ModuleType, tmp_path: Path, part: str, engine: str
) -> None:
    if engine in PACKAGES:
        pytest.importorskip(PACKAGES[engine], reason=f"{PACKAGES[engine]} is not installed")
    student, teacher = (
        ladder_shape("llama", size, vocabulary=300, positions=16) for size in (7_000, 20_000)
    )
    case = bench.Case(student, teacher, 16, 2, "fp32", "cpu", 1, 1.0)
    arguments = bench.parse_arguments(["--steps", "1"])
    bench.write_corpus(tmp_path / "300", 300, case.tokens * 2 + 1)
    found = [
        bench.measure(bench.Work(part, name, case), 0, tmp_path, arguments)
        for name in ("plain", engine)
    ]
    bench.check_agreement(found)
    assert all(one.tokens_per_second > 0 and one.bytes_above > 0 for one in found)
    row = bench.table(found, part)[-1]
    assert bench.ENGINES[part][engine].title in row


def test_a_different_loss_stops_the_benchmark(bench: ModuleType) -> None:
    shape = ladder_shape("llama", 7_000, vocabulary=300, positions=16)
    case = bench.Case(shape, shape, 16, 2, "fp32", "cpu", 1, 1.0)
    found = [
        bench.Measurement(bench.Work("step", name, case), 0, "wall", {}, checked, 0, 0)
        for name, checked in (("ours", [0.5, 0.4]), ("plain", [0.5, 0.41]))
    ]
    with pytest.raises(SystemExit, match="plain computes"):
        bench.check_agreement(found)
