"""Token shards on disk and what reads them: windows for training, documents for evaluation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capgap.artifact import file_hash, read_json
from capgap.corpus.marks import Marks
from capgap.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
HELDOUT = "heldout.bin"
TOKENIZER = "tokenizer"
SCHEMA = 2  # 1: documents began with the token that ends them, whatever the tokenizer
SHARD_TOKENS = 1 << 26
NOT_AS_WRITTEN = "does not hold what was written into it (its sha256 is another)"


def token_dtype(vocabulary: int) -> np.dtype[Any]:
    """The smallest little-endian type that holds every token id."""
    return np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")


class ShardWriter:
    """Appends token ids to `PREFIX-00000.bin` and on, raw, each of SHARD_TOKENS but the last.

    Attributes:
        shards: for every file its name, tokens and sha256.
        num_tokens: written so far.
    """

    def __init__(self, directory: Path, prefix: str, dtype: np.dtype[Any]) -> None:
        self.shards: list[dict[str, Any]] = []
        self.num_tokens = 0
        self._directory = directory
        self._prefix = prefix
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
            place = self.num_tokens % SHARD_TOKENS
            if place == 0:
                name = f"{self._prefix}-{len(self.shards):05d}.bin"
                self.shards.append({"name": name, "tokens": 0})
                self._shard_hash = hashlib.sha256()
            now, ids = ids[: SHARD_TOKENS - place], ids[SHARD_TOKENS - place :]
            shard, data = self.shards[-1], now.astype(self._dtype).tobytes()
            with open(self._directory / shard["name"], "ab") as stream:
                stream.write(data)
            # hashed as it is written, so nothing is read again
            self._all.update(data)
            self._shard_hash.update(data)
            shard["sha256"] = self._shard_hash.hexdigest()
            shard["tokens"] += len(now)
            self.num_tokens += len(now)


class TokenWindows:
    """The training part as windows; neighbours share one token, the target of the first's end."""

    def __init__(
        self, paths: Sequence[Path], dtype: np.dtype[Any], window: int, marks: Marks
    ) -> None:
        self._shards = [np.memmap(path, dtype=dtype, mode="r") for path in paths]
        # Where every shard begins in the whole, and the end: int64 [num_shards + 1].
        self._starts = np.cumsum([0, *(len(shard) for shard in self._shards)])
        self._window = window
        self._marks = marks
        self.num_tokens = int(self._starts[-1])

    def __len__(self) -> int:
        return max(0, self.num_tokens - 1) // self._window

    def windows_at(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Windows by their number, int64 [num_indices, window + 1], as a model reads them.

        Raises:
            IndexError: a number below 0 or not below the number of windows.
        """
        numbers = checked_numbers(indices, len(self))
        places = numbers[:, None] * self._window + np.arange(self._window + 1)
        shard_of = np.searchsorted(self._starts, places, side="right") - 1
        tokens = np.empty(places.shape, dtype=np.int64)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            tokens[here] = self._shards[shard][places[here] - self._starts[shard]]
        return self._marks.begun(tokens)


def checked_numbers(indices: ArrayLike, count: int) -> NDArray[np.int64]:
    """As int64 [num_indices]; IndexError: a number below 0 or not below `count`."""
    numbers = np.asarray(indices, dtype=np.int64)
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
        raise IndexError(f"window {numbers.min()} to {numbers.max()} of {count}")
    return numbers


class HeldoutDocument(NamedTuple):
    """A document for evaluation.

    Attributes:
        tokens: int64 [num_tokens + 1]; the first is the mark that begins it, context only.
        num_bytes: bytes of text that tokens[1:] stand for.
    """

    tokens: NDArray[np.int64]
    num_bytes: int


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus in its folder. Training tokens are memory-mapped; every file is checked by
    its hash before it is used first (UserError where it is damaged), once a process.

    Attributes:
        directory: where it lies.
        manifest: what `manifest.json` says: source, options, counts, hashes.
        window: tokens a training window predicts.
    """

    directory: Path
    manifest: dict[str, Any]
    window: int

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
        shards = self.manifest["train"]["shards"]
        paths = [self._checked(shard["name"], shard["sha256"]) for shard in shards]
        return TokenWindows(paths, self._dtype, self.window, self.marks)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training part."""
        return int(self.manifest["train"]["tokens"])

    @property
    def windows(self) -> int:
        """Number of training windows."""
        return (self.train_tokens - 1) // self.window

    @property
    def vocabulary(self) -> int:
        """Tokens the tokenizer has."""
        return int(self.manifest["vocabulary"])

    @property
    def marks(self) -> Marks:
        """The tokens that its documents begin and end with."""
        return Marks(**self.manifest["marks"])

    def marks_for(self, tokenizer: "PreTrainedTokenizerFast") -> Marks:
        """For the same text in another tokenizer's tokens."""
        return Marks.of(tokenizer, begin_windows=self.manifest["options"]["begin_windows"])

    @property
    def token_hash(self) -> str:
        """Identity of the tokenizer."""
        return str(self.manifest["tokenizer_hash"])

    @property
    def corpus_hash(self) -> str:
        """Identity of the tokens of both parts, wherever they lie and came from."""
        return str(self.manifest["corpus_hash"])

    def epochs(self, tokens: int) -> float:
        """How often so many training tokens walk through the training part."""
        return tokens / (self.windows * self.window)

    def heldout_documents(self) -> list[HeldoutDocument]:
        """The documents for evaluation, never trained on, in a fixed order."""
        path = self._checked(HELDOUT, self.manifest["heldout"]["sha256"])
        tokens = np.fromfile(path, dtype=self._dtype).astype(np.int64)
        entries = self.manifest["heldout"]["evaluated"]
        # One more than the counted tokens each: the mark that begins it.
        ends = np.cumsum([entry["tokens"] + 1 for entry in entries])
        parts = np.split(tokens, ends[:-1])
        return [
            HeldoutDocument(part, entry["bytes"])
            for part, entry in zip(parts, entries, strict=True)
        ]

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest["dtype"])

    def _checked(self, name: str, sha256: str) -> Path:
        path = self.directory / name
        if file_hash(path) != sha256:
            raise _damaged(self.directory, f"{name} {NOT_AS_WRITTEN}")
        return path


