"""Where the teacher's signal comes from: a model that runs beside its students, or a cache."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from capgap.distill.losses import HeadInput
from capgap.distill.sparse import SparseSignal
from capgap.models.build import split


@dataclass(frozen=True)
class Batch:
    """Windows of one step or micro-batch, on the device of the students.

    windows int64 [rows, window + 1]; positions [rows, window] within documents, or None; fetched:
    what the teacher's source read for these rows, or None.
    """

    windows: Tensor
    positions: Tensor | None = None
    fetched: Tensor | None = None

    @property
    def inputs(self) -> Tensor:
        """[rows, window]"""
        return self.windows[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[rows x window]"""
        return self.windows[:, 1:].reshape(-1)

    def to(self, device: torch.device) -> "Batch":
        """On that device; from pinned memory the host does not wait until it is there."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            move(self.windows),
            None if self.positions is None else move(self.positions),
            None if self.fetched is None else move(self.fetched),
        )

    def micro_batches(self, rows: int) -> list["Batch"]:
        """Parts of at most `rows` windows, in order."""
        parts = []
        for start in range(0, len(self.windows), rows):
            here = slice(start, start + rows)
            parts.append(
                Batch(
                    self.windows[here],
                    None if self.positions is None else self.positions[here],
                    None if self.fetched is None else self.fetched[here],
                )
            )
        return parts


class TeacherSource(Protocol):
    """What the loop asks of a teacher."""

    def fetch(self, indices: NDArray[np.int64]) -> Tensor | None:
        """What has to be read for these windows [rows, ...]; called ahead, in another thread."""

    def signal(self, batch: Batch, vocabulary: int) -> HeadInput | SparseSignal:
        """The teacher's side of the loss for a micro-batch, on the students' device."""


class OnlineTeacher:
    """A causal language model that runs in its own dtype, on its own device.

    Autocast of the students does not reach it. Where its device is not the students', its hidden
    states and its head go over for every micro-batch.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.parts = split(model.eval().requires_grad_(False))
        self.device = model.device

    def fetch(self, indices: NDArray[np.int64]) -> None:
        return None

    def signal(self, batch: Batch, vocabulary: int) -> HeadInput:
        positions = None if batch.positions is None else batch.positions.to(self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            source = HeadInput.of(self.parts, batch.inputs.to(self.device), vocabulary, positions)
        return source.to(batch.windows.device)
