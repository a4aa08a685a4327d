"""The content of a corpus folder: two passes over the source, tokenizer, shards, manifest.

The first pass removes duplicates, fixes the split and collects what the tokenizer learns from;
the second writes tokens. Neither holds more than a bounded part of the text.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capgap.artifact import write_json
from capgap.corpus.marks import Marks
from capgap.corpus.sources import Source
from capgap.corpus.split import SAMPLE_BYTES, Reading, Scan, Split, scan, split_for
from capgap.corpus.tokenizer import (
    TokenCodec,
    count_invalid_bytes,
    grouped,
    num_words,
    tokenizer_hash,
    train_tokenizer,
)
from capgap.corpus.tokens import HELDOUT, MANIFEST, SCHEMA, TOKENIZER, ShardWriter, token_dtype
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Called with a stage ("read" or "tokenize"), the bytes of text done, and all of them if known.
Progress = Callable[[str, int, int | None], None]

# Bounds the time that training a tokenizer takes; a larger vocabulary needs more text.
SAMPLE_BYTES_PER_TOKEN = 8_000
BATCH_BYTES = 4_000_000
# So many documents are evaluated that this many tokens of each, if it has them, make up the limit:
# many make the standard error over them small, but only later tokens have a whole context.
HELDOUT_DOCUMENT_TOKENS = 512
# A token stands for more bytes than this only in tables and rulers.
BYTES_PER_TOKEN = 16


@dataclass(frozen=True)
class Options:
    """What decides, beside the source, what a prepared corpus contains."""

    vocabulary: int | None
    tokenizer_hash: str | None
    heldout_fraction: float
    heldout_tokens: int
    max_bytes: int | None
    max_train_tokens: int | None
    begin_windows: bool


class Part(Counter[str]):
    """Counts of one part of a corpus, as the manifest names them."""

    def __init__(self) -> None:
        super().__init__(documents=0, bytes=0, invalid_bytes=0)

    def add(self, document: bytes) -> None:
        """Count one document."""
        self.update(documents=1, bytes=len(document), invalid_bytes=count_invalid_bytes(document))


@dataclass
class Counts:
    """Counts of all parts; `unused` is training text beyond the tokens asked for."""

    train: Part = field(default_factory=Part)
    heldout: Part = field(default_factory=Part)
    unused: Part = field(default_factory=Part)
    in_heldout_source: int = 0


def write_corpus(
    directory: Path,
    source: Source,
    heldout_source: Source | None,
    options: Options,
    *,
    tokenizer: "PreTrainedTokenizerFast | None",
    request: dict[str, Any],
    window: int,
    progress: Progress,
) -> str:
    """Fill an empty folder with a corpus and return its hash; `request` goes into the manifest.

    Raises:
        UserError: a source is empty, broken, or too small to split or to fill a window.
    """
    found = _scan(source, options, progress)
    split, candidates, counts = _choose_split(source, found, heldout_source, options, progress)
    if tokenizer is None:
        assert options.vocabulary is not None, "without a tokenizer there is a vocabulary"
        tokenizer = train_tokenizer(found.training_sample(split), options.vocabulary)
    tokenizer.save_pretrained(str(directory / TOKENIZER))
    codec = TokenCodec(tokenizer)
    marks = Marks.of(tokenizer, begin_windows=options.begin_windows)
    vocabulary = num_words(tokenizer)
    dtype = token_dtype(vocabulary)

    writer = ShardWriter(directory, "train", dtype)
    _write_train(writer, codec, source, found, split, options, counts, progress)
    if writer.num_tokens <= window:
        raise UserError(
            f"corpus {source.name!r} is too small: {writer.num_tokens} training tokens do not "
            f"fill one window of {window}; give more text or a smaller window"
        )
    evaluated, heldout_ids = _evaluated(codec, candidates, options.heldout_tokens)
    heldout_data = heldout_ids.astype(dtype).tobytes()
    with open(directory / HELDOUT, "wb") as stream:
        stream.write(heldout_data)

    identity = tokenizer_hash(tokenizer)
    heldout_hash = hashlib.sha256(heldout_data).hexdigest()
    content = f"{identity} {marks} {writer.sha256} {heldout_hash}"
    corpus_hash = hashlib.sha256(content.encode()).hexdigest()
    manifest = {
        "schema": SCHEMA,
        "corpus_hash": corpus_hash,
        "tokenizer_hash": identity,
        "vocabulary": vocabulary,
        "marks": asdict(marks),
        "dtype": dtype.str,
        "invalid_bytes_kept": codec.is_byte_level,
        "documents": {
            "read": found.reading.documents,
            "duplicates": found.reading.duplicates,
            "in_heldout_source": counts.in_heldout_source,
        },
        "train": {
            **counts.train,
            "tokens": writer.num_tokens,
            "sha256": writer.sha256,
            "shards": writer.shards,
        },
        "heldout": {
            **counts.heldout,
            "tokens": sum(entry["tokens"] for entry in evaluated),
            "sha256": heldout_hash,
            "evaluated": evaluated,
        },
        "unused": counts.unused,
        "options": asdict(options),
        "source": source.describe(),
        "heldout_source": None if heldout_source is None else heldout_source.describe(),
        "request": request,
    }
    write_json(directory / MANIFEST, manifest)
    return corpus_hash


def _scan(source: Source, options: Options, progress: Progress) -> Scan:
    found = scan(
        source,
        max_bytes=options.max_bytes,
        fraction=options.heldout_fraction,
        sample_bytes=min(SAMPLE_BYTES, (options.vocabulary or 0) * SAMPLE_BYTES_PER_TOKEN),
        on_document=lambda num_bytes: progress("read", num_bytes, None),
    )
    if not found.digests:
        raise UserError(f"corpus {source.name!r} is empty: it holds no text")
    return found


def _choose_split(
    source: Source,
    found: Scan,
    heldout_source: Source | None,
    options: Options,
    progress: Progress,
) -> tuple[Split, list[tuple[int, bytes]], Counts]:
    """The split, the documents to evaluate on, and counts with a held-out source's in them."""
    counts = Counts()
    if heldout_source is None:
        if len(found.digests) == 1:
            raise UserError(
                f"corpus {source.name!r} is one document, and a document is never split between "
                f"training and held-out: part it by lines {source.separator!r} (or name your own "
                "separator), add documents, or give held-out text of its own"
            )
        split = split_for(options.heldout_fraction, found.digests)
        heldout = [entry for entry in found.candidates if split.is_heldout(entry[0])]
        return split, heldout, counts

    heldout_scan = _scan(heldout_source, options, progress)
    split = Split(threshold=0, excluded=heldout_scan.digests)
    if found.digests <= split.excluded:
        raise UserError(
            f"corpus {source.name!r} holds nothing but documents of the held-out source "
            f"{heldout_source.name!r}: give other text to train on"
        )
    for _, document in Reading().unique(heldout_source, max_bytes=options.max_bytes):
        counts.heldout.add(document)
    return split, heldout_scan.candidates, counts


