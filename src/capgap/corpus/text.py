"""The text that models are trained on: prepared corpora read as one, each by its share.

A single corpus is a mixture of one. Batches are a pure function of (seed, step), nothing to save or
skip. Windows are numbered over all sources, those of the first come first, so what goes by the
number of a window (a teacher's cache, a report) takes any text alike.

An epoch's order is a keyed Feistel permutation of 0 .. num_windows - 1 (a block cipher on a small
domain, made to fit by cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains",
2002), so the window at any position in it is computed alone, in O(1).
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capgap.corpus.names import Weighted, check_weights
from capgap.corpus.tokens import Corpus, HeldoutDocument, TokenWindows, load_corpus
from capgap.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# After so many windows the order of the sources begins anew, so weights are met to 1 in so many
PATTERN = 10_000
# Another walk for every source, also where two have equally many windows
SEED_STEP = 1_000_003
ROUNDS = 8


class Text:
    """Corpora of one tokenizer, cut into windows of one length; made by `open` or `of`.

    Attributes:
        sources: the corpora; what all have in common is read from the first.
        shares: of the windows that are trained on, by source; they add up to 1.
        directory, window, token_hash, vocabulary, marks: those of the first source.
        windows: number of training windows of all sources.
        corpus_hash: identity of the sources' tokens and of their order, which the windows' numbers
            depend on; the weights are no part of it.
        identity: which text it is: what a run that continues must agree on.
        names: the sources' folders' names, or the whole paths where two have one name.
        share_of: the shares by the sources' names.
    """

    def __init__(self, sources: Sequence[Corpus], shares: Sequence[float]) -> None:
        self.sources = tuple(sources)
        self.shares = tuple(shares)
        first, *others = self.sources
        self.directory = first.directory
        self.window = first.window
        self.token_hash = first.token_hash
        self.vocabulary = first.vocabulary
        self.marks = first.marks
        self.windows = sum(source.windows for source in self.sources)
        self.corpus_hash = first.corpus_hash
        if others:
            hashes = " ".join(source.corpus_hash for source in self.sources)
            self.corpus_hash = hashlib.sha256(hashes.encode()).hexdigest()
        self.identity: dict[str, Any] = {
            "corpus_hash": self.corpus_hash,
            "shares": list(shares) if others else None,
        }
        names = [source.directory.name for source in self.sources]
        if len(set(names)) < len(names) or not all(names):
            names = [str(source.directory) for source in self.sources]
        self.names = tuple(names)
        self.share_of = dict(zip(self.names, self.shares, strict=True))

    @classmethod
    def open(cls, given: Sequence[tuple[Path | str, float | None]], window: int) -> "Text":
        """Prepared corpora by their folders and weights; without weights all weigh the same.

        UserError: as `load_corpus`, `of` and `check_weights`.
        """
        weighted = check_weights([Weighted(Path(folder), weight) for folder, weight in given])
        corpora = [load_corpus(folder, window=window) for folder, _ in weighted]
        return cls.of(corpora, [1.0 if weight is None else weight for _, weight in weighted])

    @classmethod
    def of(cls, sources: Sequence[Corpus], weights: Sequence[float] | None = None) -> "Text":
        """Corpora of one tokenizer with shares in proportion to their weights, met to 1 in PATTERN;
        without weights all are equal.

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
        return cls(sources, [count / PATTERN for count in counts])

    @property
    def tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer of all sources."""
        return self.sources[0].tokenizer

    @cached_property
    def train(self) -> TokenWindows:
        """The windows of the training parts; UserError where a file of theirs is damaged."""
        return self.sources[0].train_with(*self.sources[1:])

    def batch(self, *, seed: int, step: int, batch_windows: int) -> NDArray[np.int64]:
        """Window numbers of one step, int64 [batch_windows], a pure function of (seed, step).

        Of any number of windows in a row every source has its share, but for a window or two.
        Each source's windows come exactly once an epoch of it, in an order of that epoch's own.
        """
        pattern, before = self._pattern
        rounds, positions = np.divmod(_batch_positions(step, batch_windows), PATTERN)
        source_of = pattern[positions]
        numbers = np.empty(batch_windows, dtype=np.int64)
        start = 0
        for number, source in enumerate(self.sources):
            here = source_of == number
            own = rounds[here] * np.count_nonzero(pattern == number) + before[positions[here]]
            walked = _walk(own, seed=seed + SEED_STEP * number, num_windows=source.windows)
            numbers[here] = start + walked
            start += source.windows
        return numbers

    @cached_property
    def _pattern(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source at each of PATTERN positions, and how many of the same source lie before.

        Whoever is furthest behind its share comes next (smooth weighted round robin).
        """
        counts = np.array([round(share * PATTERN) for share in self.shares], dtype=np.int64)
        owed, seen = np.zeros_like(counts), np.zeros_like(counts)
        pattern, before = np.empty((2, PATTERN), dtype=np.int64)
        for position in range(PATTERN):
            owed += counts
            chosen = int(owed.argmax())
            owed[chosen] -= PATTERN
            pattern[position], before[position] = chosen, seen[chosen]
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
            "both with `begin_windows`, or both without"
        )


def _whole_shares(weights: Sequence[float]) -> list[int]:
    """PATTERN places in proportion to the weights: rounded down, the rest to the largest parts."""
    exact = [weight / math.fsum(weights) * PATTERN for weight in weights]
    counts = [math.floor(one) for one in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_rest[: PATTERN - sum(counts)]:
        counts[i] += 1
    return counts


def batch_indices(
    *, seed: int, step: int, batch_windows: int, num_windows: int
) -> NDArray[np.int64]:
    """Window numbers of one step of a single corpus, int64 [batch_windows]: a pure function.

    Step after step (from 0) walks through all windows in an order shuffled anew for each epoch and
    seed: every window comes exactly once an epoch. An epoch may end within a batch.
    """
    return _walk(_batch_positions(step, batch_windows), seed=seed, num_windows=num_windows)


def _batch_positions(step: int, batch_windows: int) -> NDArray[np.int64]:
    """The positions of a step's windows, counted over all steps, int64 [batch_windows]."""
    if step < 0 or batch_windows < 1:
        raise ValueError(f"no batch: {step=}, {batch_windows=}")
    return step * batch_windows + np.arange(batch_windows, dtype=np.int64)


def _walk(positions: NDArray[np.int64], *, seed: int, num_windows: int) -> NDArray[np.int64]:
    """The windows at these positions of the endless walk through them, int64 [num_positions]."""
    if num_windows < 1:
        raise ValueError(f"no batch: {num_windows=}")
    epochs, positions_in_epoch = np.divmod(positions, num_windows)
    indices = np.empty(len(positions), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        digest = hashlib.blake2b(f"batches {seed} {epoch}".encode(), digest_size=8 * ROUNDS)
        keys = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)
        indices[here] = _permute(positions_in_epoch[here], num_windows, keys)
    return indices


def _permute(
    positions: NDArray[np.int64], size: int, keys: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Image of each position under the permutation of 0 .. size - 1 that the keys stand for."""
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    values = positions.astype(np.uint64)
    outside = np.ones(len(values), dtype=bool)
    # The cipher permutes 0 .. 4**half_bits - 1, fewer than 4 * size for a size above 1. Walking on
    # from a value outside comes back inside, and never to a value that another position has reached
    while outside.any():
        left, right = values[outside] >> half_bits, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        values[outside] = (left << half_bits) | right
        outside = values >= size
    return values.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every input bit over all 64 (the finaliser of splitmix64); wraps around by intent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
