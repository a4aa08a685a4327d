"""The files of a source, chunk by chunk: each is read on its own, in any process and on any machine
that reaches the files, and leaves what it found in a folder, so that a stopped preparation goes on.

A chunk is one large file, or smaller ones in a row. What is found does not depend on who read what.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capgap.artifact import digest, file_hash, file_written, read_json, write_json
from capgap.corpus.excerpt import fit_tokens
from capgap.corpus.sources import Source
from capgap.corpus.split import (
    ROW,
    SAMPLE_BYTES,
    Reading,
    SmallestDigests,
    digest_of,
    number_of,
    scan,
    smallest_digests,
)
from capgap.corpus.tokenizer import TokenCodec, count_invalid_bytes, grouped, load_tokenizer
from capgap.errors import UserError

CHUNK_BYTES = 1 << 26
BATCH_BYTES = 4_000_000
# Digests that are compared at once
PARTITION_BYTES = 1 << 26
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Chunk:
    """Some files of a source; what is found of them lies in files that begin with `stem`."""

    source: Source
    stem: Path

    def file(self, ending: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}.{ending}")

    def rows(self) -> NDArray[Any]:
        """Of all documents, ROW [num_documents], by rising digest."""
        found: NDArray[Any] = np.load(self.file("rows.npy"), mmap_mode="r")
        return found

    def kept(self, what: str) -> list[tuple[int, bytes]]:
        """Digest and text of the `candidates`, the `sample` or the `largest`, as `Scan`."""
        told = read_json(self.file("read.json"))[what]
        with self.file("texts").open("rb") as stream:
            stream.seek(told["at"])
            return [(int(number, 16), stream.read(size)) for number, size in told["documents"]]

    def used(self) -> Iterator[tuple[int, bytes]]:
        """Digest and text of the documents that `compare` left; UserError where the files changed
        since they were read first."""
        rows = self.rows()
        dropped = set(np.fromfile(self.file("dropped"), np.int64).tolist())
        documents = self.source.documents()
        for row in rows[np.argsort(rows["index"])]:
            document = next(documents, b"")
            number = digest_of(document)
            if number != number_of(row):
                raise self._changed()
            if row["index"] not in dropped:
                yield number, document
        if not read_json(self.file("read.json"))["is_full"] and next(documents, None) is not None:
            raise self._changed()

    def _changed(self) -> UserError:
        self.file("read.json").unlink()
        return UserError(f"corpus {self.source.name!r} changed while it was read; prepare it again")


@contextmanager
def chunk_folder(work: Path) -> Iterator[Path]:
    """A folder for what is found on the way, which goes at the end; where it was stopped, or there
    was something wrong with one chunk of several, the same call goes on with it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield work
    except BaseException:
        if len(list(work.glob("*.rows.npy"))) < 2:
            shutil.rmtree(work)
        raise
    shutil.rmtree(work)


def chunks_of(source: Source, folder: Path, role: str, asked: object) -> list[Chunk]:
    """The chunks in their order. What is found of one serves no other files, `role`, nor what else
    is `asked`."""
    files: list[tuple[Path, ...]] = [source.files]
    if source.kind in ("files", "stdlib"):
        sizes = [size for _, size, _ in source.fingerprint()["files"]]
        sized = zip(source.files, sizes, strict=True)
        groups = grouped(sized, lambda one: one[1], CHUNK_BYTES)
        files = [tuple(path for path, _ in group) for group in groups]
    sources = [replace(source, files=own) for own in files]
    keys = [digest([one.fingerprint(), asked])[:32] for one in sources]
    return [Chunk(one, folder / f"{role}-{key}") for one, key in zip(sources, keys, strict=True)]


def read_chunk(
    chunk: Chunk,
    reading: Reading,
    fraction: float,
    sample_bytes: int,
    on_bytes: OnBytes = lambda num_bytes: None,
) -> int:
    """First pass: writes the digests of all documents and the texts of some, unless they are there
    (with limits they depend on the chunks before). Returns bytes of text."""
    if reading.is_limited or not chunk.file("read.json").exists():
        found = scan(
            chunk.source,
            reading,
            fraction=fraction,
            sample_bytes=sample_bytes,
            on_document=on_bytes,
        )
        with file_written(chunk.file("rows.npy")) as aside, aside.open("wb") as stream:
            np.save(stream, found.rows)
        told: dict[str, Any] = {"is_full": reading.is_full}
        told["ends"] = {what: f"{end:x}" for what, end in found.ends.items()}
        with file_written(chunk.file("texts")) as aside, aside.open("wb") as stream:
            for what in ("candidates", "sample", "largest"):
                documents: list[tuple[int, bytes]] = getattr(found, what)
                sizes = [(f"{number:x}", len(document)) for number, document in documents]
                told[what] = {"at": stream.tell(), "documents": sizes}
                stream.writelines(document for _, document in documents)
        write_json(chunk.file("read.json"), told)
    return int(chunk.rows()["bytes"].sum())


@dataclass(frozen=True)
class Found:
    """The documents of all chunks: how many were read and how many are different, bytes of the
    different ones, the `smallest` digests, those that the held-out source has too; the rest as
    `Scan`."""

    documents: int
    unique: int
    num_bytes: int
    smallest: list[int]
    excluded: frozenset[int]
    candidates: list[tuple[int, bytes]]
    sample: list[tuple[int, bytes]]
    largest: list[tuple[int, bytes]]


