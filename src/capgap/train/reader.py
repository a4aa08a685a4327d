"""The batches of a training run, read while the step before is still at work."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.corpus.batches import batch_indices, document_positions
from capgap.corpus.tokens import Corpus
from capgap.distill.teacher import Batch, TeacherSource

AHEAD = 3


@dataclass(frozen=True)
class ReadBatch:
    """A batch and the numbers of its windows."""

    indices: NDArray[np.int64]
    batch: Batch


class BatchReader:
    """Reads in one thread, `AHEAD` batches before they are asked for. A context manager."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_windows: int,
        seed: int,
        document_mask: bool,
        teacher: TeacherSource | None,
        device: torch.device,
        last_step: int,
    ) -> None:
        self.corpus = corpus
        self.batch_windows = batch_windows
        self.seed = seed
        self.document_mask = document_mask
        self.teacher = teacher
        self.device = device
        self.last_step = last_step
        self._pending: dict[int, Future[ReadBatch]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> ReadBatch:
        """The batch of this step on the device; what could not be read is raised here."""
        for coming in range(step, min(step + AHEAD, self.last_step) + 1):
            if coming not in self._pending:
                self._pending[coming] = self._thread.submit(self._read, coming)
        read = self._pending.pop(step).result()
        batch = read.batch
        return ReadBatch(read.indices, batch.to(self.device))

    def _read(self, step: int) -> ReadBatch:
        indices = batch_indices(
            seed=self.seed,
            step=step,
            batch_windows=self.batch_windows,
            num_windows=self.corpus.windows,
        )
        windows = self.corpus.train.windows_at(indices)
        positions = None
        if self.document_mask:
            positions = document_positions(windows[:, :-1], self.corpus.end_of_document)
        fetched = None if self.teacher is None else self.teacher.fetch(indices)
        return ReadBatch(
            indices,
            Batch(
                self._pin(torch.from_numpy(windows)),
                None if positions is None else self._pin(torch.from_numpy(positions)),
                None if fetched is None else self._pin(fetched),
            ),
        )

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor
