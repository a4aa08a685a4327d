"""A training step by precision and size, and the share of it spent outside torch's operators.

    python benchmarks/steps.py

One thread, batches of 1,024 tokens, vocabulary 1,024. Medians over interleaved repeats; the ratio
is fp32 time over bf16 time in the same run. Operators are timed by torch's profiler, whose own cost
makes the share outside them an upper bound.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from capgap.corpus.prepare import prepare_corpus
from capgap.corpus.text import Text
from capgap.models.build import build_model
from capgap.models.shape import ladder_shape
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train

SIZES = (30_000, 100_000, 300_000, 1_000_000, 3_000_000)
VOCABULARY, WINDOW, WINDOWS = 1024, 128, 8
STEPS, REPEATS = 6, 5


def run_steps(corpus: Text, size: int, dtype: torch.dtype | None) -> float:
    """Median seconds of a step, the first two left out."""
    shape = ladder_shape("llama", size, vocabulary=VOCABULARY, positions=WINDOW)
    learner = Learner("model", build_model(shape, seed=0), STEPS, 1e-3)
    times = [time.perf_counter()]
    settings = LoopSettings(WINDOWS, WINDOWS, data_seed=0, autocast_dtype=dtype)
    train([learner], corpus, settings, on_step=lambda _: times.append(time.perf_counter()))
    return statistics.median(np.diff(times)[2:])


def share_outside(corpus: Text, size: int) -> float:
    """The part of the loop's time in which no operator of torch was running."""
    shape = ladder_shape("llama", size, vocabulary=VOCABULARY, positions=WINDOW)
    settings = LoopSettings(WINDOWS, WINDOWS, data_seed=0)
    train([Learner("warm", build_model(shape, seed=0), 3, 1e-3)], corpus, settings)
    learner = Learner("model", build_model(shape, seed=0), 20, 1e-3)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        train([learner], corpus, settings)
        wall = time.perf_counter() - start
    operators = sum(event.self_cpu_time_total for event in profiler.key_averages()) / 1e6
    return max(0.0, 1 - operators / wall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="stdlib")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare_corpus(
            arguments.source, Path(folder) / "corpus", vocabulary=VOCABULARY, max_bytes=4_000_000
        )
        corpus = Text.of([prepared])
        print("| size | fp32 tokens/s | bf16 tokens/s | bf16 / fp32 | outside operators |")
        print("|---|---|---|---|---|")
        for size in SIZES:
            times: dict[torch.dtype | None, list[float]] = {None: [], torch.bfloat16: []}
            for _ in range(REPEATS):
                for dtype, seconds in times.items():
                    seconds.append(run_steps(corpus, size, dtype))
            plain, half = (WINDOW * WINDOWS / statistics.median(times[key]) for key in times)
            print(
                f"| {size / 1000:g}k | {plain:,.0f} | {half:,.0f} | {half / plain:.2f} | "
                f"{share_outside(corpus, size):.1%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
