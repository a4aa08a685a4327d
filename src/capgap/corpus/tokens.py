"""Tokens: what a document begins and ends with, shards on disk, windows for training, documents
for evaluation.

`Marks` decides for everything that reads text what stands around a document, so that a model reads
what it read while its makers trained it.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capgap.artifact import file_hash, read_json
from capgap.corpus.names import MANIFEST, check_prepared
from capgap.errors import UserError, first_line
from capgap.machine import allow_open_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Names for the end of a text. A chat model's `eos_token` often is the end of a turn instead; where
# it bears none of these names, the first of them that the tokenizer has ends a text.
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "<EOS_TOKEN>", "[EOS]")

SHARD_TOKENS = 1 << 26
HELDOUT = "heldout.bin"
TOKENIZER = "tokenizer"
SCHEMA = 2  # 1: documents began with the token that ends them, whatever the tokenizer
NOT_AS_WRITTEN = "does not hold what was written into it (its sha256 is another)"


@dataclass(frozen=True)
class Marks:
    """Token ids around a document.

    Attributes:
        begin: stands before a document's first token, as context alone: what the tokenizer itself
            puts first, or `end` where it puts nothing there.
        end: stands behind a document's last token: the model's end of text, not of a chat turn.
        begin_windows: whether every training window, and every row of a long document, begins
            with `begin` too, in place of the token before it.
    """

    begin: int
    end: int
    begin_windows: bool

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerFast", *, begin_windows: bool = False) -> "Marks":
        """Those of a tokenizer. `begin_windows` is for those that put a token of their own first.
        UserError: the tokenizer has no token that ends a text."""
        special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        ends = [special[name] for name in END_OF_TEXT if name in special]
        end = tokenizer.eos_token_id
        if tokenizer.eos_token not in END_OF_TEXT and ends:
            end = ends[0]
        if end is None:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no eos token to end a document with"
            )
        own = _first_token(tokenizer)
        begin = int(end) if own is None else own
        return cls(begin, int(end), begin_windows and own is not None)

    @property
    def between(self) -> NDArray[np.int64]:
        """What parts two documents, int64 [1 or 2]: the end of one and the beginning of the next,
        once where both are one token."""
        both = [self.end] if self.begin == self.end else [self.end, self.begin]
        return np.array(both, dtype=np.int64)

    def begun(self, windows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Windows [num_windows, window + 1] as a model reads them; changed in place.

        A window that the corpus begins anew at its second token keeps its first: no document has
        two first tokens.
        """
        if self.begin_windows:
            windows[windows[:, 1] != self.begin, 0] = self.begin
        return windows

    def positions(self, inputs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions within their documents of packed tokens, int64 [num_windows, seq] as `inputs`.

        Counting begins anew at every `begin`, as in evaluation; a window's beginning counts as one.
        """
        positions = np.arange(inputs.shape[1])
        starts = np.maximum.accumulate(np.where(inputs == self.begin, positions, 0), axis=1)
        return positions - starts

    def rows(self, tokens: NDArray[np.int64], window: int) -> list[NDArray[np.int64]]:
        """A document [1 + tokens], `begin` first, in pieces of at most 1 + window tokens; the first
        of each is context alone."""
        pieces = [tokens[at : at + window + 1] for at in range(0, len(tokens) - 1, window)]
        if self.begin_windows:
            pieces = [np.r_[tokens[:1], piece[1:]] for piece in pieces]
        return pieces

    def document(self, ids: NDArray[np.int64], *, whole: bool) -> NDArray[np.int64]:
        """A text's ids between its marks; without the end where the text goes on."""
        return np.r_[self.begin, ids, [self.end] * whole].astype(np.int64)


def _first_token(tokenizer: "PreTrainedTokenizerFast") -> int | None:
    """The token that the tokenizer itself puts before a text, the last if these are several."""
    bare, written = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(written) - len(bare) + 1):
        if written[start : start + len(bare)] == bare:
            return int(written[start - 1]) if start else None
    return None