def load_corpus(directory: Path | str, *, window: int) -> Corpus:
    """Open a prepared corpus.

    Args:
        directory: what `prepare_corpus` wrote.
        window: tokens a training window predicts; any number, since windows are cut on reading.

    Raises:
        UserError: no whole corpus of this version there, or it is shorter than one window.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(
            f"{directory} holds no prepared corpus: make one with `capgap corpus SOURCE --out "
            f"{directory} --tokenizer TEACHER`"
        )
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{directory} was prepared by a version whose documents did not begin as the model's "
            "own texts do: run `capgap corpus` again with this --out, and then whatever was made "
            "of it (caches, scores, sweeps)"
        )
    problem = damage(directory, manifest)
    if problem is not None:
        raise _damaged(directory, problem)
    corpus = Corpus(directory, manifest, window)
    if window < 1 or corpus.windows < 1:
        raise UserError(
            f"window {window} does not fit: the training part has {corpus.train_tokens} tokens; "
            "take a smaller window or more text"
        )
    return corpus


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


def check_epochs(corpus: Corpus, tokens: int, max_epochs: float) -> None:
    """Refuse to train longer on a corpus than it is good for.

    Raises:
        UserError: `tokens` are more than `max_epochs` passes over the training part.
    """
    epochs = corpus.epochs(tokens)
    if epochs > max_epochs:
        raise UserError(
            f"{tokens} training tokens are {epochs:.1f} epochs of the corpus "
            f"({corpus.train_tokens} tokens in {corpus.directory}), more than {max_epochs:g}: take "
            "a larger corpus, fewer tokens, or allow more epochs"
        )
