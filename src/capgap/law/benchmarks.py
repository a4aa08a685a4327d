"""Published scores of small models on six benchmarks, with the compute they took."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean


@dataclass(frozen=True)
class BenchmarkResult:
    """A model on the six benchmarks of arXiv 2311.07052.

    `mean` is the plain mean of its scores in percent, `flops` what it took, `scores` by benchmark.
    `distilled`: from a teacher; `tuned`: on instructions.
    """

    name: str
    flops: float
    mean: float
    scores: dict[str, float]
    distilled: bool = False
    tuned: bool = False


@cache
def published_results() -> tuple[BenchmarkResult, ...]:
    """The table of arXiv 2311.07052 (authors' repository), in its order."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return tuple(
        BenchmarkResult(
            name=model["name"],
            flops=1e21 * model["compute"],
            mean=fmean(model["scores"]),
            scores=dict(zip(data["benchmarks"], model["scores"], strict=True)),
            distilled=model.get("distilled", False),
            tuned=model.get("tuned", False),
        )
        for model in data["models"]
    )
