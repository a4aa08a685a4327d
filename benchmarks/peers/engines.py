"""Whole training steps: ours, and loops of one's own around transformers' models.

An engine is a function of a `Setup`: it takes `setup.steps` optimizer steps on the same batches in
the same order, calls `setup.watch.lap()` after each, and returns the loss of every step in nats per
token, that of the first student where there are several.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.corpus.text import Text, batch_indices
from capgap.distill.cache import CachedTeacher, CacheFormat, CacheIdentity, CacheWriter, write_cache
from capgap.distill.teacher import OnlineTeacher, TeacherSource
from capgap.models.parts import Parts
from capgap.train import compiling
from capgap.train.learner import Learner
from capgap.train.loop import LoopSettings, Progress, train
from peers.cases import BETA2, CLIP, LEARNING_RATE, WEIGHT_DECAY, Case
from peers.losses import full_loss, liger_loss
from peers.watch import MemoryMeter, Stopwatch


@dataclass
class Setup:
    """What an engine is given: models on the case's device, and data."""

    case: Case
    students: list[PreTrainedModel]
    teacher: PreTrainedModel
    corpus: Text
    steps: int
    watch: Stopwatch
    memory: MemoryMeter
    compile: Literal["auto", "off"] = "auto"

    @property
    def dtype(self) -> torch.dtype | None:
        """Of autocast; None for fp32."""
        return torch.bfloat16 if self.case.precision == "bf16" else None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.case.device, self.dtype, enabled=self.dtype is not None)

    def batches(self) -> Iterator[Tensor]:
        """Windows [rows, window + 1] of every step, those that `train` takes for seed 0."""
        for step in range(self.steps):
            indices = batch_indices(
                seed=0,
                step=step,
                batch_windows=self.case.batch_windows,
                num_windows=self.corpus.windows,
            )
            yield torch.from_numpy(self.corpus.train.windows_at(indices)).to(self.case.device)


def ours(setup: Setup, teacher: TeacherSource | None = None) -> list[float]:
    """`capgap.train.loop.train`, by default with a teacher that runs beside its students."""
    # as in a long run: layers are compiled where that is faster
    compiling.WORTHWHILE_SECONDS = 0.0
    case = setup.case
    losses: list[float] = []

    def on_step(progress: Progress) -> None:
        setup.watch.lap()
        losses.extend(step.learners["student-0"]["loss"] for step in progress.reports)

    learners = [
        Learner(f"student-{number}", model, setup.steps, LEARNING_RATE, case.alpha)
        for number, model in enumerate(setup.students)
    ]
    settings = LoopSettings(
        case.batch_windows,
        case.batch_windows,
        data_seed=0,
        weight_decay=WEIGHT_DECAY,
        decay_embeddings=True,
        clip=CLIP,
        autocast_dtype=setup.dtype,
        compile=setup.compile,
    )
    teacher = teacher or OnlineTeacher(setup.teacher)
    train(learners, setup.corpus, settings, teacher=teacher, on_step=on_step)
    return losses


def ours_cached(setup: Setup) -> list[float]:
    """The same from what a cache keeps of the teacher; writing it is not timed.

    The loss it reports is an estimate: most words of the tail are not in a cache.
    """
    kept = CacheFormat(setup.case.student.vocabulary)
    corpus = setup.corpus
    identity = CacheIdentity(
        teacher="teacher",
        teacher_hash="",
        dtype="",
        corpus_hash=corpus.corpus_hash,
        tokenizer_hash=corpus.token_hash,
        window=corpus.window,
        windows=corpus.windows,
        document_mask=False,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        teacher = OnlineTeacher(setup.teacher)
        device = torch.device(setup.case.device)
        write_cache(CacheWriter(folder, identity, kept), teacher, corpus, device=device)
        setup.memory.begin()
        return ours(setup, CachedTeacher(folder, corpus))


def plain(setup: Setup) -> list[float]:
    """A loop of one's own: the logits of both models in full, torch's KL and cross-entropy."""

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with setup.autocast():
            logits = setup.students[0](input_ids=inputs, use_cache=False).logits
        with torch.no_grad():
            teacher_logits = setup.teacher(input_ids=inputs, use_cache=False).logits
        return full_loss(logits.flatten(0, 1), teacher_logits.flatten(0, 1), targets, setup.case)

    return _own_loop(setup, loss)


def liger(setup: Setup) -> list[float]:
    """The same loop with Liger's chunked loss in the place of the logits."""
    chunked = liger_loss(setup.case)
    student, teacher = Parts(setup.students[0]), Parts(setup.teacher)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_hidden = teacher(inputs).flatten(0, 1)
        with setup.autocast():
            hidden = student(inputs).flatten(0, 1)
            return chunked(
                hidden, student.head.weight, teacher_hidden, teacher.head.weight, targets
            )

    return _own_loop(setup, loss)


def _own_loop(setup: Setup, loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
    student = setup.students[0].train()
    setup.teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        student.parameters(),
        lr=LEARNING_RATE,
        betas=(0.9, BETA2),
        weight_decay=WEIGHT_DECAY,
        fused=True,
    )
    losses = []
    for windows in setup.batches():
        loss = loss_of(windows[:, :-1], windows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        setup.watch.lap()
    return [loss.item() for loss in losses]