class TokenWindows:
    """Training windows of one corpus (its shards) after the other, by their number over all;
    neighbours of one corpus share one token, the target of the first's end."""

    def __init__(
        self, sources: Sequence[Sequence[Path]], dtype: np.dtype[Any], window: int, marks: Marks
    ) -> None:
        allow_open_files(sum(map(len, sources)))
        # as plain arrays, whose slices cost a tenth of a memmap's
        shards = [[np.asarray(np.memmap(path, dtype, "r")) for path in own] for own in sources]
        tokens = [sum(map(len, own)) for own in shards]
        self._shards = list(itertools.chain.from_iterable(shards))
        # where they begin, and the end: int64 [num_shards + 1], [num_sources + 1] twice
        self._shard_starts = np.cumsum([0, *map(len, self._shards)])
        self._first_tokens = np.cumsum([0, *tokens])
        self._first_windows = np.cumsum([0, *(max(0, own - 1) // window for own in tokens)])
        self._window = window
        self._marks = marks
        self.num_tokens = sum(tokens)

    def __len__(self) -> int:
        return int(self._first_windows[-1])

    def windows_at(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Windows by their number, int64 [num_indices, window + 1], as a model reads them;
        IndexError: a number below 0 or not below the number of windows."""
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"window {numbers.min()} to {numbers.max()} of {len(self)}")
        source = np.searchsorted(self._first_windows, numbers, side="right") - 1
        within = (numbers - self._first_windows[source]) * self._window
        first = self._first_tokens[source] + within
        shard_of = np.searchsorted(self._shard_starts, first, side="right") - 1
        begins = first - self._shard_starts[shard_of]
        size = self._window + 1
        tokens = np.empty((len(numbers), size), dtype=np.int64)
        # a slice a row takes less than indices of tokens, whatever the number of shards
        for row, shard, begin in zip(tokens, shard_of.tolist(), begins.tolist(), strict=True):
            filled = 0
            while filled < size:
                part = self._shards[shard][begin : begin + size - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
                shard, begin = shard + 1, 0
        return self._marks.begun(tokens)


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
        self.dtype = dtype
        self._all = hashlib.sha256()
        self._shard_hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of all tokens, however they are cut in files."""
        return self._all.hexdigest()

    def append(self, ids: NDArray[np.integer[Any]]) -> None:
        """Write ids, [num_tokens]; goes on in a new file when one is full."""
        while len(ids):
            filled = self.num_tokens % SHARD_TOKENS
            if filled == 0:
                name = f"{self._path.name}-{len(self.shards):05d}.bin"
                self.shards.append({"name": name, "tokens": 0})
                self._shard_hash = hashlib.sha256()
            now, ids = ids[: SHARD_TOKENS - filled], ids[SHARD_TOKENS - filled :]
            shard, data = self.shards[-1], now.astype(self.dtype).tobytes()
            with open(self._path.with_name(shard["name"]), "ab") as stream:
                stream.write(data)
            # hashed as it is written, so nothing is read again
            self._all.update(data)
            self._shard_hash.update(data)
            shard["sha256"] = self._shard_hash.hexdigest()
            shard["tokens"] += len(now)
            self.num_tokens += len(now)


class HeldoutDocument(NamedTuple):
    """A document for evaluation: tokens int64 [num_tokens + 1], of which the first is the mark that
    begins it, context only, and the bytes of text that tokens[1:] stand for."""

    tokens: NDArray[np.int64]
    num_bytes: int


class Corpus:
    """A prepared corpus in its folder. Training tokens are memory-mapped; every file is checked by
    its hash before it is used first (UserError where it is damaged), once a process.

    Attributes:
        directory: where it lies.
        manifest: what `manifest.json` says: source, options, counts, hashes.
        window: tokens a training window predicts.
        train_tokens: tokens of the training part.
        windows: number of training windows.
        vocabulary: tokens the tokenizer has.
        marks: the tokens that its documents begin and end with.
        token_hash: identity of the tokenizer.
        corpus_hash: identity of the tokens of both parts, wherever they lie and came from.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], window: int) -> None:
        self.directory = directory
        self.manifest = manifest
        self.window = window
        self.train_tokens = int(manifest["train"]["tokens"])
        self.windows = (self.train_tokens - 1) // window
        self.vocabulary = int(manifest["vocabulary"])
        self.marks = Marks(**manifest["marks"])
        self.token_hash = str(manifest["tokenizer_hash"])
        self.corpus_hash = str(manifest["corpus_hash"])

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer that the corpus is written in."""
        from capgap.corpus.tokenizer import load_tokenizer, tokenizer_hash

        tokenizer = load_tokenizer(self.directory / TOKENIZER)
        if tokenizer_hash(tokenizer) != self.token_hash:
            raise _damaged(self.directory, f"{TOKENIZER} is another than its tokens are of")
        return tokenizer

    @cached_property
    def train(self) -> TokenWindows:
        """The training part."""
        return self.train_with()

    def train_with(self, *others: "Corpus") -> TokenWindows:
        """The training parts of this corpus and of others in the same tokens."""
        sources = [
            [
                corpus._checked(shard["name"], shard["sha256"])
                for shard in corpus.manifest["train"]["shards"]
            ]
            for corpus in (self, *others)
        ]
        return TokenWindows(sources, np.dtype(self.manifest["dtype"]), self.window, self.marks)

    def marks_for(self, tokenizer: "PreTrainedTokenizerFast") -> Marks:
        """For the same text in another tokenizer's tokens."""
        return Marks.of(tokenizer, begin_windows=self.manifest["options"]["begin_windows"])

    def epochs(self, tokens: int) -> float:
        """How often so many training tokens walk through the training part."""
        return tokens / (self.windows * self.window)

    def heldout_documents(self) -> list[HeldoutDocument]:
        """The documents for evaluation, never trained on, in a fixed order."""
        path = self._checked(HELDOUT, self.manifest["heldout"]["sha256"])
        tokens = np.fromfile(path, dtype=self.manifest["dtype"]).astype(np.int64)
        entries = self.manifest["heldout"]["evaluated"]
        # one more than the counted tokens each: the mark that begins it
        ends = np.cumsum([entry["tokens"] + 1 for entry in entries])
        parts = zip(np.split(tokens, ends[:-1]), entries, strict=True)
        return [HeldoutDocument(part, entry["bytes"]) for part, entry in parts]

    def _checked(self, name: str, sha256: str) -> Path:
        path = self.directory / name
        if file_hash(path) != sha256:
            raise _damaged(self.directory, f"{name} {NOT_AS_WRITTEN}")
        return path


def load_corpus(directory: Path | str, *, window: int) -> Corpus:
    """Open what `prepare_corpus` wrote, with any window, since windows are cut on reading.

    UserError: no whole corpus of this version there, or it is shorter than one window.
    """
    directory = Path(directory)
    check_prepared(directory)
    manifest = read_json(directory / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{directory} was prepared by a version whose documents did not begin as the model's "
            "own texts do: run `capgap corpus` again with this --out, and then whatever was made "
            "of it (caches, scores, sweeps)"
        )
    problem = damage(directory, manifest)
    if problem is not None:
        raise _damaged(directory, problem)
    tokens = manifest["train"]["tokens"]
    if not 1 <= window < tokens:
        raise UserError(
            f"window {window} does not fit: the training part has {tokens} tokens; take a smaller "
            "window or more text"
        )
    return Corpus(directory, manifest, window)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a corpus of any version, or None where there is none."""
    path = directory / MANIFEST
    return read_json(path) if path.is_file() else None


def damage(directory: Path, manifest: dict[str, Any], *, contents: bool = False) -> str | None:
    """The first file that is missing or of another size than the manifest says, in words, or None.
    With `contents` every file is read, and one whose hash is another counts too."""
    try:
        itemsize = np.dtype(manifest["dtype"]).itemsize
        heldout = manifest["heldout"]
        heldout_tokens = sum(entry["tokens"] + 1 for entry in heldout["evaluated"])
        files = [(one["name"], one["tokens"], one["sha256"]) for one in manifest["train"]["shards"]]
        files.append((HELDOUT, heldout_tokens, heldout["sha256"]))
    except (KeyError, TypeError) as error:
        return f"{MANIFEST} is not as it was written ({first_line(error)})"
    for name, tokens, sha256 in files:
        path, size = directory / name, tokens * itemsize
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is not there with its {size} bytes"
        if contents and file_hash(path) != sha256:
            return f"{name} {NOT_AS_WRITTEN}"
    if not (directory / TOKENIZER / "tokenizer.json").is_file():
        return "its tokenizer is missing"
    return None


def _damaged(directory: Path, problem: str) -> UserError:
    return UserError(
        f"the corpus in {directory} is damaged: {problem}; prepare it again as it was made, which "
        "replaces it, or bring the file back"
    )
