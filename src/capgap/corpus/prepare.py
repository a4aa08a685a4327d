"""A source becomes a folder of token shards with a manifest: built whole or not at all, reused.

Two passes over the source: the first removes duplicates, fixes the split and collects what the
tokenizer learns from; the second writes tokens. Neither holds more than a bounded part of the text.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capgap.artifact import difference, folder_written, only_process, plain, write_json
from capgap.corpus.excerpt import cut_for_evaluation, fit_tokens
from capgap.corpus.names import MANIFEST
from capgap.corpus.sources import DEFAULT_SEPARATOR, Source, open_source
from capgap.corpus.split import (
    HELDOUT_FRACTION,
    SAMPLE_BYTES,
    Reading,
    Scan,
    Split,
    scan,
    split_for,
)
from capgap.corpus.tokenizer import (
    TokenCodec,
    check_vocabulary,
    count_invalid_bytes,
    grouped,
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
    damage,
    load_corpus,
    read_manifest,
)
from capgap.errors import UserError

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
BATCH_BYTES = 4_000_000
SHARD_TOKENS = 1 << 26


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
            `split_for`.
        heldout_tokens: upper limit of the tokens to evaluate on.
        max_bytes: take documents from the source until they are so many bytes.
        max_documents: take so many documents, all different, and read no further.
        max_train_tokens: upper limit of training tokens.
        begin_windows: whether every window begins with the token that the tokenizer itself puts
            before a text; without such a token it changes nothing.
        expected_hash: the `corpus_hash` it must have; text that gives another is refused, and
            the corpus that lies there stays.
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
    writing = _Writing(opened, heldout, options, progress or (lambda stage, done, total: None))
    directory = Path(directory).expanduser().absolute()
    with only_process(directory):
        reason = _why_prepare(directory, writing.request, replace=replace)
        if reason is not None:
            if reason == NEW:
                logger.info("preparing the corpus in %s: %s", directory, reason)
            else:
                logger.warning("making the corpus in %s anew: %s", directory, reason)
            with folder_written(directory) as partial:
                made = writing.fill(partial, tokenizer, window)
                if expected_hash not in (None, made):
                    raise UserError(
                        f"the corpus is not the one that was used before ({source}: {reason}; its "
                        f"hash was {expected_hash[:12]}, now {made[:12]}): bring the text back, or "
                        "choose another output folder"
                    )
    return load_corpus(directory, window=window)


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest little-endian type that holds every token id."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends token ids to `PREFIX-00000.bin` and on, raw, each of SHARD_TOKENS but the last.

    `shards`: for every file its name, tokens and sha256; `num_tokens`: written so far.
    """

    def __init__(self, directory: Path, prefix: str, dtype: np.dtype[Any]) -> None:
        self.shards: list[dict[str, Any]] = []
        self.num_tokens = 0
        self._path = directory / prefix
        self._dtype = dtype
        self._all = hashlib.sha256()
        self._shard_hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all tokens, however they are cut in files."""
        return self._all.hexdigest()

    def append(self, ids: NDArray[np.int64]) -> None:
        """Write ids, int64 [num_tokens]; goes on in a new file when one is full."""
        while len(ids):
            filled = self.num_tokens % SHARD_TOKENS
            if filled == 0:
                name = f"{self._path.name}-{len(self.shards):05d}.bin"
                self.shards.append({"name": name, "tokens": 0})
                self._shard_hash = hashlib.sha256()
            now, ids = ids[: SHARD_TOKENS - filled], ids[SHARD_TOKENS - filled :]
            shard, data = self.shards[-1], now.astype(self._dtype).tobytes()
            with open(self._path.with_name(shard["name"]), "ab") as stream:
                stream.write(data)
            # hashed as it is written, so nothing is read again
            self._all.update(data)
            self._shard_hash.update(data)
            shard["sha256"] = self._shard_hash.hexdigest()
            shard["tokens"] += len(now)
            self.num_tokens += len(now)


class _Writing:
    """A corpus folder in the making, and the counts of its parts; `unused` is training text beyond
    the tokens asked for."""

    def __init__(
        self, source: Source, heldout_source: Source | None, options: Options, progress: Progress
    ) -> None:
        self.source = source
        self.heldout_source = heldout_source
        self.options = options
        self.progress = progress
        # as the manifest holds it: tuples are lists there
        self.request = plain(
            {
                "options": asdict(options),
                "source": source.fingerprint(),
                "heldout_source": heldout_source and heldout_source.fingerprint(),
            }
        )
        none = Counter(documents=0, bytes=0, invalid_bytes=0)
        self.train, self.heldout, self.unused = none.copy(), none.copy(), none.copy()
        self.in_heldout_source = 0
        self.limits = {"max_bytes": options.max_bytes, "max_documents": options.max_documents}

    def fill(
        self, directory: Path, tokenizer: "PreTrainedTokenizerFast | None", window: int
    ) -> str:
        """Fill an empty folder and return the corpus's hash; UserError for a source that is empty,
        broken, or too small to split or to fill a window."""
        first = self._scan(self.source)
        split, candidates = self._choose_split(first)
        if tokenizer is None:
            tokenizer = train_tokenizer(first.training_sample(split), self.options.vocabulary or 0)
        tokenizer.save_pretrained(str(directory / TOKENIZER))
        codec = TokenCodec(tokenizer)
        marks = Marks.of(tokenizer, begin_windows=self.options.begin_windows)
        vocabulary = num_words(tokenizer)
        dtype = token_dtype(vocabulary)

        writer = ShardWriter(directory, "train", dtype)
        self._write(writer, codec, first, split)
        if writer.num_tokens <= window:
            raise UserError(
                f"corpus {self.source.name!r} is too small: {writer.num_tokens} training tokens do "
                f"not fill one window of {window}; give more text or a smaller window"
            )
        if self.options.tokenizer_hash is not None:
            tokens = writer.num_tokens - self.train["documents"]
            warn_of_strange_text(self.source.name, self.train["bytes"], tokens, vocabulary)
        evaluated, heldout_ids = cut_for_evaluation(codec, candidates, self.options.heldout_tokens)
        heldout_data = heldout_ids.astype(dtype).tobytes()
        (directory / HELDOUT).write_bytes(heldout_data)

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
                "read": first.reading.documents,
                "duplicates": first.reading.duplicates,
                "in_heldout_source": self.in_heldout_source,
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

    def _scan(self, source: Source) -> Scan:
        sample = (self.options.vocabulary or 0) * SAMPLE_BYTES_PER_TOKEN
        first = scan(
            source,
            max_bytes=self.options.max_bytes,
            max_documents=self.options.max_documents,
            fraction=self.options.heldout_fraction,
            sample_bytes=min(SAMPLE_BYTES, sample),
            on_document=lambda num_bytes: self.progress("read", num_bytes, None),
        )
        if not first.digests:
            raise UserError(f"corpus {source.name!r} is empty: it holds no text")
        return first

    def _choose_split(self, first: Scan) -> tuple[Split, list[tuple[int, bytes]]]:
        """The split, and the documents to evaluate on."""
        if self.heldout_source is None:
            if len(first.digests) == 1:
                raise UserError(
                    f"corpus {self.source.name!r} is one document, and a document is never split "
                    f"between training and held-out: part it by lines "
                    f"{self.source.separator or DEFAULT_SEPARATOR!r} "
                    "(or name your own separator), add documents, raise a limit, or give held-out "
                    "text of its own"
                )
            split = split_for(self.options.heldout_fraction, first.digests)
            return split, [entry for entry in first.candidates if split.is_heldout(entry[0])]

        heldout = self._scan(self.heldout_source)
        if first.digests <= heldout.digests:
            raise UserError(
                f"corpus {self.source.name!r} holds nothing but documents of the held-out source "
                f"{self.heldout_source.name!r}: give other text to train on"
            )
        for _, document in Reading().unique(self.heldout_source, **self.limits):
            _count(self.heldout, document)
        return Split(threshold=0, excluded=heldout.digests), heldout.candidates

    def _write(self, writer: ShardWriter, codec: TokenCodec, first: Scan, split: Split) -> None:
        """Second pass: write every training document and what parts it from the next; the first one
        begins like the others."""
        between = codec.marks.between
        writer.append(between[-1:])
        limit = self.options.max_train_tokens
        reading = Reading()
        documents = reading.unique(self.source, **self.limits)
        for batch in grouped(documents, lambda entry: len(entry[1]), BATCH_BYTES):
            texts = []
            for digest, document in batch:
                if split.is_heldout(digest):
                    _count(self.heldout, document)
                elif digest in split.excluded:
                    self.in_heldout_source += 1
                elif limit is not None and writer.num_tokens >= limit:
                    _count(self.unused, document)
                else:
                    texts.append(document)
            for text, ids in zip(texts, codec.encode_many(texts), strict=True):
                room = len(ids) + 1 if limit is None else limit - writer.num_tokens
                if len(ids) < room:
                    _count(self.train, text)
                    writer.append(np.concatenate([ids, between])[: limit and room])
                    continue
                cut, ids = fit_tokens(codec, text, room)
                _count(self.unused, text[len(cut) :])
                if cut:
                    _count(self.train, cut)
                    writer.append(ids)
                # a cut before a long word may leave room that no later document should fill
                limit = writer.num_tokens
            self.progress("tokenize", reading.num_bytes, first.reading.num_bytes)
        if reading.content.digest() != first.reading.content.digest():
            raise UserError(
                f"corpus {self.source.name!r} changed while it was read; prepare it again"
            )


def _count(part: Counter[str], document: bytes) -> None:
    part.update(documents=1, bytes=len(document), invalid_bytes=count_invalid_bytes(document))


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
