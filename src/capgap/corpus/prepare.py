"""A source becomes a folder of token shards with a manifest: built whole or not at all, reused.

Two passes over the source: the first removes duplicates, fixes the split and collects what the
tokenizer learns from; the second writes tokens. Neither holds more than a bounded part of the text.
Both go chunk by chunk, in as many processes as there are, whose number changes no byte.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capgap.artifact import difference, folder_written, only_process, plain, write_json
from capgap.corpus.chunks import (
    Chunk,
    Found,
    chunk_folder,
    chunks_of,
    compare,
    count,
    no_documents,
    read_chunk,
    write_chunk,
)
from capgap.corpus.excerpt import cut_for_evaluation
from capgap.corpus.names import MANIFEST, chunks_beside
from capgap.corpus.sources import DEFAULT_SEPARATOR, Source, open_source
from capgap.corpus.split import (
    HELDOUT_FRACTION,
    SAMPLE_BYTES,
    Reading,
    threshold_for,
    training_sample,
)
from capgap.corpus.tokenizer import (
    TokenCodec,
    check_vocabulary,
    load_tokenizer,
    num_words,
    tokenizer_hash,
    train_tokenizer,
    warn_of_strange_text,
)
from capgap.corpus.tokens import (
    HELDOUT,
    SCHEMA,
    TOKENIZER,
    Corpus,
    Marks,
    ShardWriter,
    damage,
    load_corpus,
    read_manifest,
    token_dtype,
)
from capgap.errors import UserError
from capgap.in_order import On, check_workers, in_order
from capgap.storage import is_copy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# Called with a stage ("read" or "tokenize"), the bytes of text done, and all of them if known
Progress = Callable[[str, int, int | None], None]

DEFAULT_VOCABULARY = 2048
NEW = "it is new"
SOURCES = ("source", "heldout_source")
# Bounds the time that training a tokenizer takes; a larger vocabulary needs more text
SAMPLE_BYTES_PER_TOKEN = 8_000
BATCH_TOKENS = 1 << 22


@dataclass(frozen=True)
class Options:
    """What decides, beside the source, what a prepared corpus contains."""

    vocabulary: int | None
    tokenizer_hash: str | None
    heldout_fraction: float
    heldout_tokens: int
    max_bytes: int | None
    max_documents: int | None
    max_train_tokens: int | None
    begin_windows: bool


def prepare_corpus(
    source: str,
    directory: Path | str,
    *,
    vocabulary: int = DEFAULT_VOCABULARY,
    tokenizer: "PreTrainedTokenizerFast | str | Path | None" = None,
    text_column: str = "text",
    separator: str = DEFAULT_SEPARATOR,
    window: int = 128,
    heldout_source: str | None = None,
    heldout_fraction: float = HELDOUT_FRACTION,
    heldout_tokens: int = 60_000,
    max_bytes: int | None = None,
    max_documents: int | None = None,
    max_train_tokens: int | None = None,
    begin_windows: bool = False,
    expected_hash: str | None = None,
    replace: bool = False,
    workers: int = 1,
    on: On = "here",
    progress: Progress | None = None,
) -> Corpus:
    """Turn text into tokens for training and evaluation, or reuse what lies there unchanged.

    Exact duplicates go first. Then every document belongs to one part by its content alone, and
    adding documents moves none. Processes that prepare the same folder wait for each other.

    Args:
        source, text_column, separator: as for `open_source`.
        directory: the folder to make. A corpus in it is made anew, and a warning says so, where
            its source's files changed, it is damaged, or another version made it.
        vocabulary: tokens of the tokenizer trained on the training part; not used with `tokenizer`.
        tokenizer: one to use instead, such as a teacher's: itself, its folder or its hub name.
        window: tokens a training window predicts; another number needs no new preparation.
        heldout_source: text to evaluate on; the source itself is then all for training, save
            documents that this text has too.
        heldout_fraction: share of documents held out otherwise; more of few documents, see
            `threshold_for`.
        heldout_tokens: upper limit of the tokens to evaluate on.
        max_bytes: take documents from the source until they are so many bytes.
        max_documents: take so many documents, all different, and read no further.
        max_train_tokens: upper limit of training tokens.
        begin_windows: whether every window begins with the token that the tokenizer itself puts
            before a text; without such a token it changes nothing.
        expected_hash: the `corpus_hash` it must have; text that gives another is refused, and
            the corpus that lies there stays.
        workers, on: as for `in_order`; a stopped preparation goes on where it was.
        replace: whether the corpus of another request gives way too.
        progress: called with ("read" | "tokenize", bytes done, bytes in all or None).

    Raises:
        UserError: unreadable, empty or too small source; impossible options; no disk space; a
            folder of something else or of another request; not the expected text.
    """
    if not 0 < heldout_fraction < 1:
        raise UserError(f"heldout_fraction {heldout_fraction} must lie between 0 and 1")
    read = {"max_bytes": max_bytes, "max_documents": max_documents}
    kept = {"max_train_tokens": max_train_tokens, "heldout_tokens": heldout_tokens}
    for name, limit in (read | kept).items():
        if limit is not None and limit < 1:
            raise UserError(f"{name} {limit} must be 1 or more")
    check_workers(workers)
    directory = Path(directory).expanduser().absolute()
    if on == "ray" and is_copy(source, heldout_source, directory):
        raise UserError("`on` ray: all nodes read and write one disk, and a URL names none")
    if tokenizer is None:
        check_vocabulary(vocabulary)
    reading = {"text_column": text_column, "separator": separator}
    opened = open_source(source, **reading)
    heldout = None if heldout_source is None else open_source(heldout_source, **reading)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    options = Options(
        vocabulary=vocabulary if tokenizer is None else None,
        tokenizer_hash=None if tokenizer is None else tokenizer_hash(tokenizer),
        heldout_fraction=heldout_fraction,
        heldout_tokens=heldout_tokens,
        max_bytes=max_bytes,
        max_documents=max_documents,
        max_train_tokens=max_train_tokens,
        begin_windows=begin_windows,
    )
    told = progress or (lambda stage, done, total: None)
    writing = _Writing(opened, heldout, options, told, workers, on)
    found = chunks_beside(directory)
    with only_process(directory):
        reason = _why_prepare(directory, writing.request, replace=replace)
        if reason is None:
            # left by a process that was killed as it had just ended
            shutil.rmtree(found, ignore_errors=True)
        else:
            if reason == NEW:
                logger.info("preparing the corpus in %s: %s", directory, reason)
            else:
                logger.warning("making the corpus in %s anew: %s", directory, reason)
            with (
                chunk_folder(found) as work,
                folder_written(directory) as aside,
            ):
                made = writing.fill(aside, tokenizer, window, work)
                if expected_hash not in (None, made):
                    raise UserError(
                        f"the corpus is not the one that was used before ({source}: {reason}; its "
                        f"hash was {expected_hash[:12]}, now {made[:12]}): bring the text back, or "
                        "choose another output folder"
                    )
    return load_corpus(directory, window=window)


@dataclass
class _Writing:
    """A corpus folder in the making, and the counts of its parts; `unused` is training text beyond
    the tokens asked for."""

    source: Source
    heldout_source: Source | None
    options: Options
    progress: Progress
    workers: int
    on: On

    def __post_init__(self) -> None:
        # as the manifest holds it: tuples are lists there
        self.request = plain(
            {
                "options": asdict(self.options),
                "source": self.source.fingerprint(),
                "heldout_source": self.heldout_source and self.heldout_source.fingerprint(),
            }
        )
        self.train, self.heldout, self.unused = (no_documents() for _ in range(3))
        vocabulary = self.options.vocabulary or 0
        self.sample_bytes = min(SAMPLE_BYTES, vocabulary * SAMPLE_BYTES_PER_TOKEN)

    def fill(
        self, directory: Path, tokenizer: "PreTrainedTokenizerFast | None", window: int, work: Path
    ) -> str:
        """Fill an empty folder and return the corpus's hash; UserError for a source that is empty,
        broken, or too small to split or to fill a window. `work`: a folder of what is found on the
        way."""
        heldout_chunks = self._read(self.heldout_source, work)
        chunks = self._read(self.source, work)
        heldout = compare(heldout_chunks, [], self.sample_bytes) if heldout_chunks else None
        found = compare(chunks, heldout_chunks, self.sample_bytes)
        threshold = self._threshold(found, heldout)
        if tokenizer is None:
            fair = [one for one in found.sample if one[0] not in found.excluded]
            sample = training_sample(threshold, fair, found.largest[0])
            tokenizer = train_tokenizer(sample, self.options.vocabulary or 0)
        identity = tokenizer_hash(tokenizer)
        tokenizer.save_pretrained(str(work / identity))
        shutil.copytree(work / identity, directory / TOKENIZER)
        codec = TokenCodec(tokenizer)
        marks = Marks.of(tokenizer, begin_windows=self.options.begin_windows)
        vocabulary = num_words(tokenizer)
        dtype = token_dtype(vocabulary)

        writer = ShardWriter(directory, "train", dtype)
        writer.append(marks.between[-1:])
        self._write(writer, chunks, work / identity, threshold, found.num_bytes)
        if writer.num_tokens <= window:
            raise UserError(
                f"corpus {self.source.name!r} is too small: {writer.num_tokens} training tokens do "
                f"not fill one window of {window}; give more text or a smaller window"
            )
        if self.options.tokenizer_hash is not None:
            tokens = writer.num_tokens - self.train["documents"]
            warn_of_strange_text(self.source.name, self.train["bytes"], tokens, vocabulary)
        if heldout is None:
            candidates = [one for one in found.candidates if one[0] < threshold]
        else:
            candidates = heldout.candidates
        for chunk in heldout_chunks:
            for _, document in chunk.used():
                count(self.heldout, document)
        evaluated, heldout_ids = cut_for_evaluation(codec, candidates, self.options.heldout_tokens)
        heldout_data = heldout_ids.astype(dtype).tobytes()
        (directory / HELDOUT).write_bytes(heldout_data)

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
                "read": found.documents,
                "duplicates": found.documents - found.unique,
                "in_heldout_source": len(found.excluded),
            },
            "train": {
                **self.train,
                "tokens": writer.num_tokens,
                "sha256": writer.sha256,
                "shards": writer.shards,
            },
            "heldout": {
                **self.heldout,
                "tokens": len(heldout_ids) - len(evaluated),
                "sha256": heldout_hash,
                "evaluated": evaluated,
            },
            "unused": self.unused,
            "options": asdict(self.options),
            "source": self.source.describe(),
            "heldout_source": self.heldout_source and self.heldout_source.describe(),
            "request": self.request,
        }
        write_json(directory / MANIFEST, manifest)
        return corpus_hash

    def _read(self, source: Source | None, work: Path) -> list[Chunk]:
        """First pass over a source, with limits chunk after chunk here; its chunks."""
        if source is None:
            return []
        known = (self.options.heldout_fraction, self.sample_bytes)
        role = "train" if source is self.source else "heldout"
        reading = Reading(self.options.max_bytes, self.options.max_documents)
        chunks = chunks_of(source, work, role, [*known, vars(self.options)])
        if reading.is_limited:
            for number, chunk in enumerate(chunks, 1):
                read_chunk(chunk, reading, *known, lambda done: self.progress("read", done, None))
                if reading.is_full:
                    return chunks[:number]
            return chunks
        done = 0
        arguments = ((chunk, Reading(), *known) for chunk in chunks)
        for num_bytes in self._each(chunks, read_chunk, arguments):
            done += num_bytes
            self.progress("read", done, None)
        return chunks

    def _each(self, chunks: Sequence[Chunk], function: Any, arguments: Any) -> Iterator[Any]:
        """As `in_order`; one alone is not worth another process."""
        where: Any = {"workers": self.workers, "on": self.on} if len(chunks) > 1 else {}
        return in_order(function, arguments, **where)

    def _threshold(self, found: Found, heldout: Found | None) -> int:
        for source, each in ((self.source, found), (self.heldout_source, heldout)):
            if source is not None and each is not None and not each.documents:
                raise UserError(f"corpus {source.name!r} is empty: it holds no text")
        if self.heldout_source is not None:
            if found.unique == len(found.excluded):
                raise UserError(
                    f"corpus {self.source.name!r} holds nothing but documents of the held-out "
                    f"source {self.heldout_source.name!r}: give other text to train on"
                )
            # what is held out is a source of its own
            return 0
        if found.unique == 1:
            raise UserError(
                f"corpus {self.source.name!r} is one document, and a document is never split "
                f"between training and held-out: part it by lines "
                f"{self.source.separator or DEFAULT_SEPARATOR!r} "
                "(or name your own separator), add documents, raise a limit, or give held-out "
                "text of its own"
            )
        largest = found.largest[0][0]
        return threshold_for(self.options.heldout_fraction, found.unique, found.smallest, largest)

    def _write(
        self,
        writer: ShardWriter,
        chunks: Sequence[Chunk],
        tokenizer: Path,
        threshold: int,
        num_bytes: int,
    ) -> None:
        """Second pass: appends the tokens of all chunks, in their order."""
        most = self.options.max_train_tokens
        limits: list[int | None] = []

        def room() -> int | None:
            return None if most is None else max(0, most - writer.num_tokens)

        def arguments() -> Iterator[tuple[Any, ...]]:
            for chunk in chunks:
                # while those before are at work it may turn out to be less
                limits.append(room())
                yield chunk, tokenizer, threshold, limits[-1], writer.dtype

        parts = {"train": self.train, "heldout": self.heldout, "unused": self.unused}
        for number, told in enumerate(self._each(chunks, write_chunk, arguments())):
            chunk, left = chunks[number], room()
            is_over = left is not None and (told["tokens"] > left or told["is_full"])
            if is_over and left != limits[number]:
                told = write_chunk(chunk, tokenizer, threshold, left, writer.dtype)
            for name, part in parts.items():
                part.update(told[name])
            with chunk.file("tokens").open("rb") as stream:
                while len(ids := np.fromfile(stream, writer.dtype, BATCH_TOKENS)):
                    writer.append(ids)
            if told["is_full"]:
                most = writer.num_tokens
            self.progress("tokenize", sum(part["bytes"] for part in parts.values()), num_bytes)


def _why_prepare(directory: Path, asked: dict[str, Any], *, replace: bool) -> str | None:
    """Why the folder has to be filled (anew), in words; None if what lies there is as asked.

    UserError: it holds something else, or the corpus of another request without `replace`.
    """
    if not directory.exists():
        return NEW
    manifest = read_manifest(directory)
    if manifest is None:
        if not directory.is_dir() or any(directory.iterdir()):
            raise UserError(f"{directory} exists and is no corpus: name another folder for it")
        return NEW
    if manifest.get("schema") != SCHEMA:
        return "it was made by another version"
    had = manifest["request"]
    other = difference(_lasting(had), _lasting(asked))
    if other is not None and not replace:
        raise UserError(
            f"{directory} holds another corpus ({other}): choose another output folder, or delete "
            "this one"
        )
    other = other or _changed_files(asked, had)
    if other is not None:
        return other
    problem = damage(directory, manifest, contents=True)
    return None if problem is None else f"it is damaged: {problem}"


def _lasting(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, whatever the text itself holds; paths in one spelling."""
    found = dict(request["options"])
    for role in SOURCES:
        source = request[role] or {}
        name = os.path.normpath(source["name"]) if source else None
        settings = {key: source.get(key) for key in ("text_column", "separator")}
        found[role] = {"name": name, **settings}
    return found


def _changed_files(asked: dict[str, Any], had: dict[str, Any]) -> str | None:
    for role in SOURCES:
        now, before = (
            {path: rest for path, *rest in request[role]["files"]} if request[role] else {}
            for request in (asked, had)
        )
        changed = sorted(path for path in before | now if before.get(path) != now.get(path))
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            return f"the {role.replace('_', ' ')} changed: {changed[0]}{more}"
    return None
