"""Which documents are held out: a pure function of their content; duplicates; fair sampling."""

import hashlib
import heapq
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from capgap.corpus.sources import Source

DIGEST_BYTES = 16
DIGESTS = 1 << (8 * DIGEST_BYTES)
MIN_HELDOUT_DOCUMENTS = 8
HELDOUT_FRACTION = 0.02
# Text that a pass over a source holds in memory
SAMPLE_BYTES = 64_000_000


@dataclass
class Reading:
    """What one pass over a source has met so far."""

    documents: int = 0
    duplicates: int = 0
    num_bytes: int = 0
    content: "hashlib._Hash" = field(default_factory=hashlib.sha256)

    def unique(
        self, source: Source, *, max_bytes: int | None, max_documents: int | None = None
    ) -> Iterator[tuple[int, bytes]]:
        """Yield digest and text of every document that has not come before. The digest is the
        document's identity, uniform in 0 .. DIGESTS - 1.

        Stops before the document that would make them more than `max_bytes`, but not before the
        first, and behind so many documents, without reading on. Only the digests are held in
        memory.
        """
        seen: set[int] = set()
        for document in source.documents():
            hashed = hashlib.blake2b(document, digest_size=DIGEST_BYTES)
            digest = int.from_bytes(hashed.digest())
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
            # the next one of a data set would be fetched from the Hub
            if self.num_bytes == max_bytes or len(seen) == max_documents:
                return


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


@dataclass(frozen=True)
class Scan:
    """What a first pass over a source leaves behind.

    Attributes:
        reading: what was met, with the hash of all digests.
        digests: of all documents.
        candidates: documents of the smallest digests; those to evaluate on are among them.
        sample: documents of the smallest digests above the usual threshold.
        largest: the document of the largest digest.
    """

    reading: Reading
    digests: frozenset[int]
    candidates: list[tuple[int, bytes]]
    sample: list[tuple[int, bytes]]
    largest: tuple[int, bytes]

    def training_sample(self, split: Split) -> list[bytes]:
        """Documents of the sample that belong to the training part; one at least."""
        sample = [
            document
            for digest, document in self.sample
            if not split.is_heldout(digest) and digest not in split.excluded
        ]
        return sample or [self.largest[1]]


def scan(
    source: Source,
    *,
    max_bytes: int | None,
    max_documents: int | None = None,
    fraction: float = HELDOUT_FRACTION,
    candidate_bytes: int = SAMPLE_BYTES,
    sample_bytes: int = SAMPLE_BYTES,
    on_document: Callable[[int], None] = lambda num_bytes: None,
) -> Scan:
    """Read a source up to the limits, as `unique`; `on_document` is told the bytes so far.

    Args:
        fraction: the share that is held out, from which the usual threshold follows.
        candidate_bytes: how much text of candidates is kept.
        sample_bytes: how much text of the sample is kept.
    """
    candidates = SmallestDigests(max_bytes=candidate_bytes)
    sample = SmallestDigests(max_bytes=sample_bytes)
    reading = Reading()
    digests = set()
    largest = (-1, b"")
    documents = reading.unique(source, max_bytes=max_bytes, max_documents=max_documents)
    for digest, document in documents:
        digests.add(digest)
        candidates.add(digest, document)
        if digest >= int(fraction * DIGESTS):
            sample.add(digest, document)
        largest = max(largest, (digest, document))
        on_document(reading.num_bytes)
    return Scan(reading, frozenset(digests), candidates.documents(), sample.documents(), largest)
