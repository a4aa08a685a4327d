"""The one training loop.

It trains any number of models on the same batches: one model without a teacher is pre-training or
a baseline, several with a teacher are a column, whose teacher runs once for all of them.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.corpus.text import Text
from capgap.distill.divergences import Divergence
from capgap.distill.head import HeadInput
from capgap.distill.losses import FORWARD_KL, ColumnLoss, column_loss
from capgap.distill.teacher import Batch, OnlineTeacher, TeacherSource, read_batch
from capgap.errors import Interrupted
from capgap.models.build import checkpoint_activations
from capgap.models.parallel import ALONE, Ranks, whole
from capgap.train import compiling
from capgap.train.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    find_best,
    find_last,
    read_tensors,
    set_updates,
    training_tensors,
    updates,
)
from capgap.train.learner import BETAS, Learner, make_optimizer
from capgap.train.learning_rate import COSINE, Schedule
from capgap.train.metrics import (
    COLUMNS,
    CurveSums,
    Reporter,
    StageClock,
    StepReports,
    Taken,
    column_sums,
)

# Batches that are read before they are asked for
AHEAD = 3


@dataclass(frozen=True)
class LoopSettings:
    """What all models of one loop share. Batches and micro-batches are counted in windows.

    A batch is that of all ranks together, a micro-batch that of one. Labels in `ignored_labels`
    do not count. Every `heldout_steps` the held-out loss is taken, and the checkpoint with the
    lowest is kept.
    """

    batch_windows: int
    micro_batch_windows: int
    data_seed: int
    temperature: float = 1.0
    divergence: Divergence = FORWARD_KL
    schedule: Schedule = COSINE
    betas: tuple[float, float] = BETAS
    weight_decay: float = 0.1
    decay_embeddings: bool = False
    clip: float = 1.0
    document_mask: bool = False
    ignored_labels: tuple[int, ...] = ()
    activation_checkpointing: bool = False
    autocast_dtype: torch.dtype | None = None
    checkpoint_seconds: float = 30.0
    checkpoint_share: float = 0.02
    checkpoints: int = 2
    heldout_steps: int | None = None
    compile: Literal["auto", "on", "off"] = "off"


@dataclass(frozen=True)
class Progress:
    """After every step; `learner_tokens` counts the batch once for each model that took it,
    `tokens` those of all steps.

    `reports` are those of the steps that have become known since the last time: on a GPU a step
    late, since waiting for the last one would leave the GPU without work. `heldout`: losses after
    this step by learner, empty where they were not taken.
    """

    step: int
    tokens: int
    learner_tokens: int
    reports: list[StepReports]
    heldout: dict[str, float]


def train(
    learners: Sequence[Learner],
    corpus: Text,
    settings: LoopSettings,
    *,
    teacher: TeacherSource | None = None,
    clock: StageClock | None = None,
    checkpoint_folder: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Progress], None] = lambda progress: None,
    on_end: Callable[[Learner], None] = lambda learner: None,
    heldout_loss: Callable[[Learner], float] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Trains every learner in place, on the same batches, to its own number of steps, and calls
    `on_end` with each. One whose loss or gradient is not finite ends with a `failure`. One pass of
    a `teacher` serves all whose `alpha` is above 0.

    With a checkpoint folder it continues from its last whole checkpoint, saves every
    `checkpoint_seconds`, less often where that would take more than `checkpoint_share` of the time,
    and when `should_stop` says so, saves and raises Interrupted. On one CPU process an interrupted
    run that continues equals an uninterrupted one bit for bit.

    With several ranks every one calls this with its parts of the same models (`parallelize`), and
    any of them can stop all. `heldout_loss` belongs to `settings.heldout_steps`.
    """
    device = next(learners[0].model.parameters()).device
    clock = clock or StageClock(device)
    column = _Column(learners, teacher, settings, clock, corpus.vocabulary, device, ranks)
    step, writer = 0, None
    if checkpoint_folder is not None:
        step = column.restore(checkpoint_folder)
        writer = CheckpointWriter(
            checkpoint_folder,
            keep=settings.checkpoints,
            seconds=settings.checkpoint_seconds,
            share=settings.checkpoint_share,
            device=device,
            ranks=ranks,
        )
    for learner in learners:
        if not learner.active(step):
            on_end(learner)
    steps = range(step, max(learner.steps for learner in learners))
    batches = _batches(corpus, settings, teacher, device, steps, ranks)
    with closing(batches), writer or nullcontext():
        coming: Iterator[_ReadBatch] = batches
        if any(learner.active(step) for learner in learners):
            first = next(batches)
            column.settle_compiling(first, step, checkpoint_folder)
            coming = chain([first], batches)
        while any(learner.active(step) for learner in learners):
            with clock.stage("batches"):
                read = next(coming)
            trained = [learner for learner in learners if learner.active(step)]
            reports = column.step(step, read)
            step += 1
            tokens = len(read.indices) * corpus.window
            losses = {}
            if heldout_loss is not None and column.is_measured(step):
                with clock.stage("evaluation"):
                    losses = {one.id: heldout_loss(one) for one in trained if one.failure is None}
                # one that is not finite is as good as not taken
                losses = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
            on_step(Progress(step, step * tokens, tokens * len(trained), reports, losses))
            stopping = saving = False
            if writer is not None:
                # the first rank's clock, or the ranks would save at different steps; a rank that
                # cannot write makes all come to where that is raised
                due = (ranks.is_first and writer.is_due()) or writer.has_failed()
                stopping, due = ranks.agree(should_stop(), due)
                saving = stopping or due or bool(losses)
            if saving:
                # a run that goes on from here does not take these steps again
                late = column.reporter.read(all_steps=True)
                if late:
                    on_step(Progress(step, step * tokens, 0, late, {}))
            for learner in trained:
                if not learner.active(step):
                    on_end(learner)
            if writer is not None and saving:
                with clock.stage("checkpoint"):
                    column.save(writer, step, losses)
                    if stopping:
                        writer.finish()
            if stopping:
                raise Interrupted