def _write_train(
    writer: ShardWriter,
    codec: TokenCodec,
    source: Source,
    found: Scan,
    split: Split,
    options: Options,
    counts: Counts,
    progress: Progress,
) -> None:
    """Second pass: write every training document and what parts it from the next; the first one
    begins like the others."""
    between = codec.marks.between
    writer.append(between[-1:])
    limit = options.max_train_tokens
    reading = Reading()
    documents = reading.unique(source, max_bytes=options.max_bytes)
    for batch in grouped(documents, lambda entry: len(entry[1]), BATCH_BYTES):
        texts = []
        for digest, document in batch:
            if split.is_heldout(digest):
                counts.heldout.add(document)
            elif digest in split.excluded:
                counts.in_heldout_source += 1
            elif limit is not None and writer.num_tokens >= limit:
                counts.unused.add(document)
            else:
                texts.append(document)
        for text, ids in zip(texts, codec.encode_many(texts), strict=True):
            room = len(ids) + 1 if limit is None else limit - writer.num_tokens
            if len(ids) < room:
                counts.train.add(text)
                writer.append(np.concatenate([ids, between])[: limit and limit - writer.num_tokens])
                continue
            cut, ids = fit_tokens(codec, text, room)
            counts.unused.add(text[len(cut) :])
            if cut:
                counts.train.add(cut)
                writer.append(ids)
            # A cut before a long word may leave room that no later document should fill.
            limit = writer.num_tokens
        progress("tokenize", reading.num_bytes, found.reading.num_bytes)
    if reading.content.digest() != found.reading.content.digest():
        raise UserError(f"corpus {source.name!r} changed while it was read; prepare it again")


def _evaluated(
    codec: TokenCodec, candidates: Sequence[tuple[int, bytes]], heldout_tokens: int
) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
    """What the manifest says of the evaluated documents, and their tokens in a row.

    Every document gets the same limit, the largest that keeps to `heldout_tokens` in all. A whole
    document ends with the mark of its end; one that is cut does not.
    """

    def beginning(document: bytes) -> int:
        text = cut_text(document, HELDOUT_DOCUMENT_TOKENS * BYTES_PER_TOKEN)
        return min(len(codec.encode(text)), HELDOUT_DOCUMENT_TOKENS)

    sizes = (beginning(document) for _, document in candidates)
    candidates = candidates[: num_enough(sizes, heldout_tokens)]
    # A first cut by bytes saves encoding what a second cut by tokens would drop.
    byte_limit = fair_limit(
        [len(document) for _, document in candidates], heldout_tokens * BYTES_PER_TOKEN
    )
    texts = [cut_text(document, byte_limit) for _, document in candidates]
    encoded = codec.encode_many(texts)
    limit = fair_limit([len(ids) + 1 for ids in encoded], heldout_tokens)
    entries, parts = [], []
    for (digest, document), text, ids in zip(candidates, texts, encoded, strict=True):
        whole = len(text) == len(document) and len(ids) < limit
        if not whole:
            text, ids = fit_tokens(codec, text, limit)
        tokens = codec.marks.document(ids, whole=whole)
        entries.append(
            {
                "digest": f"{digest:032x}",
                "tokens": len(tokens) - 1,
                "bytes": len(text),
                "whole": whole,
            }
        )
        parts.append(tokens)
    return entries, np.concatenate(parts)


def num_enough(sizes: Iterable[int], total: int) -> int:
    """How many of the first sizes add up to `total`, or all; reads no more of them."""
    held = count = 0
    for count, size in enumerate(sizes, start=1):
        held += size
        if held >= total:
            return count
    return count


def fair_limit(sizes: Sequence[int], total: int) -> int:
    """The largest limit such that sizes cut to it add up to `total` or less."""
    limits = range(1, max(sizes) + 1)
    return bisect_right(limits, total, key=lambda limit: sum(min(size, limit) for size in sizes))


def fit_tokens(codec: TokenCodec, text: bytes, limit: int) -> tuple[bytes, NDArray[np.int64]]:
    """The longest easily found beginning of the text with at most `limit` tokens, and its ids."""
    ids = codec.encode(text)
    while len(ids) > limit:
        # By the share of tokens that fits; always shorter, so this ends.
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
        # Not within a character: its later bytes all begin with the bits 10.
        while end > 0 and text[end] & 0xC0 == 0x80:
            end -= 1
    return text[:end]
