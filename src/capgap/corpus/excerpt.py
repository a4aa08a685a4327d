"""A small sample of a text, the same for all who read it. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from capgap.corpus.sources import open_source
from capgap.corpus.split import (
    DIGESTS,
    HELDOUT_FRACTION,
    Reading,
    SmallestDigests,
    split_for,
)
from capgap.corpus.tokenizer import TokenCodec
from capgap.corpus.tokens import load_corpus, read_manifest
from capgap.corpus.write import SAMPLE_BYTES, cut_text, fair_limit
from capgap.errors import UserError

# A source is read so far
READ_BYTES = 1 << 28
# So many documents are taken that this much of each, if it has it, makes up the sample
DOCUMENT_BYTES = 4096


def excerpt(source: str, num_bytes: int) -> list[bytes]:
    """Beginnings of documents, about `num_bytes` in all, valid UTF-8.

    Those of the smallest digests come first: what `capgap corpus` holds out of the same text, and
    then what it trains on. Of a folder that it prepared, only the held-out documents are taken.
    UserError: nothing there, no text.
    """
    valid = [text.decode("utf-8", "ignore").encode() for text in _documents(source, num_bytes)]
    texts = _enough([text for text in valid if text.strip()], num_bytes)
    if not texts:
        raise UserError(f"{source!r} holds no text to measure on")
    limit = fair_limit([len(text) for text in texts], num_bytes)
    return [cut_text(text, limit) for text in texts]


def training_sample(source: str, num_bytes: int) -> list[bytes]:
    """Documents of a source that `capgap corpus` trains on, not of those it holds out: about
    `num_bytes` of the smallest digests.

    UserError: nothing there, no text, one document alone.
    """
    kept = SmallestDigests(max_bytes=num_bytes)
    digests = set()
    largest = (-1, b"")
    for digest, document in Reading().unique(open_source(source), max_bytes=READ_BYTES):
        digests.add(digest)
        largest = max(largest, (digest, document))
        if digest >= int(HELDOUT_FRACTION * DIGESTS):
            kept.add(digest, document)
    if len(digests) < 2:
        raise UserError(
            f"{source!r} has {len(digests)} documents: 2 or more are needed, one of them to hold "
            "out; a line <|endoftext|> parts those of a text file"
        )
    split = split_for(HELDOUT_FRACTION, digests)
    sample = [text for digest, text in kept.documents() if not split.is_heldout(digest)]
    return sample or [largest[1]]


def _documents(source: str, num_bytes: int) -> list[bytes]:
    folder = Path(source).expanduser()
    if folder.is_dir() and read_manifest(folder) is not None:
        corpus = load_corpus(folder, window=1)
        codec = TokenCodec(corpus.tokenizer)
        return [codec.decode(document.tokens[1:]) for document in corpus.heldout_documents()]
    kept = SmallestDigests(max_bytes=max(SAMPLE_BYTES, num_bytes))
    for digest, document in Reading().unique(open_source(source), max_bytes=READ_BYTES):
        kept.add(digest, document)
    return [document for _, document in kept.documents()]


def _enough(texts: Sequence[bytes], num_bytes: int) -> Sequence[bytes]:
    """The first documents whose beginnings hold `num_bytes`, or all."""
    held = 0
    for place, text in enumerate(texts, start=1):
        held += min(len(text), DOCUMENT_BYTES)
        if held >= num_bytes:
            return texts[:place]
    return texts
