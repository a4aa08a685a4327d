"""Which documents are held out: a pure function of their content; duplicates; fair sampling."""

import hashlib
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capgap.corpus.sources import Source

DIGEST_BYTES = 16
DIGESTS = 1 << (8 * DIGEST_BYTES)
MIN_HELDOUT_DOCUMENTS = 8
HELDOUT_FRACTION = 0.02
# Text that a pass over a source holds in memory
SAMPLE_BYTES = 64_000_000
# A document: its digest, where it comes in what was read, its size
ROW = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<i8"), ("bytes", "<i8")])


def digest_of(document: bytes) -> int:
    """The document's identity, uniform in 0 .. DIGESTS - 1."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=DIGEST_BYTES).digest())


def number_of(row: Any) -> int:
    """The digest in a ROW."""
    return int(row["high"]) << 64 | int(row["low"])


@dataclass
class Reading:
    """What passes over sources have met so far. Limits hold over all of them: `max_bytes` and
    `max_documents` of different documents, whose digests are held in memory then alone."""

    max_bytes: int | None = None
    max_documents: int | None = None
    num_bytes: int = 0
    is_full: bool = False
    seen: set[int] = field(default_factory=set)

    @property
    def is_limited(self) -> bool:
        return (self.max_bytes, self.max_documents) != (None, None)

    def documents(self, source: Source) -> Iterator[tuple[int, bytes]]:
        """Digest and text of every document.

        Stops before the document that would make them more than `max_bytes`, but not before the
        first, and behind so many documents, without reading on.
        """
        for document in source.documents():
            digest = digest_of(document)
            if not self.is_limited:
                self.num_bytes += len(document)
            elif digest not in self.seen:
                size = self.num_bytes + len(document)
                if self.max_bytes is not None and self.seen and size > self.max_bytes:
                    self.is_full = True
                    return
                self.seen.add(digest)
                self.num_bytes = size
            yield digest, document
            # the next one of a data set would be fetched from the Hub
            self.is_full = self.num_bytes == self.max_bytes or len(self.seen) == self.max_documents
            if self.is_full:
                return


class SmallestDigests:
    """Keeps the documents of the smallest digests that together are within a limit, whatever the
    order and however often they come: a sample without an order's bias.

    The first document is kept whatever its size.
    """

    def __init__(self, *, max_bytes: int, end: int = DIGESTS) -> None:
        self._max_bytes = max_bytes
        self._heap: list[tuple[int, bytes]] = []  # the largest digest, negated, on top
        self._kept: set[int] = set()
        self._num_bytes = 0
        self.end = end  # the smallest that had no room

    def add(self, digest: int, document: bytes) -> None:
        """Offer a document; those of larger digests make room for it."""
        if digest >= self.end or digest in self._kept:
            return
        heapq.heappush(self._heap, (-digest, document))
        self._kept.add(digest)
        self._num_bytes += len(document)
        while len(self._heap) > 1 and self._num_bytes > self._max_bytes:
            negated, dropped = heapq.heappop(self._heap)
            self.end = -negated
            self._kept.remove(self.end)
            self._num_bytes -= len(dropped)

    def documents(self) -> list[tuple[int, bytes]]:
        """Digest and text of what is kept, by rising digest."""
        return sorted((-negated, document) for negated, document in self._heap)


def threshold_for(
    fraction: float, num_documents: int, smallest: Sequence[int], largest: int
) -> int:
    """The digest below which documents are held out, about `fraction` of two or more documents,
    whose digests are `smallest`, by rising size MIN_HELDOUT_DOCUMENTS of them or all, to `largest`.

    It is that of the fraction, so that a document's part does not hang on the others. Only where
    that leaves too few, the documents of the smallest digests are held out: a tenth of them, up to
    MIN_HELDOUT_DOCUMENTS and at least one, since a standard error over documents needs several. One
    document at least is left for training.
    """
    num_least = max(1, min(MIN_HELDOUT_DOCUMENTS, num_documents // 10))
    return min(max(int(fraction * DIGESTS), smallest[num_least - 1] + 1), largest)


@dataclass(frozen=True)
class Scan:
    """What a first pass over a source leaves behind.

    Attributes:
        rows: of all documents, ROW [num_documents], by rising digest and then by index.
        candidates: documents of the smallest digests; those to evaluate on are among them.
        sample: documents of the smallest digests above the usual threshold.
        largest: the document of the largest digest, if there is any.
        ends: of candidates and sample, the first digest for which there was no room.
    """

    rows: NDArray[Any]
    candidates: list[tuple[int, bytes]]
    sample: list[tuple[int, bytes]]
    largest: list[tuple[int, bytes]]
    ends: dict[str, int]


def training_sample(
    threshold: int, sample: Sequence[tuple[int, bytes]], largest: tuple[int, bytes]
) -> list[bytes]:
    """Documents of a `Scan`'s sample that belong to the training part; one at least."""
    return [text for digest, text in sample if digest >= threshold] or [largest[1]]


def smallest_digests(rows: NDArray[Any]) -> list[int]:
    """The first digests of a `Scan`'s rows that are different, MIN_HELDOUT_DOCUMENTS at most."""
    found: list[int] = []
    at = 0
    while at < len(rows) and len(found) < MIN_HELDOUT_DOCUMENTS:
        found.append(number_of(rows[at]))
        # those of one text stand together
        while at < len(rows) and number_of(rows[at]) == found[-1]:
            at += 1
    return found


def scan(
    source: Source,
    reading: Reading,
    *,
    fraction: float = HELDOUT_FRACTION,
    candidate_bytes: int = SAMPLE_BYTES,
    sample_bytes: int = SAMPLE_BYTES,
    on_document: Callable[[int], None] = lambda num_bytes: None,
) -> Scan:
    """Read a source; `on_document` is told the bytes so far.

    Args:
        reading: whose limits hold, and which goes on.
        fraction: the share that is held out, from which the usual threshold follows.
        candidate_bytes: how much text of candidates is kept.
        sample_bytes: how much text of the sample is kept.
    """
    candidates = SmallestDigests(max_bytes=candidate_bytes)
    sample = SmallestDigests(max_bytes=sample_bytes)
    digests, sizes = bytearray(), []
    largest: list[tuple[int, bytes]] = []
    for digest, document in reading.documents(source):
        digests += digest.to_bytes(DIGEST_BYTES)
        sizes.append(len(document))
        candidates.add(digest, document)
        if digest >= int(fraction * DIGESTS):
            sample.add(digest, document)
        largest = [max([*largest, (digest, document)])]
        on_document(reading.num_bytes)
    rows = np.empty(len(sizes), ROW)
    rows["high"], rows["low"] = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    rows["index"], rows["bytes"] = np.arange(len(sizes)), sizes
    order = np.lexsort((rows["low"], rows["high"]))
    ends = {"candidates": candidates.end, "sample": sample.end}
    return Scan(rows[order], candidates.documents(), sample.documents(), largest, ends)
