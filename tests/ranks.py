"""What tests/test_parallel.py starts by torchrun, and runs alone to compare with: a short training.

torchrun --nproc-per-node 2 ranks.py '{"corpus": ..., "out": ..., "stop_after": 5}'
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from capgap.cli import leave
from capgap.corpus.text import Text, batch_indices
from capgap.distill.teacher import OnlineTeacher
from capgap.errors import Interrupted
from capgap.evaluate.losses import evaluate_heldout, heldout_set
from capgap.models.build import build_model
from capgap.models.parallel import Ranks, joined, parallelize, whole_weights
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, train

WINDOW = 16
STEPS = 8
CPU = torch.device("cpu")


def student(size: int, architecture: str, *, tied: bool) -> Learner:
    shape = ladder_shape(architecture, size, vocabulary=300, positions=WINDOW)
    model = build_model(dataclasses.replace(shape, tied=tied), seed=0).double()
    return Learner(architecture, model, STEPS, learning_rate=5e-3, alpha=0.5)


def settings(corpus: Text, micro_batch_windows: int, checkpointing: bool) -> LoopSettings:
    """Half of the words do not count, and by far not the same share of every window."""
    return LoopSettings(
        batch_windows=8,
        micro_batch_windows=micro_batch_windows,
        data_seed=5,
        ignored_labels=tuple(range(100, 250)),
        document_mask=True,
        activation_checkpointing=checkpointing,
        checkpoint_seconds=1e9,
        heldout_steps=3,
    )


def spoil(learner: Learner, corpus: Text) -> None:
    """A word of the second half of the first batch alone, so that the last ranks meet it."""
    indices = batch_indices(seed=5, step=0, batch_windows=8, num_windows=corpus.windows)
    first, second = (corpus.train.windows_at(half)[:, :-1] for half in (indices[:4], indices[4:]))
    word = sorted(set(second.ravel().tolist()) - set(first.ravel().tolist()))[0]
    with torch.no_grad():
        learner.model.get_input_embeddings().weight[word] = float("nan")


def run(asked: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    corpus = Text.open([(asked["corpus"], None)], WINDOW)
    learners = [student(9_000, "llama", tied=False), student(11_000, "gpt2", tied=True)]
    if asked.get("spoil"):
        spoil(learners[0], corpus)
    for learner in learners:
        parallelize(learner.parts, ranks, CPU)
    shape = ladder_shape("gpt_neox", 20_000, vocabulary=320, positions=WINDOW)
    teacher = Parts(build_model(shape, seed=1).double())
    heldout = heldout_set(corpus.heldout_documents(), corpus.marks, WINDOW, corpus.vocabulary)
    taken: list[dict[str, float]] = []
    steps = 0

    def on_step(progress: Any) -> None:
        nonlocal steps
        steps = progress.step
        if progress.heldout:
            taken.append(progress.heldout)

    stopped = False
    try:
        train(
            learners,
            corpus,
            settings(corpus, asked.get("micro", 8), asked.get("checkpointing", False)),
            teacher=OnlineTeacher(parallelize(teacher, ranks, CPU)),
            checkpoint_folder=Path(asked["checkpoints"]) if "checkpoints" in asked else None,
            on_step=on_step,
            # one rank wants to stop, and all do
            should_stop=lambda: ranks.rank == ranks.world - 1 and steps == asked.get("stop_after"),
            heldout_loss=lambda one: evaluate_heldout(one.parts, heldout, ranks).loss,
            ranks=ranks,
        )
    except Interrupted:
        stopped = True
    weights = {
        f"{one.id}/{name}": value.clone()
        for one in learners
        for name, value in whole_weights(one.parts, ranks).items()
    }
    if ranks.is_first:
        save_file(weights, asked["out"])
    return {
        "stopped": stopped,
        "steps": steps,
        "heldout": taken,
        "curves": {one.id: one.curve for one in learners},
        "failures": {one.id: one.failure for one in learners},
    }


def main() -> None:
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[1])
    with joined("cpu", 8, asked.get("shard_size")) as ranks:
        found = run(asked, ranks)
        if ranks.is_first:
            print(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main()