def restore_best(learners: Sequence[Learner], folder: Path, ranks: Ranks = ALONE) -> int | None:
    """Gives the learners the weights of the checkpoint with the lowest held-out loss, the mean over
    learners; returns its step, None where no loss was taken."""
    checkpoint = find_best(folder, ranks)
    if checkpoint is None:
        return None
    for learner in learners:
        read_tensors(checkpoint, training_tensors(learner.model, None, learner.id), ranks)
    return checkpoint.step


class _ReadBatch(NamedTuple):
    """This rank's part of a batch, and the numbers of the windows of all ranks."""

    indices: NDArray[np.int64]
    batch: Batch


def _batches(
    corpus: Text,
    settings: LoopSettings,
    teacher: TeacherSource | None,
    device: torch.device,
    steps: range,
    ranks: Ranks,
) -> Generator[_ReadBatch, None, None]:
    """The batches of these steps on the device, read in a thread while the steps before them are
    at work; what could not be read is raised at its step."""
    mine = ranks.share(settings.batch_windows)

    def read(step: int) -> _ReadBatch:
        indices = corpus.batch(
            seed=settings.data_seed, step=step, batch_windows=settings.batch_windows
        )
        batch = read_batch(
            corpus,
            indices[mine],
            document_mask=settings.document_mask,
            ignored_labels=settings.ignored_labels,
            teacher=teacher,
        )
        return _ReadBatch(indices, batch.pinned() if device.type == "cuda" else batch)

    thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
    try:
        coming = (thread.submit(read, step) for step in steps)
        pending = deque(islice(coming, AHEAD))
        while pending:
            pending.extend(islice(coming, 1))
            indices, batch = pending.popleft().result()
            yield _ReadBatch(indices, batch.to(device))
    finally:
        thread.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Column:
    """The models of one loop with their optimizers, and a step of all of them."""

    learners: Sequence[Learner]
    teacher: TeacherSource | None
    settings: LoopSettings
    clock: StageClock
    vocabulary: int
    device: torch.device
    ranks: Ranks

    def __post_init__(self) -> None:
        settings = self.settings
        self.optimizers = {}
        self.stopped = {}
        for learner in self.learners:
            if settings.activation_checkpointing:
                checkpoint_activations(learner.model)
            learner.parts.train()
            self.optimizers[learner.id] = make_optimizer(
                learner.model,
                weight_decay=settings.weight_decay,
                decay_embeddings=settings.decay_embeddings,
                betas=settings.betas,
            )
            self.stopped[learner.id] = torch.zeros((), dtype=torch.bool, device=self.device)
        self.is_compiled = False
        self.reporter = Reporter(self.learners, self.device, self.teacher is not None)

    def step(self, step: int, read: _ReadBatch) -> list[StepReports]:
        """One optimizer step of every active learner; returns the reports that it made known."""
        active = [learner for learner in self.learners if learner.active(step)]
        tokens = read.batch.windows[:, 1:].numel() * self.ranks.world
        sums = torch.zeros(len(active), len(COLUMNS) - 1, dtype=torch.float64, device=self.device)
        # of all micro-batches of all ranks; a batch in which none counts has loss and gradient 0
        counted = self.ranks.total(read.batch.counted).clamp_min(1)
        with _random_state(self.settings.data_seed, step, self.ranks.rank, self.device):
            for batch in read.batch.micro_batches(self.settings.micro_batch_windows):
                result = self._forward(active, batch)
                with self.clock.stage("backward"):
                    torch.autograd.backward([one.loss / counted for one in result.students])
                sums += column_sums(result)
        with self.clock.stage("optimizer"):
            # of every rank, [ranks, learners, ...]: whose loss is not finite can then be said
            every = self.ranks.gather(sums)
            norms = [
                self._update(learner, step, loss)
                for learner, loss in zip(active, every[:, :, 0].sum(0), strict=True)
            ]
            norm = torch.stack(norms).double().expand(self.ranks.world, -1)
            values = torch.cat([every, norm.unsqueeze(-1)], dim=-1)
            rates = [self.optimizers[learner.id].param_groups[0]["lr"] for learner in active]
            taken = Taken(step, tokens, active, rates, read.indices, values)
            self.reporter.unread.append(taken)
        return self.reporter.read(
            all_steps=self.is_measured(step + 1) or any(step + 1 == one.steps for one in active)
        )

    def settle_compiling(self, read: _ReadBatch, step: int, folder: Path | None) -> None:
        """Compiles layers and loss, or does not: see `compiling.settle`."""
        active = [learner for learner in self.learners if learner.active(step)]
        batch, *others = read.batch.micro_batches(self.settings.micro_batch_windows)

        def trial(compiled: bool) -> None:
            self.is_compiled = compiled
            with _random_state(self.settings.data_seed, step, self.ranks.rank, self.device):
                result = self._forward(active, batch)
                torch.autograd.backward([one.loss for one in result.students])
            for learner in active:
                self.optimizers[learner.id].zero_grad()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        models = [learner.parts for learner in self.learners]
        if isinstance(self.teacher, OnlineTeacher) and not self.teacher.is_offloaded:
            models.append(self.teacher.parts)
        steps = max(learner.steps for learner in active) - step
        self.is_compiled = compiling.settle(
            self.settings.compile,
            models,
            trial,
            shapes={(len(one.inputs), one.inputs.shape[1]) for one in (batch, *others)},
            trials_left=steps * (1 + len(others)),
            folder=folder,
            device=self.device,
            ranks=self.ranks,
        )

    def is_measured(self, steps: int) -> bool:
        """Whether the held-out loss is taken after so many steps: the last one always."""
        every = self.settings.heldout_steps
        last = max(learner.steps for learner in self.learners)
        return every is not None and (steps % every == 0 or steps == last)

    def _forward(self, active: Sequence[Learner], batch: Batch) -> ColumnLoss:
        signal = None
        if self.teacher is not None and any(learner.alpha > 0 for learner in active):
            with self.clock.stage("teacher_forward"):
                signal = self.teacher.signal(batch, self.vocabulary)
        dtype = self.settings.autocast_dtype
        # every weight is used once: a cache of its bf16 copies would only hold on to them
        with (
            self.clock.stage("forward"),
            torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            students = [
                HeadInput.of(learner.parts, batch.inputs, self.vocabulary, batch.positions)
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
                # blocks that stay in a CPU's cache leave nothing to fuse
                compiled=self.is_compiled and self.device.type != "cpu",
            )

    def _update(self, learner: Learner, step: int, loss: Tensor) -> Tensor:
        """Clip and step; returns the gradient norm, which nobody has to wait for.

        A non-finite loss or gradient stops the learner: from then on its optimizer changes
        nothing, by the flag that torch's fused optimizers read on the device (`found_inf`, made
        for gradient scaling).
        """
        optimizer = self.optimizers[learner.id]
        parameters = learner.model.parameters()
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip))
        stopped = self.stopped[learner.id]
        stopped.logical_or_(~(torch.isfinite(loss) & torch.isfinite(norm)))
        optimizer.found_inf = stopped.float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        share = self.settings.schedule.share(step, learner.steps)
        for group in optimizer.param_groups:
            group["lr"] = learner.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        return norm

    def save(self, writer: CheckpointWriter, step: int, losses: dict[str, float]) -> None:
        """losses: held-out losses after this step, empty where they were not taken."""
        tensors: dict[str, Tensor] = {}
        state: dict[str, Any] = {}
        for learner in self.learners:
            optimizer = self.optimizers[learner.id]
            tensors |= training_tensors(learner.model, optimizer, learner.id)
            state[learner.id] = {
                "curve": learner.curve,
                "failure": learner.failure,
                "sums": vars(self.reporter.sums[learner.id]),
                "updates": updates(optimizer),
            }
        writer.save(Checkpoint(step, state, losses), tensors)

    def restore(self, folder: Path) -> int:
        """The step to go on from; 0 when there is no checkpoint, or one of other learners."""
        checkpoint = find_last(folder, self.ranks)
        if checkpoint is None or any(one.id not in checkpoint.state for one in self.learners):
            return 0
        tensors: dict[str, Tensor] = {}
        for learner in self.learners:
            state = checkpoint.state[learner.id]
            learner.curve, learner.failure = state["curve"], state["failure"]
            self.reporter.sums[learner.id] = CurveSums(**state["sums"])
            optimizer = self.optimizers[learner.id]
            set_updates(optimizer, state["updates"])
            tensors |= training_tensors(learner.model, optimizer, learner.id)
        read_tensors(checkpoint, tensors, self.ranks)
        return checkpoint.step


@contextmanager
def _random_state(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Dropout, where a model has it, draws by (seed, step, rank), and a run that continues draws
    what an uninterrupted one would. The caller's random state comes back at the end."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        digest = hashlib.blake2b(f"step {seed} {step} {rank}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(digest, "little"))
        yield
