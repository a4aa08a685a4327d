"""What a model says of text, by document: losses with their errors, entropy, calibration.

Imports no torch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

CALIBRATION_BINS = 15
# A rank counts as at most this (arXiv 2601.14249)
MOST_RANK = 100


def ratio_standard_error(sums: ArrayLike, counts: ArrayLike) -> float | None:
    """Standard error of sum(sums) / sum(counts) over documents (linearised ratio estimator).

    None for fewer than two documents, where nothing is known about the spread.
    """
    values, weights = np.asarray(sums, float), np.asarray(counts, float)
    if len(values) < 2:
        return None
    residuals = values - values.sum() / weights.sum() * weights
    correction = len(values) / (len(values) - 1)
    return float(math.sqrt(correction * (residuals**2).sum()) / weights.sum())


def calibration_error(
    confidence: ArrayLike, correct: ArrayLike, *, bins: int = CALIBRATION_BINS
) -> float:
    """Expected calibration error of the likeliest token (arXiv 1706.04599): in `bins` of equal
    width, how far the share of hits is from the mean probability, weighted by tokens.

    confidence [tokens] in (0, 1], the likeliest token's probability; correct [tokens], whether it
    came.
    """
    sure, hit = np.asarray(confidence, float), np.asarray(correct, float)
    # a bin holds its upper end and not its lower one
    indices = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(indices, weights=sure - hit, minlength=bins)
    return float(np.abs(gaps).sum() / len(sure))


@dataclass(frozen=True)
class HeldoutLoss:
    """Losses by document; the same documents in the same order for every model of a sweep."""

    document_losses: list[float]  # nats, summed over a document's tokens
    document_tokens: list[int]
    document_bytes: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.document_tokens)

    @property
    def bytes(self) -> int:
        return sum(self.document_bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.document_losses) / self.tokens

    @property
    def loss_stderr(self) -> float | None:
        return ratio_standard_error(self.document_losses, self.document_tokens)

    @property
    def bits_per_byte(self) -> float:
        return sum(self.document_losses) / math.log(2) / self.bytes

    @property
    def bits_per_byte_stderr(self) -> float | None:
        bits = [loss / math.log(2) for loss in self.document_losses]
        return ratio_standard_error(bits, self.document_bytes)

    def as_dict(self) -> dict[str, Any]:
        names = (
            *("loss", "loss_stderr", "bits_per_byte", "bits_per_byte_stderr", "tokens", "bytes"),
            *("document_losses", "document_tokens"),
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class MixedLoss(HeldoutLoss):
    """The loss of a mixture, on the documents of all its sources in order: the mean over sources,
    weighted by their shares of the training tokens, whatever the sizes of their held-out parts.

    So it is what training brings down. Bits per byte are those of a text with these shares of
    tokens.
    """

    sources: dict[str, HeldoutLoss]
    shares: dict[str, float]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.shares[name] * source.loss for name, source in self.sources.items())

    @property
    def loss_stderr(self) -> float | None:
        return self._stderr(0.0)

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self._bytes_per_token

    @property
    def bits_per_byte_stderr(self) -> float | None:
        error = self._stderr(self.bits_per_byte)
        return error and error / math.log(2) / self._bytes_per_token

    @property
    def _bytes_per_token(self) -> float:
        return sum(self.shares[name] * one.bytes / one.tokens for name, one in self.sources.items())

    def _stderr(self, bits_per_byte: float) -> float | None:
        """Standard error of the loss less `bits_per_byte` for every byte, nats per token."""
        total = 0.0
        for name, source in self.sources.items():
            rests = [
                loss - bits_per_byte * math.log(2) * size
                for loss, size in zip(source.document_losses, source.document_bytes, strict=True)
            ]
            error = ratio_standard_error(rests, source.document_tokens)
            if error is None:
                return None
            total += (self.shares[name] * error) ** 2
        return math.sqrt(total)

    def as_dict(self) -> dict[str, Any]:
        """With each source's own."""
        own = {name: one.as_dict() for name, one in self.sources.items()}
        sources = {name: {"share": self.shares[name], **one} for name, one in own.items()}
        return super().as_dict() | {"sources": sources}


def mixed_loss(
    whole: HeldoutLoss, documents: dict[str, int], shares: dict[str, float]
) -> HeldoutLoss:
    """A loss on all sources at once, by source; `documents` counts those of every source, in their
    order. The loss itself where there is one source."""
    if len(documents) == 1:
        return whole
    losses, tokens, sizes = whole.document_losses, whole.document_tokens, whole.document_bytes
    sources, start = {}, 0
    for name, count in documents.items():
        part = slice(start, start + count)
        sources[name] = HeldoutLoss(losses[part], tokens[part], sizes[part])
        start += count
    return MixedLoss(losses, tokens, sizes, sources=sources, shares=shares)


@dataclass(frozen=True, kw_only=True)
class Measured(HeldoutLoss):
    """How one model reads a sample of text; documents are the same for all models that read it.

    Entropies in nats, summed over a document's tokens; `calibration_error` by the function of that
    name. `changed_documents`: how many its tokenizer does not give back as they were. `ranks`: sum
    over tokens of the rank that it gave the one that came, at most MOST_RANK each.
    """

    document_entropies: list[float]
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
    def nats_per_byte(self) -> float:
        """What models of different tokenizers can be compared by."""
        return sum(self.document_losses) / self.bytes

    @property
    def entropy(self) -> float:
        """Of the predictions, nats per token: the loss that the model itself expects."""
        return sum(self.document_entropies) / self.tokens

    @property
    def overconfidence(self) -> float:
        """Nats per token that the loss is above the entropy; below 0 for too little confidence."""
        return self.loss - self.entropy

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
        """What advice says of a model, per byte first."""
        names = ("entropy", "overconfidence", "calibration_error", "tokens", "bytes", "seconds")
        return {
            "nats_per_byte": self.nats_per_byte,
            "nats_per_byte_stderr": ratio_standard_error(self.document_losses, self.document_bytes),
            "entropy_per_byte": sum(self.document_entropies) / self.bytes,
            "nats_per_token": self.loss,
            **{name: getattr(self, name) for name in names},
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
