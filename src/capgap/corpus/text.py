"""The text that models are trained on: prepared corpora read as one, each by its share.

A single corpus is a mixture of one. Batches are a pure function of (seed, step). Every window of
every source has a number: those of the first source come first, then those of the second. So what
goes by the number of a window (a teacher's cache, a report) takes any text alike.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capgap.corpus.batches import batch_places, walk
from capgap.corpus.given import Weighted, check_weights
from capgap.corpus.marks import Marks
from capgap.corpus.tokens import Corpus, HeldoutDocument, TokenWindows, checked_numbers, load_corpus
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# After so many windows the order of the sources begins anew, so weights are met to 1 in so many
PATTERN = 10_000
# Another walk for every source, also where two have equally many windows
_SEED_STEP = 1_000_003


class _Windows:
    """The training windows of all sources, by their number in the text."""

    def __init__(self, sources: Sequence[TokenWindows], window: int) -> None:
        self._sources = sources
        self._window = window
        self._starts = np.cumsum([0, *map(len, sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def windows_at(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Windows by their number, int64 [num_indices, window + 1]; IndexError: no such number."""
        numbers = checked_numbers(indices, len(self))
        source_of = np.searchsorted(self._starts, numbers, side="right") - 1
        windows = np.empty((len(numbers), self._window + 1), dtype=np.int64)
        for number, source in enumerate(self._sources):
            here = source_of == number
            windows[here] = source.windows_at(numbers[here] - self._starts[number])
        return windows


