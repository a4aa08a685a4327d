"""Which documents are held out: a pure function of their content; duplicates; fair sampling."""

import hashlib
import heapq
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from capgap.corpus.sources import Source

DIGEST_BYTES = 16
DIGESTS = 1 << (8 * DIGEST_BYTES)
MIN_HELDOUT_DOCUMENTS = 8
HELDOUT_FRACTION = 0.02


def digest_of(document: bytes) -> int:
    """The document's identity, uniform in 0 .. DIGESTS - 1."""
    return int.from_bytes(hashlib.blake2b(document, digest_size=DIGEST_BYTES).digest())


@dataclass
class Reading:
    """What one pass over a source has met so far."""

    documents: int = 0
    duplicates: int = 0
    num_bytes: int = 0
    content: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def unique(self, source: Source, *, max_bytes: int | None) -> Iterator[tuple[int, bytes]]:
        """Yield digest and text of every document that has not come before.

        Stops before the document that would make them more than `max_bytes`, but not before the
        first. Only the digests are held in memory.
        """
        seen: set[int] = set()
        for document in source.documents():
            digest = digest_of(document)
            if digest in seen:
                self.documents += 1
                self.duplicates += 1
                continue
            if max_bytes is not None and seen and self.num_bytes + len(document) > max_bytes:
                return
            self.documents += 1
            seen.add(digest)
            self.num_bytes += len(document)
            self.content.update(digest.to_bytes(DIGEST_BYTES))
            yield digest, document


class SmallestDigests:
    """Keeps the documents of the smallest digests within a limit: a sample without an order's bias.

    The first document is kept whatever its size.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._heap: list[tuple[int, bytes]] = []  # the largest digest, negated, on top
        self._num_bytes = 0

    def add(self, digest: int, document: bytes) -> None:
        """Offer a document; those of larger digests make room for it."""
        heapq.heappush(self._heap, (-digest, document))
        self._num_bytes += len(document)
        while len(self._heap) > 1 and self._num_bytes > self._max_bytes:
            _, dropped = heapq.heappop(self._heap)
            self._num_bytes -= len(dropped)

    def documents(self) -> list[tuple[int, bytes]]:
        """Digest and text of what is kept, by rising digest."""
        return sorted((-negated, document) for negated, document in self._heap)


@dataclass(frozen=True)
class Split:
    """Held out is what has a digest below the threshold.

    Attributes:
        threshold: 0 when the held-out text is a source of its own.
        excluded: digests of that source, which must not be trained on either.
    """

    threshold: int
    excluded: frozenset[int] = frozenset()

    def is_heldout(self, digest: int) -> bool:
        """Whether the document belongs to the held-out part."""
        return digest < self.threshold


def split_for(fraction: float, digests: Collection[int]) -> Split:
    """The split that holds out about `fraction` of two or more documents.

    The threshold is that of the fraction, so that a document's part does not hang on the others.
    Only where that leaves too few, the documents of the smallest digests are held out: a tenth of
    them, up to MIN_HELDOUT_DOCUMENTS and at least one, since a standard error over documents
    needs several. One document at least is left for training.
    """
    num_least = max(1, min(MIN_HELDOUT_DOCUMENTS, len(digests) // 10))
    least = heapq.nsmallest(num_least, digests)[-1] + 1
    return Split(min(max(int(fraction * DIGESTS), least), max(digests)))
