"""Held-out loss with its standard error over documents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from capgap.corpus.marks import Marks
from capgap.corpus.tokens import HeldoutDocument
from capgap.distill.head import IGNORED_LABEL, HeadInput, token_losses
from capgap.evaluate.measured import ratio_standard_error
from capgap.models.parallel import ALONE, Ranks, release
from capgap.models.parts import Parts

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldoutLoss:
    """Losses by document; the same documents in the same order for every model of a sweep."""

    document_losses: list[float]  # nats, summed over a document's tokens
    document_tokens: list[int]
    document_bytes: list[int]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.document_losses) / sum(self.document_tokens)

    @property
    def loss_stderr(self) -> float | None:
        return ratio_standard_error(self.document_losses, self.document_tokens)

    @property
    def bits_per_byte(self) -> float:
        return sum(self.document_losses) / math.log(2) / sum(self.document_bytes)

    def as_dict(self) -> dict[str, Any]:
        bits = [loss / math.log(2) for loss in self.document_losses]
        return {
            "loss": self.loss,
            "loss_stderr": self.loss_stderr,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_stderr": ratio_standard_error(bits, self.document_bytes),
            "tokens": sum(self.document_tokens),
            "bytes": sum(self.document_bytes),
            "document_losses": self.document_losses,
            "document_tokens": self.document_tokens,
        }


@dataclass(frozen=True)
class MixedLoss:
    """The held-out losses of a mixture's sources, and of the mixture: the mean over sources,
    weighted by their shares of the training tokens, whatever the sizes of their held-out parts.

    So it is what training brings down. Bits per byte are those of a text with these shares of
    tokens.
    """

    sources: dict[str, HeldoutLoss]
    shares: dict[str, float]

    @property
    def loss(self) -> float:
        """Nats per token."""
        return sum(self.shares[name] * one.loss for name, one in self.sources.items())

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self._bytes_per_token

    @property
    def _bytes_per_token(self) -> float:
        return sum(
            self.shares[name] * sum(one.document_bytes) / sum(one.document_tokens)
            for name, one in self.sources.items()
        )

    def _stderr(self, bits_per_byte: float) -> float | None:
        """Of the loss less what the bytes are worth at so many bits each, nats per token."""
        total = 0.0
        for name, one in self.sources.items():
            rests = [
                loss - bits_per_byte * math.log(2) * size
                for loss, size in zip(one.document_losses, one.document_bytes, strict=True)
            ]
            error = ratio_standard_error(rests, one.document_tokens)
            if error is None:
                return None
            total += (self.shares[name] * error) ** 2
        return math.sqrt(total)

    def as_dict(self) -> dict[str, Any]:
        """The keys of one corpus, with the documents of all sources in order, and `sources`."""
        every = list(self.sources.values())
        bits = self._stderr(self.bits_per_byte)
        return {
            "loss": self.loss,
            "loss_stderr": self._stderr(0.0),
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_stderr": bits and bits / math.log(2) / self._bytes_per_token,
            "tokens": sum(sum(one.document_tokens) for one in every),
            "bytes": sum(sum(one.document_bytes) for one in every),
            "document_losses": [loss for one in every for loss in one.document_losses],
            "document_tokens": [tokens for one in every for tokens in one.document_tokens],
            "sources": {
                name: {"share": self.shares[name], **one.as_dict()}
                for name, one in self.sources.items()
            },
        }


def mixed_loss(
    found: HeldoutLoss, documents: dict[str, int], shares: dict[str, float]
) -> MixedLoss:
    """By source what was found of all at once; `documents` of every source, in their order."""
    sources = {}
    start = 0
    for name, number in documents.items():
        part = slice(start, start + number)
        sources[name] = HeldoutLoss(
            found.document_losses[part], found.document_tokens[part], found.document_bytes[part]
        )
        start += number
    return MixedLoss(sources, shares)


@dataclass(frozen=True)
class HeldoutSet:
    """Held-out documents cut into rows of at most `window` targets, ready to be scored.

    inputs, targets [rows, window]; document [rows] tells whose row it is. Positions past a
    document's end carry IGNORED_LABEL; causal attention keeps them from being seen. Of a model's
    words the first `vocabulary` count, all where it is None: rows that pad a table are no words.
    """

    inputs: Tensor
    targets: Tensor
    document: Tensor
    document_tokens: list[int]
    document_bytes: list[int]
    vocabulary: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.document_tokens)


def heldout_set(
    documents: Sequence[HeldoutDocument], marks: Marks, window: int, vocabulary: int | None = None
) -> HeldoutSet:
    """Rows of the documents in order, each from the context that `marks` give it."""
    inputs, targets, owners = [], [], []
    for index, (tokens, _) in enumerate(documents):
        for piece in marks.rows(tokens, window):
            row_input = np.zeros(window, np.int64)
            row_target = np.full(window, IGNORED_LABEL, np.int64)
            row_input[: len(piece) - 1] = piece[:-1]
            row_target[: len(piece) - 1] = piece[1:]
            inputs.append(row_input)
            targets.append(row_target)
            owners.append(index)
    return HeldoutSet(
        torch.from_numpy(np.stack(inputs)),
        torch.from_numpy(np.stack(targets)),
        torch.tensor(owners),
        [len(document.tokens) - 1 for document in documents],
        [document.num_bytes for document in documents],
        vocabulary,
    )


@torch.no_grad()
def evaluate_heldout(parts: Parts, heldout: HeldoutSet, ranks: Ranks = ALONE) -> HeldoutLoss:
    """Every held-out token is predicted once, from the tokens before it in its row.

    Several ranks share the rows; all of them learn the result.
    """
    was_training = parts.training
    parts.eval()
    rows_at_once = max(1, BATCH_TOKENS // heldout.inputs.shape[1])
    device = parts.head.weight.device
    sums = torch.zeros(len(heldout.document_tokens), dtype=torch.float64)
    count = len(heldout.inputs)
    # past the end nothing counts, but all ranks have to run a sharded model equally often
    mine = torch.arange(ranks.rank, -(-count // ranks.world) * ranks.world, ranks.world)
    for places in mine.split(rows_at_once):
        rows = places.clamp_max(count - 1)
        source = HeadInput.of(parts, heldout.inputs[rows].to(device), heldout.vocabulary)
        targets = heldout.targets[rows].to(device)
        losses = token_losses(source, targets.reshape(-1))
        row_sums = losses.reshape(targets.shape).double().sum(1).cpu() * (places < count)
        sums.index_add_(0, heldout.document[rows], row_sums)
    release(parts)
    parts.train(was_training)
    sums = ranks.total(sums)
    return HeldoutLoss(sums.tolist(), heldout.document_tokens, heldout.document_bytes)
