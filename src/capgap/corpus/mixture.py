"""Several prepared corpora read as one, by weight: batches stay a pure function of (seed, step).

Every window of every source has a number: those of the first source come first, then those of the
second. So whatever goes by the number of a window (a teacher's cache, a report) takes a mixture as
it takes one corpus.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capgap.corpus.batches import batch_places, walk
from capgap.corpus.marks import Marks
from capgap.corpus.tokens import Corpus, HeldoutDocument, TokenWindows
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# After so many windows the order of the sources begins anew, so weights are met to 1 in so many
PATTERN = 10_000
# Another walk for every source, also where two have equally many windows
_SEED_STEP = 1_000_003


class _MixedWindows:
    """The training windows of all sources, by their number in the mixture."""

    def __init__(self, sources: Sequence[TokenWindows]) -> None:
        self._sources = sources
        self._starts = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def windows_at(self, indices: ArrayLike) -> NDArray[np.int64]:
        """Windows by their number, int64 [num_indices, window + 1]; IndexError as one corpus."""
        numbers = np.asarray(indices, dtype=np.int64)
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"window {numbers.min()} to {numbers.max()} of {len(self)}")
        source_of = np.searchsorted(self._starts, numbers, side="right") - 1
        read = {
            number: source.windows_at(numbers[source_of == number] - self._starts[number])
            for number, source in enumerate(self._sources)
        }
        windows = np.empty((len(numbers), read[0].shape[1]), dtype=np.int64)
        for number, found in read.items():
            windows[source_of == number] = found
        return windows


@dataclass(frozen=True)
class Mixture:
    """Corpora of one tokenizer, read at once. It has what a `Corpus` has for training.

    Attributes:
        names: of the sources, in order.
        sources: the corpora, cut into windows of the same length.
        shares: of the windows that are trained on; they add up to 1.
    """

    names: tuple[str, ...]
    sources: tuple[Corpus, ...]
    shares: tuple[float, ...]

    @property
    def directory(self) -> Path:
        """The first source's, whose tokenizer is that of all."""
        return self.sources[0].directory

    @property
    def window(self) -> int:
        """Tokens a training window predicts."""
        return self.sources[0].window

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of all sources."""
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
        """Identity of the sources' tokens and of their order, which the numbers hang on; the
        weights are no part of it."""
        hashes = " ".join(source.corpus_hash for source in self.sources)
        return hashlib.sha256(hashes.encode()).hexdigest()

    @cached_property
    def train(self) -> _MixedWindows:
        """The training parts."""
        return _MixedWindows([source.train for source in self.sources])

    def batch(self, *, seed: int, step: int, batch_windows: int) -> NDArray[np.int64]:
        """Window numbers of one step, int64 [batch_windows], a pure function of (seed, step).

        Of any number of windows in a row every source has its share, but for a window or two.
        Each source's windows are walked as a single corpus' are: every one once an epoch.
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

    @property
    def share_of(self) -> dict[str, float]:
        """The shares by the sources' names."""
        return dict(zip(self.names, self.shares, strict=True))

    def heldout_counts(self) -> dict[str, int]:
        """How many held-out documents every source has, by name."""
        return {
            name: len(source.manifest["heldout"]["evaluated"])
            for name, source in zip(self.names, self.sources, strict=True)
        }

    def heldout_documents(self) -> list[HeldoutDocument]:
        """Those of all sources, source by source."""
        return [document for source in self.sources for document in source.heldout_documents()]


TrainingText: TypeAlias = Corpus | Mixture


def mix(sources: Sequence[Corpus], weights: Sequence[float]) -> Mixture:
    """A mixture with shares in proportion to the weights, met to 1 in PATTERN.

    UserError: tokenizers that differ (the first token that does), a share too small to be met.
    """
    from capgap.corpus.tokenizer import compare_tokenizers

    first = sources[0]
    for other in sources[1:]:
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
    counts = _whole_shares(weights)
    for source, count in zip(sources, counts, strict=True):
        if count == 0:
            raise UserError(
                f"the weight of {source.directory} is less than 1 in {PATTERN} of all: give it "
                "more, or leave the corpus out"
            )
    return Mixture(_names(sources), tuple(sources), tuple(count / PATTERN for count in counts))


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """PATTERN places in proportion to the weights: rounded down, the rest to the largest parts."""
    exact = [weight / math.fsum(weights) * PATTERN for weight in weights]
    counts = [math.floor(one) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: counts[place] - exact[place])
    for place in by_rest[: PATTERN - sum(counts)]:
        counts[place] += 1
    return counts


def _names(sources: Sequence[Corpus]) -> tuple[str, ...]:
    """The folders' names, or their whole paths where two have one name."""
    names = [source.directory.name for source in sources]
    if len(set(names)) < len(names) or not all(names):
        names = [str(source.directory) for source in sources]
    return tuple(names)


def source_epochs(text: TrainingText, tokens: int) -> dict[str, float]:
    """How often so many training tokens walk through every source, by its name."""
    return {
        name: source.epochs(round(tokens * share))
        for name, source, share in zip(text.names, text.sources, text.shares, strict=True)
    }
