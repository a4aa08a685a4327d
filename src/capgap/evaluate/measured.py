"""What models of different tokenizers say of one text: losses per byte, entropy, calibration.

Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CALIBRATION_BINS = 15
# A rank counts as at most this (arXiv 2601.14249)
MOST_RANK = 100


@dataclass(frozen=True)
class Measured:
    """How one model reads a sample of text; documents are the same for all models that read it.

    Losses and entropies in nats, summed over a document's tokens; `calibration_error` by the
    function of that name. `changed_documents`: how many its tokenizer does not give back as they
    were. `ranks`: sum over tokens of the rank that it gave the one that came, at most MOST_RANK
    each.
    """

    document_losses: list[float]
    document_entropies: list[float]
    document_tokens: list[int]
    document_bytes: list[int]
    calibration_error: float
    changed_documents: int
    seconds: float
    ranks: int = 0

    @property
    def rank_surprisal(self) -> float:
        """Rank-surprisal ratio (arXiv 2601.14249): ranks over nats. Of a student on text that a
        teacher wrote: low where the text is new to it and yet within what it thinks of."""
        return self.ranks / sum(self.document_losses)

    @property
    def tokens(self) -> int:
        return sum(self.document_tokens)

    @property
    def bytes(self) -> int:
        return sum(self.document_bytes)

    @property
    def nats_per_byte(self) -> float:
        """What models of different tokenizers can be compared by."""
        return sum(self.document_losses) / self.bytes

    @property
    def nats_per_token(self) -> float:
        return sum(self.document_losses) / self.tokens

    @property
    def entropy(self) -> float:
        """Of the predictions, nats per token: the loss that the model itself expects."""
        return sum(self.document_entropies) / self.tokens

    @property
    def overconfidence(self) -> float:
        """Nats per token that the loss is above the entropy; below 0 for too little confidence."""
        return self.nats_per_token - self.entropy

    def above(self, other: "Measured") -> tuple[float, float | None]:
        """Nats per byte that this model's loss is above the other's, and the standard error.

        Paired by document: what makes a document hard for both cancels. The error is None for one
        document.
        """
        pairs = zip(self.document_losses, other.document_losses, strict=True)
        differences = [mine - its for mine, its in pairs]
        error = ratio_standard_error(differences, self.document_bytes)
        return sum(differences) / self.bytes, error

    def as_dict(self) -> dict[str, Any]:
        return {
            "nats_per_byte": self.nats_per_byte,
            "nats_per_byte_stderr": ratio_standard_error(self.document_losses, self.document_bytes),
            "nats_per_token": self.nats_per_token,
            "entropy": self.entropy,
            "entropy_per_byte": sum(self.document_entropies) / self.bytes,
            "overconfidence": self.overconfidence,
            "calibration_error": self.calibration_error,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Measurement:
    """Some models on the same sample of `corpus`, in windows of so many of their own tokens.
    `rank_surprisal`: of the student on text that each of them wrote, where there is a student."""

    corpus: str
    window: int
    dtype: str
    device: str
    models: dict[str, Measured]
    rank_surprisal: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """All but the models."""
        sizes = next(iter(self.models.values())).document_bytes
        return {
            "corpus": self.corpus,
            "documents": len(sizes),
            "bytes": sum(sizes),
            "window": self.window,
            "dtype": self.dtype,
            "device": self.device,
        }


def ratio_standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of sum(sums) / sum(counts) over documents (linearised ratio estimator).

    None for fewer than two documents, where nothing is known about the spread.
    """
    if len(sums) < 2:
        return None
    values, weights = np.asarray(sums, float), np.asarray(counts, float)
    residuals = values - values.sum() / weights.sum() * weights
    correction = len(sums) / (len(sums) - 1)
    return float(math.sqrt(correction * (residuals**2).sum()) / weights.sum())


def calibration_error(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error of the likeliest word (arXiv 1706.04599): in `bins` of equal
    width, how far the share of hits is from the mean probability, weighted by tokens.

    confidence [tokens] in (0, 1], the likeliest word's probability; correct [tokens], whether it
    came.
    """
    sure, hit = np.asarray(confidence, float), np.asarray(correct, float)
    # a bin holds its upper end and not its lower one
    places = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(places, weights=sure - hit, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))
