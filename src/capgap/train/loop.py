"""The one training loop.

It trains any number of models on the same batches: one model without a teacher is pre-training or
a baseline, several with a teacher are a column, whose teacher runs once for all of them.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from capgap.corpus.batches import batch_indices, document_positions
from capgap.corpus.tokens import Corpus
from capgap.distill.divergences import Divergence
from capgap.distill.losses import FORWARD_KL, ColumnLoss, HeadInput, StudentLoss, column_loss
from capgap.models.build import split
from capgap.train.checkpoint import (
    Checkpoint,
    load_checkpoint,
    restore_training,
    save_checkpoint,
    training_tensors,
)
from capgap.train.clock import StageClock
from capgap.train.optimizer import make_optimizer, schedule

CURVE_POINTS = 60
CURVE_COLUMNS = (
    "step",
    "tokens",
    "ce",
    "kl",
    "teacher_ce",
    "teacher_entropy",
    "agreement",
    "gradient_norm",
    "learning_rate",
)


# Sums over the tokens of one step, kept on the device until they are read
SUMS = ("loss", "ce", "kl", "agreement", "teacher_ce", "teacher_entropy")
# Steps whose numbers are still under way: a CPU has no queue that waiting for them would empty
LAG = {"cpu": 0}
OF_A_TEACHER = ("kl", "agreement", "teacher_ce", "teacher_entropy")


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


@dataclass
class Learner:
    """One model in training. It ends after `steps`, or at its first non-finite loss or gradient."""

    id: str
    model: PreTrainedModel
    steps: int
    learning_rate: float
    alpha: float = 0.0
    curve: dict[str, list[float | None]] = field(
        default_factory=lambda: {column: [] for column in CURVE_COLUMNS}
    )
    failure: dict[str, Any] | None = None

    def active(self, step: int) -> bool:
        return self.failure is None and step < self.steps


@dataclass(frozen=True)
class Progress:
    """Told after every step; `learner_tokens` counts the batch once for each model that took it.

    `losses` (nats per token) are those known by now: on a GPU those of the step before, since
    waiting for the last one would leave the GPU without work.
    """

    step: int
    tokens: int
    learner_tokens: int
    losses: list[float]


def train(
    learners: Sequence[Learner],
    corpus: Corpus,
    settings: LoopSettings,
    *,
    teacher: PreTrainedModel | None = None,
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
    while any(learner.active(step) for learner in learners):
        with clock.stage("batches"):
            indices = batch_indices(
                seed=settings.data_seed,
                step=step,
                batch_windows=settings.batch_windows,
                num_windows=corpus.windows,
            )
            batch = corpus.train.windows_at(indices)
            windows, positions = column.on_device(batch), None
            if settings.document_mask:
                positions = column.on_device(
                    document_positions(batch[:, :-1], corpus.end_of_document)
                )
        trained = [learner for learner in learners if learner.active(step)]
        losses = column.step(step, windows, positions, indices)
        step += 1
        tokens = windows[:, 1:].numel()
        on_step(Progress(step, step * tokens, tokens * len(trained), losses))
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
        teacher: PreTrainedModel | None,
        settings: LoopSettings,
        clock: StageClock,
        vocabulary: int,
    ) -> None:
        self.learners = learners
        self.vocabulary = vocabulary
        self.settings = settings
        self.clock = clock
        self.teacher = None
        if teacher is not None:
            self.teacher = split(teacher.eval().requires_grad_(False))
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
        self.sums = {learner.id: _CurveSums() for learner in learners}
        self.stopped = {
            learner.id: torch.zeros((), dtype=torch.bool, device=self.device)
            for learner in learners
        }
        self.unread: deque[_Measured] = deque()

    def step(
        self, step: int, windows: Tensor, positions: Tensor | None, indices: np.ndarray
    ) -> list[float]:
        """One optimizer step of every active learner; returns the mean losses known by now."""
        active = [learner for learner in self.learners if learner.active(step)]
        tokens = windows[:, 1:].numel()
        sums = torch.zeros(len(active), len(SUMS), dtype=torch.float64, device=self.device)
        rows = self.settings.micro_batch_windows
        for start in range(0, len(windows), rows):
            result = self._forward(
                active,
                windows[start : start + rows],
                None if positions is None else positions[start : start + rows],
            )
            with self.clock.stage("backward"):
                torch.autograd.backward([one.loss / tokens for one in result.students])
            sums += torch.stack([_sums(student, result) for student in result.students])
        with self.clock.stage("optimizer"):
            norms = [
                self._update(learner, step, loss)
                for learner, loss in zip(active, sums[:, 0], strict=True)
            ]
            values = torch.cat([sums, torch.stack(norms).unsqueeze(1)], dim=1)
            rates = [self.optimizers[learner.id].param_groups[0]["lr"] for learner in active]
            self.unread.append(_Measured(step, tokens, active, rates, indices, _Copy(values)))
        last = any(step + 1 == learner.steps for learner in active)
        return self._read(keep=0 if last else LAG.get(self.device.type, 1))

    def on_device(self, windows: np.ndarray) -> Tensor:
        """A batch on the device; the host does not wait until it is there."""
        batch = torch.from_numpy(windows)
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def _forward(
        self, active: Sequence[Learner], windows: Tensor, positions: Tensor | None
    ) -> ColumnLoss:
        inputs, targets = windows[:, :-1], windows[:, 1:].reshape(-1)
        dtype = self.settings.autocast_dtype
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            teacher = None
            if self.teacher is not None and any(learner.alpha > 0 for learner in active):
                with self.clock.stage("teacher_forward"), torch.no_grad():
                    teacher = HeadInput.of(self.teacher, inputs, self.vocabulary, positions)
            with self.clock.stage("forward"):
                students = [
                    HeadInput.of(self.parts[learner.id], inputs, self.vocabulary, positions)
                    for learner in active
                ]
            with self.clock.stage("loss"):
                return column_loss(
                    students,
                    targets,
                    alphas=[learner.alpha for learner in active],
                    teacher=teacher,
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

    def _read(self, *, keep: int) -> list[float]:
        """Takes what was measured, save the last `keep` steps; returns the last one's losses."""
        losses: list[float] = []
        while len(self.unread) > keep:
            measured = self.unread.popleft()
            losses = []
            rows = measured.values.read()
            for learner, rate, row in zip(measured.learners, measured.rates, rows, strict=True):
                if learner.failure is None:
                    self._take(learner, measured, rate, row)
                if learner.failure is None:
                    losses.append(row[0] / measured.tokens)
        return losses

    def _take(
        self, learner: Learner, measured: "_Measured", rate: float, row: Sequence[float]
    ) -> None:
        """One learner's step: its failure, or its part of the curve's next point."""
        *sums, norm = row
        loss = sums[0] / measured.tokens
        if not (math.isfinite(loss) and math.isfinite(norm)):
            learner.failure = {
                "message": f"non-finite loss ({loss}) or gradient norm ({norm})",
                "step": measured.step,
                "windows": [int(index) for index in measured.indices],
            }
            return
        has_teacher = self.teacher is not None and learner.alpha > 0
        values = {
            name: value
            for name, value in zip(SUMS, sums, strict=True)
            if has_teacher or name not in OF_A_TEACHER
        }
        so_far = self.sums[learner.id]
        so_far.add(values | {"gradient_norm": norm}, measured.tokens)
        every = max(1, learner.steps // CURVE_POINTS)
        done = measured.step + 1
        if done % every and done != learner.steps:
            return
        for column, value in so_far.means().items():
            learner.curve[column].append(value)
        learner.curve["step"].append(done)
        learner.curve["tokens"].append(done * measured.tokens)
        learner.curve["learning_rate"].append(rate)
        self.sums[learner.id] = _CurveSums()

    def save(self, folder: Path, step: int) -> None:
        self._read(keep=0)
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for learner in self.learners:
            optimizer = self.optimizers[learner.id]
            tensors |= training_tensors(learner.model, optimizer, learner.id)
            sums = self.sums[learner.id]
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
            self.sums[learner.id] = _CurveSums(**state["sums"])
            optimizer = self.optimizers[learner.id]
            restore_training(learner.model, optimizer, checkpoint.tensors, learner.id)
        return checkpoint.step


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Keeps the inputs of every layer alone; the backward pass computes the rest again."""
    # transformers renamed it, and warns of the old name
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def _sums(student: StudentLoss, column: ColumnLoss) -> Tensor:
    """What SUMS names, [len(SUMS)] in float64; 0 for what no teacher gave."""
    teacher = column.teacher
    found = (
        student.loss.detach(),
        student.ce,
        student.kl,
        student.agreement,
        None if teacher is None else teacher.ce,
        None if teacher is None else teacher.entropy,
    )
    zero = torch.zeros_like(student.ce)
    return torch.stack([zero if value is None else value for value in found]).double()


class _Copy:
    """Numbers on their way from the device to the host."""

    def __init__(self, values: Tensor) -> None:
        self.arrived = None
        self.values = values
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> list[list[float]]:
        """Waits for these numbers alone, not for work that was given to the device after them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


@dataclass(frozen=True)
class _Measured:
    """A step that was taken; `values` has for every learner SUMS and the gradient norm."""

    step: int
    tokens: int
    learners: list[Learner]
    rates: list[float]
    indices: np.ndarray
    values: _Copy


@dataclass
class _CurveSums:
    """Sums over the steps since the curve's last point."""

    steps: int = 0
    tokens: int = 0
    values: dict[str, float] = field(default_factory=dict)

    def add(self, values: dict[str, float], tokens: int) -> None:
        self.steps += 1
        self.tokens += tokens
        for name, value in values.items():
            self.values[name] = self.values.get(name, 0.0) + value

    def means(self) -> dict[str, float | None]:
        """Means per token, the gradient norm per step; None for what no teacher gave."""
        per_token = ("ce", "kl", "teacher_ce", "teacher_entropy", "agreement")
        means: dict[str, float | None] = {
            name: self.values[name] / self.tokens if name in self.values else None
            for name in per_token
        }
        means["gradient_norm"] = self.values["gradient_norm"] / self.steps
        return means
