"""The one training loop.

It trains any number of models on the same batches: one model without a teacher is pre-training or
a baseline, several with a teacher are a column, whose teacher runs once for all of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.corpus.tokens import Corpus
from capgap.distill.divergences import Divergence
from capgap.distill.losses import FORWARD_KL, ColumnLoss, HeadInput, column_loss
from capgap.distill.teacher import Batch, TeacherSource
from capgap.models.build import split
from capgap.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_tensors,
)
from capgap.train.clock import StageClock
from capgap.train.learner import Learner
from capgap.train.metrics import (
    SUMS,
    CurveSums,
    HostCopy,
    Reporter,
    StepReport,
    Taken,
    column_sums,
)
from capgap.train.optimizer import make_optimizer, schedule
from capgap.train.reader import BatchReader, ReadBatch


class Interrupted(Exception):
    """Training was asked to stop; its state is in the checkpoint."""


@dataclass(frozen=True)
class LoopSettings:
    """What all models of one loop share. Batches and micro-batches are counted in windows."""

    batch_windows: int
    micro_batch_windows: int
    data_seed: int
    temperature: float = 1.0
    divergence: Divergence = FORWARD_KL
    warmup_fraction: float = 0.05
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    clip: float = 1.0
    document_mask: bool = False
    activation_checkpointing: bool = False
    autocast_dtype: torch.dtype | None = None
    checkpoint_seconds: float = 30.0


@dataclass(frozen=True)
class Progress:
    """Told after every step; `learner_tokens` counts the batch once for each model that took it.

    `reports` are those known by now, by learner: on a GPU those of the step before, since waiting
    for the last one would leave the GPU without work. `seconds` is the time of the step that they
    tell of, None where it is not known.
    """

    step: int
    tokens: int
    learner_tokens: int
    reports: dict[str, StepReport]
    seconds: float | None


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    settings: LoopSettings,
    *,
    teacher: TeacherSource | None = None,
    clock: StageClock | None = None,
    checkpoint_folder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_end: Callable[[Learner], None] = lambda learner: None,
) -> None:
    """Trains every learner to its own number of steps, in place; `on_end` is told of each.

    With a checkpoint folder it continues from its last whole checkpoint, saves every
    `checkpoint_seconds`, and when `should_stop` says so, saves and raises Interrupted. On one CPU
    process an interrupted run that continues equals an uninterrupted one bit for bit.
    """
    clock = clock or StageClock()
    column = _Column(learners, teacher, settings, clock, corpus.vocabulary)
    step = 0
    if checkpoint_folder is not None:
        step = column.restore(checkpoint_folder)
    saved_at = time.monotonic()
    for learner in learners:
        if not learner.active(step):
            on_end(learner)
    reader = BatchReader(
        corpus,
        batch_windows=settings.batch_windows,
        seed=settings.data_seed,
        document_mask=settings.document_mask,
        teacher=teacher,
        device=column.device,
        last_step=max(learner.steps for learner in learners) - 1,
    )
    with reader:
        while any(learner.active(step) for learner in learners):
            with clock.stage("batches"):
                read = reader.take(step)
            trained = [learner for learner in learners if learner.active(step)]
            reports = column.step(step, read)
            step += 1
            tokens = read.batch.targets.numel()
            seconds = column.reporter.seconds
            on_step(Progress(step, step * tokens, tokens * len(trained), reports, seconds))
            for learner in trained:
                if not learner.active(step):
                    on_end(learner)
            if checkpoint_folder is None:
                continue
            stopping = should_stop()
            if stopping or time.monotonic() - saved_at > settings.checkpoint_seconds:
                with clock.stage("checkpoint"):
                    column.save(checkpoint_folder, step)
                saved_at = time.monotonic()
            if stopping:
                raise Interrupted


class _Column:
    """The models of one loop with their optimizers, and a step of all of them."""

    def __init__(
        self,
        learners: Sequence[Learner],
        teacher: TeacherSource | None,
        settings: LoopSettings,
        clock: StageClock,
        vocabulary: int,
    ) -> None:
        self.learners = learners
        self.teacher = teacher
        self.settings = settings
        self.clock = clock
        self.vocabulary = vocabulary
        if settings.activation_checkpointing:
            for learner in learners:
                _checkpoint_activations(learner.model)
        self.parts = {learner.id: split(learner.model.train()) for learner in learners}
        self.optimizers = {
            learner.id: make_optimizer(
                learner.model,
                weight_decay=settings.weight_decay,
                decay_embeddings=settings.decay_embeddings,
            )
            for learner in learners
        }
        self.device = next(learners[0].model.parameters()).device
        self.stopped = {
            learner.id: torch.zeros((), dtype=torch.bool, device=self.device)
            for learner in learners
        }
        self.reporter = Reporter(learners, self.device, teacher is not None)

    def step(self, step: int, read: ReadBatch) -> dict[str, StepReport]:
        """One optimizer step of every active learner; returns the reports known by now."""
        active = [learner for learner in self.learners if learner.active(step)]
        tokens = read.batch.targets.numel()
        sums = torch.zeros(len(active), len(SUMS), dtype=torch.float64, device=self.device)
        for batch in read.batch.micro_batches(self.settings.micro_batch_windows):
            result = self._forward(active, batch)
            with self.clock.stage("backward"):
                torch.autograd.backward([one.loss / tokens for one in result.students])
            sums += column_sums(result)
        with self.clock.stage("optimizer"):
            norms = [
                self._update(learner, step, loss)
                for learner, loss in zip(active, sums[:, 0], strict=True)
            ]
            values = torch.cat([sums, torch.stack(norms).unsqueeze(1)], dim=1)
            rates = [self.optimizers[learner.id].param_groups[0]["lr"] for learner in active]
            taken = Taken(step, tokens, active, rates, read.indices, HostCopy(values))
            self.reporter.add(taken)
        return self.reporter.read(all_steps=any(step + 1 == one.steps for one in active))

    def _forward(self, active: Sequence[Learner], batch: Batch) -> ColumnLoss:
        signal = None
        if self.teacher is not None and any(learner.alpha > 0 for learner in active):
            with self.clock.stage("teacher_forward"):
                signal = self.teacher.signal(batch, self.vocabulary)
        dtype = self.settings.autocast_dtype
        with (
            self.clock.stage("forward"),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            students = [
                HeadInput.of(self.parts[learner.id], batch.inputs, self.vocabulary, batch.positions)
                for learner in active
            ]
        with self.clock.stage("loss"):
            return column_loss(
                students,
                batch.targets,
                alphas=[learner.alpha for learner in active],
                teacher=signal,
                temperature=self.settings.temperature,
                divergence=self.settings.divergence,
            )

    def _update(self, learner: Learner, step: int, loss: Tensor) -> Tensor:
        """Clip and step; returns the gradient norm, which nobody has to wait for.

        A non-finite loss or gradient stops the learner: from then on its optimizer changes
        nothing, by the flag that torch's fused optimizers read on the device (`found_inf`, made
        for gradient scaling).
        """
        optimizer = self.optimizers[learner.id]
        norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), self.settings.clip)
        stopped = self.stopped[learner.id]
        stopped.logical_or_(~(torch.isfinite(loss) & torch.isfinite(norm)))
        optimizer.found_inf = stopped.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        share = schedule(step, steps=learner.steps, warmup_fraction=self.settings.warmup_fraction)
        for group in optimizer.param_groups:
            group["lr"] = learner.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def save(self, folder: Path, step: int) -> None:
        self.reporter.read(all_steps=True)
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for learner in self.learners:
            optimizer = self.optimizers[learner.id]
            tensors |= training_tensors(learner.model, optimizer, learner.id)
            sums = self.reporter.sums[learner.id]
            state[learner.id] = {
                "curve": learner.curve,
                "failure": learner.failure,
                "sums": {"steps": sums.steps, "tokens": sums.tokens, "values": sums.values},
            }
        save_checkpoint(folder, Checkpoint(step, tensors, state))

    def restore(self, folder: Path) -> int:
        """The step to go on from; 0 when there is no checkpoint, or one of other learners."""
        checkpoint = load_checkpoint(folder)
        if checkpoint is None or any(one.id not in checkpoint.state for one in self.learners):
            return 0
        for learner in self.learners:
            state = checkpoint.state[learner.id]
            learner.curve, learner.failure = state["curve"], state["failure"]
            self.reporter.sums[learner.id] = CurveSums(**state["sums"])
            optimizer = self.optimizers[learner.id]
            restore_training(learner.model, optimizer, checkpoint.tensors, learner.id)
        return checkpoint.step


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps the inputs of every layer alone; the backward pass computes the rest again."""
    # transformers renamed it, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