@dataclass(frozen=True)
class Text:
    """Corpora of one tokenizer, cut into windows of one length; made by `open` or `of`.

    Attributes:
        sources: the corpora; what all have in common is read from the first.
        shares: of the windows that are trained on, by source; they add up to 1.
    """

    sources: tuple[Corpus, ...]
    shares: tuple[float, ...]

    @classmethod
    def open(cls, given: Sequence[tuple[Path | str, float | None]], window: int) -> "Text":
        """Prepared corpora by their folders and weights; without weights all weigh the same.

        UserError: as `load_corpus`, `of` and `check_weights`.
        """
        weighted = check_weights([Weighted(Path(folder), weight) for folder, weight in given])
        corpora = [load_corpus(one.folder, window=window) for one in weighted]
        return cls.of(corpora, [1.0 if one.weight is None else one.weight for one in weighted])

    @classmethod
    def of(cls, sources: Sequence[Corpus], weights: Sequence[float] | None = None) -> "Text":
        """The corpora with shares in proportion to their weights, met to 1 in PATTERN; without
        weights all are equal.

        UserError: tokenizers that differ (the first token that does), windows that begin
        differently, a share too small to be met.
        """
        for other in sources[1:]:
            _check_alike(sources[0], other)
        counts = _whole_shares(weights or [1.0] * len(sources))
        for source, count in zip(sources, counts, strict=True):
            if count == 0:
                raise UserError(
                    f"the weight of {source.directory} is less than 1 in {PATTERN} of all: give it "
                    "more, or leave the corpus out"
                )
        return cls(tuple(sources), tuple(count / PATTERN for count in counts))

    @property
    def directory(self) -> Path:
        """The first source's folder, whose tokenizer is that of all."""
        return self.sources[0].directory

    @property
    def window(self) -> int:
        """Tokens a training window predicts."""
        return self.sources[0].window

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        return self.sources[0].tokenizer

    @property
    def token_hash(self) -> str:
        """Identity of the tokenizer."""
        return self.sources[0].token_hash

    @property
    def vocabulary(self) -> int:
        """Tokens the tokenizer has."""
        return self.sources[0].vocabulary

    @property
    def marks(self) -> Marks:
        """The tokens that the documents of all sources begin and end with."""
        return self.sources[0].marks

    @property
    def windows(self) -> int:
        """Number of training windows of all sources."""
        return sum(source.windows for source in self.sources)

    @property
    def corpus_hash(self) -> str:
        """Identity of the sources' tokens and of their order, which the windows' numbers hang on;
        the weights are no part of it."""
        hashes = [source.corpus_hash for source in self.sources]
        if len(hashes) == 1:
            return hashes[0]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """Which text it is: what a run that continues must agree on."""
        shares = list(self.shares) if len(self.sources) > 1 else None
        return {"corpus_hash": self.corpus_hash, "shares": shares}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources: their folders' names, or the whole paths where two have one name."""
        names = [source.directory.name for source in self.sources]
        if len(set(names)) < len(names) or not all(names):
            names = [str(source.directory) for source in self.sources]
        return tuple(names)

    @property
    def share_of(self) -> dict[str, float]:
        """The shares by the sources' names."""
        return dict(zip(self.names, self.shares, strict=True))

    @cached_property
    def train(self) -> _Windows:
        """The windows of the training parts; UserError where a file of theirs is damaged."""
        return _Windows([source.train for source in self.sources], self.window)

    def batch(self, *, seed: int, step: int, batch_windows: int) -> NDArray[np.int64]:
        """Window numbers of one step, int64 [batch_windows], a pure function of (seed, step).

        Of any number of windows in a row every source has its share, but for a window or two.
        Each source's windows come exactly once an epoch of it, in an order of that epoch's own.
        """
        pattern, before = self._pattern
        rounds, places = np.divmod(batch_places(step, batch_windows), PATTERN)
        source_of = pattern[places]
        numbers = np.empty(batch_windows, dtype=np.int64)
        start = 0
        for number, source in enumerate(self.sources):
            here = source_of == number
            own = rounds[here] * np.count_nonzero(pattern == number) + before[places[here]]
            walked = walk(own, seed=seed + _SEED_STEP * number, num_windows=source.windows)
            numbers[here] = start + walked
            start += source.windows
        return numbers

    @cached_property
    def _pattern(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source at each of PATTERN places, and how many places of the same source lie before.

        Whoever is furthest behind its share comes next (smooth weighted round robin).
        """
        counts = np.array([round(share * PATTERN) for share in self.shares], dtype=np.int64)
        owed = np.zeros(len(counts), dtype=np.int64)
        seen = np.zeros(len(counts), dtype=np.int64)
        pattern = np.empty(PATTERN, dtype=np.int64)
        before = np.empty(PATTERN, dtype=np.int64)
        for place in range(PATTERN):
            owed += counts
            chosen = int(owed.argmax())
            owed[chosen] -= PATTERN
            pattern[place], before[place] = chosen, seen[chosen]
            seen[chosen] += 1
        return pattern, before

    def heldout_documents(self) -> list[HeldoutDocument]:
        """Those of all sources, source by source; UserError where a file of theirs is damaged."""
        return [document for source in self.sources for document in source.heldout_documents()]

    def heldout_counts(self) -> dict[str, int]:
        """How many held-out documents every source has, by name."""
        counts = [len(source.manifest["heldout"]["evaluated"]) for source in self.sources]
        return dict(zip(self.names, counts, strict=True))

    def read_of_sources(self, tokens: int) -> list[dict[str, Any]]:
        """What so many training tokens read of every source, for a record."""
        return [
            {
                "name": name,
                "folder": str(source.directory),
                "corpus_hash": source.corpus_hash,
                "share": share,
                "train_tokens": source.train_tokens,
                "epochs": source.epochs(round(tokens * share)),
            }
            for name, source, share in zip(self.names, self.sources, self.shares, strict=True)
        ]


def _check_alike(first: Corpus, other: Corpus) -> None:
    from capgap.corpus.tokenizer import compare_tokenizers

    if other.token_hash != first.token_hash:
        difference = compare_tokenizers(first.tokenizer, other.tokenizer)
        raise UserError(
            f"the corpora {first.directory} and {other.directory} have different tokenizers "
            f"({difference or 'they cut text differently'}): prepare both with one "
            f"`--tokenizer {first.directory / 'tokenizer'}`"
        )
    if other.marks != first.marks:
        raise UserError(
            f"windows of {first.directory} and {other.directory} begin differently: prepare "
            "both with --begin-windows, or both without"
        )


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """PATTERN places in proportion to the weights: rounded down, the rest to the largest parts."""
    exact = [weight / math.fsum(weights) * PATTERN for weight in weights]
    counts = [math.floor(one) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: PATTERN - sum(counts)]:
        counts[place] += 1
    return counts
