"""Where the teacher's signal comes from: a model that runs beside its students, or a cache."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from capgap.corpus.text import Text
from capgap.distill.divergences import SparseSignal
from capgap.distill.head import IGNORED_LABEL, HeadInput, chunks, each_tensor
from capgap.errors import UserError
from capgap.machine import install_command
from capgap.models.build import DTYPES, load_model
from capgap.models.parallel import ALONE, Ranks, parallelize, release
from capgap.models.parts import Parts

# Forward passes, after which FSDP is made to forget them: it waits for backward passes to do so
RELEASE_EVERY = 1000


@dataclass(frozen=True)
class Batch:
    """Windows of one step or micro-batch, on the device of the students.

    windows int64 [rows, window + 1]; positions [rows, window] within documents, or None; fetched:
    what the teacher's source read for these rows, or None; labels [rows, window]: the targets
    where some do not count (IGNORED_LABEL), None where all do.
    """

    windows: Tensor
    positions: Tensor | None = None
    fetched: Tensor | None = None
    labels: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """[rows, window]"""
        return self.windows[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[rows x window]"""
        return (self.windows[:, 1:] if self.labels is None else self.labels).reshape(-1)

    @property
    def counted(self) -> Tensor:
        """How many targets count, a scalar on the batch's device."""
        return (self.targets != IGNORED_LABEL).sum()

    def to(self, device: torch.device) -> "Batch":
        """On that device; from pinned memory the host does not wait until it is there."""
        return each_tensor(self, lambda tensor: tensor.to(device, non_blocking=True))

    def micro_batches(self, rows: int) -> list["Batch"]:
        """Parts of at most `rows` windows, in order."""
        parts = chunks(len(self.windows), rows)
        return [each_tensor(self, operator.itemgetter(part)) for part in parts]

    def pinned(self) -> "Batch":
        """In memory that a GPU can read while the host goes on."""
        return each_tensor(self, Tensor.pin_memory)


class TeacherSource(Protocol):
    """What the loop asks of a teacher."""

    dtype: str
    """What it computes in, or did: float32, bfloat16."""

    def fetch(self, indices: NDArray[np.int64]) -> Tensor | None:
        """What has to be read for these windows [rows, ...]; called ahead, in another thread."""

    def signal(self, batch: Batch, vocabulary: int) -> HeadInput | SparseSignal:
        """The teacher's side of the loss for a micro-batch, on the students' device."""


def read_batch(
    corpus: Text,
    indices: NDArray[np.int64],
    *,
    document_mask: bool,
    ignored_labels: Sequence[int] = (),
    teacher: TeacherSource | None = None,
) -> Batch:
    """The training windows of these numbers, with what the teacher's source reads for them."""
    windows = corpus.train.windows_at(indices)
    positions = labels = None
    if document_mask:
        positions = torch.from_numpy(corpus.marks.positions(windows[:, :-1]))
    if ignored_labels:
        targets = windows[:, 1:]
        ignored = np.isin(targets, ignored_labels)
        labels = torch.from_numpy(np.where(ignored, IGNORED_LABEL, targets))
    fetched = None if teacher is None else teacher.fetch(indices)
    return Batch(torch.from_numpy(windows), positions, fetched, labels)


class OnlineTeacher:
    """A causal language model as the teacher of `capgap.train.loop.train`, put into evaluation
    without gradients, that runs in its own dtype (no autocast of the students), on its own
    device. Where that is not the students', its hidden states and head go over for every
    micro-batch. Sharded, every rank still has the tables and the head whole."""

    def __init__(self, model: PreTrainedModel | Parts) -> None:
        self.parts = model if isinstance(model, Parts) else Parts(model)
        self.parts.eval().requires_grad_(False)
        # not model.device: offloaded layers are on none
        self.device = self.parts.head.weight.device
        self.dtype = str(self.parts.head.weight.dtype).removeprefix("torch.")
        self._signals = 0
        self.is_offloaded = any(parameter.is_meta for parameter in self.parts.parameters())
        self.parameters = self.parts.active_parameters

    def fetch(self, indices: NDArray[np.int64]) -> None:
        return None

    def signal(self, batch: Batch, vocabulary: int) -> HeadInput:
        self._signals += 1
        if self._signals % RELEASE_EVERY == 0:
            release(self.parts)
        positions = None if batch.positions is None else batch.positions.to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            source = HeadInput.of(self.parts, batch.inputs.to(self.device), vocabulary, positions)
        return source.to(batch.windows.device)


def load_teacher(
    path_or_name: str | Path,
    device: str,
    *,
    dtype: str = "stored",
    offload: bool = False,
    ranks: Ranks = ALONE,
) -> OnlineTeacher:
    """A teacher from a folder or the hub, in that dtype (stored, fp32 or bf16) on that device.

    Several ranks shard it. With `offload` every rank has all of it: its layers lie in the host's
    memory, and each goes to the device for its part of a pass (the library accelerate does it).
    Raises UserError as load_model, and where accelerate is not installed.
    """
    parts = Parts(load_model(path_or_name, dtype=DTYPES[dtype]))
    if not offload:
        return OnlineTeacher(parallelize(parts, ranks, torch.device(device)))
    try:
        from accelerate import cpu_offload
    except ImportError:
        raise UserError(
            f"run.teacher_offload needs accelerate: {install_command('offload')}"
        ) from None
    parts.to(device)
    for layer in parts.layers:
        cpu_offload(layer, execution_device=torch.device(device))
    return OnlineTeacher(parts)
