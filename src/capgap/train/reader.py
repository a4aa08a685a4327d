"""The batches of a training run, read while the step before is still at work."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from capgap.corpus.text import Text
from capgap.distill.head import IGNORED_LABEL
from capgap.distill.teacher import Batch, TeacherSource
from capgap.models.parallel import ALONE, Ranks

AHEAD = 3


@dataclass(frozen=True)
class ReadBatch:
    """This rank's part of a batch, and the numbers of the windows of all ranks."""

    indices: NDArray[np.int64]
    batch: Batch


@dataclass
class BatchReader:
    """Reads in one thread, `AHEAD` batches before they are asked for. A context manager."""

    corpus: Text
    _: KW_ONLY
    batch_windows: int
    seed: int
    document_mask: bool
    teacher: TeacherSource | None
    device: torch.device
    last_step: int
    ignored_labels: Sequence[int] = ()
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self._mine = self.ranks.share(self.batch_windows)
        self._pending: dict[int, Future[ReadBatch]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __enter__(self) -> "BatchReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def take(self, step: int) -> ReadBatch:
        """This rank's part of a step on the device; what could not be read is raised here."""
        for coming in range(step, min(step + AHEAD, self.last_step) + 1):
            if coming not in self._pending:
                self._pending[coming] = self._thread.submit(self._read, coming)
        # a step may be asked for again, until a later one is
        for past in [one for one in self._pending if one < step]:
            del self._pending[past]
        read = self._pending[step].result()
        return ReadBatch(read.indices, read.batch.to(self.device))

    def _read(self, step: int) -> ReadBatch:
        indices = self.corpus.batch(seed=self.seed, step=step, batch_windows=self.batch_windows)
        mine = indices[self._mine]
        windows = self.corpus.train.windows_at(mine)
        positions = labels = None
        if self.document_mask:
            positions = torch.from_numpy(self.corpus.marks.positions(windows[:, :-1]))
        if self.ignored_labels:
            targets = windows[:, 1:]
            ignored = np.isin(targets, self.ignored_labels)
            labels = torch.from_numpy(np.where(ignored, IGNORED_LABEL, targets))
        fetched = None if self.teacher is None else self.teacher.fetch(mine)
        batch = Batch(torch.from_numpy(windows), positions, fetched, labels)
        return ReadBatch(indices, batch.pinned() if self.device.type == "cuda" else batch)
