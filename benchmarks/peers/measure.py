"""Measures one engine on one case, alone in its process; called by benchmarks/distillation.py.

    python -m peers.measure '{"part": "step", "engine": "ours", "case": {...}, ...}'

The last line printed is a JSON object: seconds of every step; `checked`, numbers that are the same
for all engines of a case (losses, norms of gradients); bytes held before and at the most.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.corpus.text import Text
from capgap.corpus.tokens import Corpus
from capgap.models.build import initialise, to_config
from capgap.models.shape import Shape
from peers import engines
from peers.cases import STEP_ENGINES, Case
from peers.losses import LOSSES, LossInput
from peers.watch import MemoryMeter, Stopwatch


def step_engine(name: str) -> Callable[[engines.Setup], list[float]]:
    """By its name in `STEP_ENGINES`; imports the peer."""
    if name.startswith("trl"):
        from peers import trl_engines

        return {
            "trl-gkd": trl_engines.train_gkd,
            "trl-distillation": trl_engines.train_distillation,
        }[name]
    return {
        "ours": engines.ours,
        "ours-cached": engines.ours_cached,
        "ours-column": engines.ours,
        "plain": engines.plain,
        "liger": engines.liger,
    }[name]


def make_model(shape: Shape, device: str, dtype: torch.dtype, *, seed: int) -> PreTrainedModel:
    """Made on its device: no second copy is left behind in memory."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            to_config(shape), dtype=dtype, attn_implementation="sdpa"
        )
    initialise(model, torch.Generator(device).manual_seed(seed))
    return model


def measure_steps(
    engine: str,
    case: Case,
    corpus_folder: Path,
    *,
    steps: int,
    warmup: int,
    students: int | None = None,
    compile: Literal["auto", "off"] = "auto",
) -> dict[str, Any]:
    """students: how many, by default those of the engine."""
    run = step_engine(engine)
    low = torch.bfloat16 if case.precision == "bf16" else torch.float32
    teacher = make_model(case.teacher, case.device, low, seed=1)
    students = [
        make_model(case.student, case.device, torch.float32, seed=2 + number)
        for number in range(students or STEP_ENGINES[engine].students)
    ]
    manifest = json.loads((corpus_folder / "manifest.json").read_text())
    corpus = Text.of([Corpus(corpus_folder, manifest, case.window)])
    watch, memory = Stopwatch(case.device), MemoryMeter(case.device)
    setup = engines.Setup(case, students, teacher, corpus, warmup + steps, watch, memory, compile)
    losses = run(setup)
    return {
        "seconds": watch.seconds(skip=warmup),
        # of the first weights, and after one step of the optimizer
        "checked": losses[:2],
        "held_bytes": memory.held,
        "peak_bytes": memory.peak(),
    }


def measure_loss(engine: str, case: Case, *, steps: int, warmup: int) -> dict[str, Any]:
    source = LossInput.random(case)
    loss_of = LOSSES[engine]
    watch, memory = Stopwatch(case.device), MemoryMeter(case.device)
    for _ in range(warmup + steps):
        source.hidden.grad = source.weight.grad = None
        loss = loss_of(source)
        loss.backward()
        watch.lap()
    peak = memory.peak()
    norms = [float(tensor.grad.norm()) for tensor in (source.hidden, source.weight)]
    return {
        "seconds": watch.seconds(skip=warmup),
        "checked": [loss.item(), *norms],
        "held_bytes": memory.held,
        "peak_bytes": peak,
    }


def main() -> None:
    warnings.simplefilter("ignore")
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    case = Case.from_dict(asked["case"])
    counts = {"steps": asked["steps"], "warmup": asked["warmup"]}
    if asked["part"] == "step":
        more = {name: asked[name] for name in ("students", "compile") if name in asked}
        result = measure_steps(asked["engine"], case, Path(asked["corpus"]), **counts, **more)
    else:
        result = measure_loss(asked["engine"], case, **counts)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
