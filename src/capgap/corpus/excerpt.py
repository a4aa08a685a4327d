"""A small sample of a text, the same for all who read it, shared fairly among its documents."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capgap.corpus.names import MANIFEST
from capgap.corpus.sources import open_source
from capgap.corpus.split import (
    HELDOUT_FRACTION,
    SAMPLE_BYTES,
    Reading,
    scan,
    smallest_digests,
    threshold_for,
)
from capgap.corpus.split import training_sample as sample_for
from capgap.corpus.tokenizer import TokenCodec
from capgap.corpus.tokens import Corpus, load_corpus
from capgap.errors import UserError
from capgap.mirror import local

# A source is read so far
READ_BYTES = 1 << 28
# So many documents are taken that this much of each, if it has it, makes up the sample
DOCUMENT_BYTES = 4096
# So many documents are evaluated that this many tokens of each, if it has them, make up the limit:
# many make the standard error over them small, but only later tokens have a whole context
HELDOUT_DOCUMENT_TOKENS = 512
# A token stands for more bytes than this only in tables and rulers
BYTES_PER_TOKEN = 16


class Passage(NamedTuple):
    """Text of one document from its beginning on; `whole` where it goes on to the end."""

    text: bytes
    whole: bool


def excerpt(source: str, num_bytes: int) -> list[Passage]:
    """Beginnings of documents, about `num_bytes` in all, valid UTF-8.

    Those of the smallest digests come first: what `capgap corpus` holds out of the same text, and
    then what it trains on. Of a folder that it prepared, only the held-out documents are taken.
    UserError: nothing there, no text.
    """
    corpus = prepared(source)
    if corpus is not None:
        found = heldout_passages(corpus)
    else:
        limit = max(SAMPLE_BYTES, num_bytes)
        reading = Reading(max_bytes=READ_BYTES)
        read = scan(open_source(source), reading, candidate_bytes=limit, sample_bytes=0)
        found = [Passage(document, whole=True) for _, document in read.candidates]
    valid = [Passage(text.decode("utf-8", "ignore").encode(), whole) for text, whole in found]
    passages = [one for one in valid if one.text.strip()]
    if not passages:
        raise UserError(f"{source!r} holds no text to measure on")
    sizes = (min(len(text), DOCUMENT_BYTES) for text, _ in passages)
    passages = passages[: num_enough(sizes, num_bytes)]
    limit = fair_limit([len(text) for text, _ in passages], num_bytes)
    return [
        Passage(cut_text(text, limit), whole and len(text) <= limit) for text, whole in passages
    ]


def training_sample(
    source: str,
    num_bytes: int,
    *,
    max_bytes: int | None = None,
    max_documents: int | None = None,
    **reading: str,
) -> list[bytes]:
    """Documents of a source that `capgap corpus` trains on, not of those it holds out: about
    `num_bytes` of the smallest digests, of the first `max_bytes` and `max_documents`.

    `reading` and UserError as `open_source`; also no text, one document alone.
    """
    opened = open_source(source, **reading)
    limits = Reading(min(READ_BYTES, max_bytes or READ_BYTES), max_documents)
    found = scan(opened, limits, sample_bytes=num_bytes)
    if len(limits.seen) < 2:
        raise UserError(
            f"{source!r} has {len(limits.seen)} documents: 2 or more are needed, one of them "
            "to hold out; a line <|endoftext|> parts those of a text file"
        )
    largest = found.largest[0]
    smallest = smallest_digests(found.rows)
    threshold = threshold_for(HELDOUT_FRACTION, len(limits.seen), smallest, largest[0])
    return sample_for(threshold, found.sample, largest)


def heldout_passages(corpus: Corpus) -> list[Passage]:
    """The text of a corpus's held-out documents, for models with other tokens or marks."""
    codec = TokenCodec(corpus.tokenizer)
    entries = corpus.manifest["heldout"]["evaluated"]
    documents = zip(corpus.heldout_documents(), entries, strict=True)
    return [Passage(codec.decode(one.tokens[1:]), entry["whole"]) for one, entry in documents]


def prepared(source: str) -> Corpus | None:
    """What `capgap corpus` made, where the source is its folder."""
    folder = Path(local(source))
    return load_corpus(folder, window=1) if (folder / MANIFEST).is_file() else None


def cut_for_evaluation(
    codec: TokenCodec, candidates: Sequence[tuple[int, bytes]], heldout_tokens: int
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """What the manifest says of the evaluated documents, and their tokens in a row.

    Every document gets the same limit, the largest that keeps to `heldout_tokens` in all. A whole
    document ends with the mark of its end; one that is cut does not.
    """
    most_bytes = HELDOUT_DOCUMENT_TOKENS * BYTES_PER_TOKEN
    beginnings = (len(codec.encode(cut_text(text, most_bytes))) for _, text in candidates)
    sizes = (min(size, HELDOUT_DOCUMENT_TOKENS) for size in beginnings)
    candidates = candidates[: num_enough(sizes, heldout_tokens)]
    # a first cut by bytes saves encoding what a second cut by tokens would drop
    byte_limit = fair_limit([len(text) for _, text in candidates], heldout_tokens * BYTES_PER_TOKEN)
    texts = [cut_text(text, byte_limit) for _, text in candidates]
    encoded = codec.encode_many(texts)
    limit = fair_limit([len(ids) + 1 for ids in encoded], heldout_tokens)
    entries, parts = [], []
    for (digest, document), text, ids in zip(candidates, texts, encoded, strict=True):
        whole = len(text) == len(document) and len(ids) < limit
        if not whole:
            text, ids = fit_tokens(codec, text, limit)
        parts.append(codec.marks.document(ids, whole=whole))
        size = {"tokens": len(parts[-1]) - 1, "bytes": len(text), "whole": whole}
        entries.append({"digest": f"{digest:032x}"} | size)
    return entries, np.concatenate(parts)


def num_enough(sizes: Iterable[int], total: int) -> int:
    """How many of the first sizes add up to `total`, or all; reads no more of them."""
    count = 0
    for size in sizes:
        count += 1
        total -= size
        if total <= 0:
            break
    return count


def fair_limit(sizes: Sequence[int], total: int) -> int:
    """The largest limit such that sizes cut to it add up to `total` or less."""
    limits = range(1, max(sizes) + 1)
    return bisect_right(limits, total, key=lambda limit: sum(min(size, limit) for size in sizes))


def fit_tokens(codec: TokenCodec, text: bytes, limit: int) -> tuple[bytes, NDArray[np.int64]]:
    """The longest easily found beginning of the text with at most `limit` tokens, and its ids."""
    ids = codec.encode(text)
    while len(ids) > limit:
        # by the share of tokens that fits; always shorter, so this ends
        text = cut_text(text, len(text) * limit // len(ids))
        ids = codec.encode(text)
    return text, ids


def cut_text(text: bytes, num_bytes: int) -> bytes:
    """The beginning of the text, no longer than asked, up to white space if there is any."""
    if len(text) <= num_bytes:
        return text
    end = max(text.rfind(mark, 1, num_bytes + 1) for mark in (b" ", b"\n"))
    if end < 1:
        end = num_bytes
        # not within a character: its later bytes all begin with the bits 10
        while end > 0 and text[end] & 0xC0 == 0x80:
            end -= 1
    return text[:end]