def compare(
    chunks: Sequence[Chunk],
    heldout: Sequence[Chunk],
    sample_bytes: int,
) -> Found:
    """Finds what is to be dropped of every chunk, and writes it beside: documents that came before,
    and those of the held-out source. Digests are compared range by range, so that never all of them
    are in memory."""
    every = (*heldout, *chunks)
    documents = sum(len(one.rows()) for one in every)
    unique = num_bytes = 0
    excluded: set[int] = set()
    parts = 1 + documents * ROW.itemsize // PARTITION_BYTES
    with ExitStack() as stack:
        dropped = [stack.enter_context(file_written(one.file("dropped"))) for one in chunks]
        for path in dropped:
            path.touch()
        for low, high in pairwise((number << 64) // parts for number in range(parts + 1)):
            # each file is open for a moment: a process may have few at once
            slices = [_between(one.rows(), low, high) for one in every]
            # those of the held-out source first: a document that it has comes after its own
            owner = np.repeat(np.arange(len(every)) - len(heldout), list(map(len, slices)))
            here = np.concatenate(slices)
            order = np.lexsort((here["low"], here["high"]))
            here, owner = here[order], owner[order]
            is_first = np.ones(len(here), dtype=bool)
            is_first[1:] = here[1:][["high", "low"]] != here[:-1][["high", "low"]]
            text = np.cumsum(is_first) - 1
            first = here[is_first]
            is_here, is_held = (np.zeros(len(first), dtype=bool) for _ in range(2))
            is_here[text[owner >= 0]] = True
            is_held[text[owner < 0]] = True
            unique += int(is_here.sum())
            num_bytes += int(first["bytes"][is_here].sum())
            excluded.update(map(number_of, first[is_here & is_held]))
            is_dropped = ~is_first & (owner >= 0)
            for number in np.unique(owner[is_dropped]):
                with dropped[number].open("ab") as stream:
                    # tofile tells nothing of a disk that is full
                    stream.write(here["index"][is_dropped & (owner == number)].tobytes())
    kept = {}
    for what, most in (("candidates", SAMPLE_BYTES), ("sample", sample_bytes)):
        # what a chunk had no room for may come before what others have
        ends = (read_json(one.file("read.json"))["ends"][what] for one in chunks)
        smallest = SmallestDigests(max_bytes=most, end=min(int(end, 16) for end in ends))
        for chunk in chunks:
            for document in chunk.kept(what):
                smallest.add(*document)
        kept[what] = smallest.documents()
    return Found(
        documents - sum(len(one.rows()) for one in heldout),
        unique,
        num_bytes,
        sorted({number for one in chunks for number in smallest_digests(one.rows())}),
        frozenset(excluded),
        **kept,
        largest=sorted(document for one in chunks for document in one.kept("largest"))[-1:],
    )


def _between(rows: NDArray[Any], low: int, high: int) -> NDArray[Any]:
    """A copy of the rows, by rising digest, whose upper half lies in low .. high - 1."""
    begin = np.searchsorted(rows["high"], np.uint64(low))
    end = None if high >> 64 else np.searchsorted(rows["high"], np.uint64(high))
    return np.array(rows[begin:end])


@cache
def _codec(folder: Path) -> TokenCodec:
    return TokenCodec(load_tokenizer(folder))


def write_chunk(
    chunk: Chunk, tokenizer: Path, threshold: int, limit: int | None, dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Second pass: writes the tokens of the chunk's training documents, each with what parts it
    from the next, at most `limit`, unless they are there. Returns what the manifest counts;
    `is_full`: whether a document was cut."""
    asked = {
        "threshold": f"{threshold:x}",
        "limit": limit,
        "tokenizer": tokenizer.name,
        "rows": file_hash(chunk.file("rows.npy")),
        "dropped": file_hash(chunk.file("dropped")),
    }
    done = chunk.file("written.json")
    found = read_json(done) if done.exists() else {}
    if found.get("asked") == asked:
        return found
    codec = _codec(tokenizer)
    between = codec.marks.between
    counts = {name: no_documents() for name in ("train", "heldout", "unused")}
    num_tokens, is_full = 0, False
    with file_written(chunk.file("tokens")) as aside, aside.open("wb") as stream:
        for batch in grouped(chunk.used(), lambda entry: len(entry[1]), BATCH_BYTES):
            texts = []
            for number, document in batch:
                if number < threshold:
                    count(counts["heldout"], document)
                elif limit is not None and num_tokens >= limit:
                    count(counts["unused"], document)
                else:
                    texts.append(document)
            for text, ids in zip(texts, codec.encode_many(texts), strict=True):
                part, room = text, len(ids) + 1 if limit is None else limit - num_tokens
                if len(ids) < room:
                    ids = np.concatenate([ids, between])[: limit and room]
                else:
                    part, ids = fit_tokens(codec, text, room)
                    count(counts["unused"], text[len(part) :])
                if part:
                    count(counts["train"], part)
                    stream.write(ids.astype(dtype).tobytes())
                    num_tokens += len(ids)
                if part != text:
                    # a cut before a long word may leave room that no later document should fill
                    limit, is_full = num_tokens, True
    found = {"asked": asked, "tokens": num_tokens, "is_full": is_full, **counts}
    write_json(done, found)
    return found


def no_documents() -> Counter[str]:
    return Counter(documents=0, bytes=0, invalid_bytes=0)


def count(part: Counter[str], document: bytes) -> None:
    part.update(documents=1, bytes=len(document), invalid_bytes=count_invalid_bytes(document))
