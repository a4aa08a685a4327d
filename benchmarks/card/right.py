"""Tests marked `cuda`, each with what it passed, failed or told."""

import os
from pathlib import Path
from typing import Any

import pytest

from card import Place

ROOT = Path(__file__).parents[2]


class Outcomes:
    """A plugin of pytest that keeps what happened."""

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.told: dict[str, Any] = {}
        self.errors: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            name = report.nodeid.rpartition("::")[2]
            self.passed += report.passed
            self.skipped += report.skipped
            if report.user_properties:
                self.told[name] = dict(report.user_properties)
            if report.failed:
                self.errors[name] = str(report.longrepr)[-3000:]


def run_tests(place: Place, wanted: str) -> dict[str, Any]:
    """wanted: names, as `pytest -k` takes them."""
    os.environ["CAPGAP_TEST_DEVICE"] = "cuda" if place.is_gpu else place.device
    if place.is_toy:
        # one of each kind; on a CPU tests/test_compiling.py compiles
        wanted = f"({wanted}) and not compiled and not 2.0"
        wanted += " and not column and not distill and not cache"
    outcomes = Outcomes()
    # a library that warns on this machine is no fault of ours
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-k", wanted]
    pytest.main([str(ROOT / "tests" / "test_cuda.py"), *options], plugins=[outcomes])
    if outcomes.errors:
        told = "\n".join(f"{name}:\n{error}" for name, error in outcomes.errors.items())
        raise AssertionError(f"{told}\n{', '.join(outcomes.errors)} failed")
    return {"passed": outcomes.passed, "skipped": outcomes.skipped, "told": outcomes.told}
