"""How models read held-out text: losses by document with standard errors, entropy, calibration.

One reader of rows serves all of them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from capgap.corpus.marks import Marks
from capgap.corpus.tokens import HeldoutDocument
from capgap.distill.chunking import chunk_rows
from capgap.distill.head import (
    IGNORED_LABEL,
    HeadInput,
    chunks,
    likeliest,
    softmax_,
    token_losses,
)
from capgap.evaluate.measured import (
    MOST_RANK,
    Measured,
    calibration_error,
    ratio_standard_error,
)
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

    def as_dict(self) -> dict[str, Any]:
        bits = [loss / math.log(2) for loss in self.document_losses]
        return {
            "loss": self.loss,
            "loss_stderr": self.loss_stderr,
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_stderr": ratio_standard_error(bits, self.document_bytes),
            "tokens": self.tokens,
            "bytes": self.bytes,
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
        return sum(self.shares[name] * one.bytes / one.tokens for name, one in self.sources.items())

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
            "tokens": sum(one.tokens for one in every),
            "bytes": sum(one.bytes for one in every),
            "document_losses": [loss for one in every for loss in one.document_losses],
            "document_tokens": [tokens for one in every for tokens in one.document_tokens],
            "sources": {
                name: {"share": self.shares[name], **one.as_dict()}
                for name, one in self.sources.items()
            },
        }


def mixed_loss(
    found: HeldoutLoss, documents: dict[str, int], shares: dict[str, float]
) -> HeldoutLoss | MixedLoss:
    """By source what was found of all at once; `documents` of every source, in their order. Of an
    only source it is that."""
    if len(documents) == 1:
        return found
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
    """Held-out documents cut into rows of at most `window` targets, ready to be read.

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
    pieces = [marks.rows(tokens, window) for tokens, _ in documents]
    rows = [piece for of_one in pieces for piece in of_one]
    inputs = torch.zeros(len(rows), window, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED_LABEL)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = torch.from_numpy(row[:-1])
        targets[index, : len(row) - 1] = torch.from_numpy(row[1:])
    return HeldoutSet(
        inputs,
        targets,
        torch.arange(len(documents)).repeat_interleave(torch.tensor([len(one) for one in pieces])),
        [len(tokens) - 1 for tokens, _ in documents],
        [num_bytes for _, num_bytes in documents],
        vocabulary,
    )


@torch.no_grad()
def evaluate_heldout(parts: Parts, heldout: HeldoutSet, ranks: Ranks = ALONE) -> HeldoutLoss:
    """Every held-out token is predicted once, from the tokens before it in its row.

    Several ranks share the rows; all of them learn the result.
    """
    sums = torch.zeros(len(heldout.document_tokens), dtype=torch.float64)
    for rows, source, targets in _read(parts, heldout, ranks):
        losses = token_losses(source, targets.reshape(-1)).reshape(targets.shape)
        sums.index_add_(0, heldout.document[rows], losses.double().sum(1).cpu())
    sums = ranks.total(sums)
    return HeldoutLoss(sums.tolist(), heldout.document_tokens, heldout.document_bytes)


@torch.no_grad()
def measure_model(
    parts: Parts,
    heldout: HeldoutSet,
    *,
    changed_documents: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, rows: None,
) -> Measured:
    """Loss, entropy and calibration, every token predicted once. `on_batch` is told the rows that
    are done and how many there are. FloatingPointError where a loss is not finite."""
    began = time.monotonic()
    losses, entropies = torch.zeros(2, len(heldout.document_tokens), dtype=torch.float64)
    confidence, correct = [], []
    done, ranks = 0, 0
    for rows, source, targets in _read(parts, heldout):
        counted = targets != IGNORED_LABEL
        source = replace(source, hidden=source.hidden[counted.reshape(-1)])
        found = token_statistics(source, targets[counted])
        owners = heldout.document[rows].repeat_interleave(counted.sum(1).cpu())
        losses.index_add_(0, owners, found.losses.double().cpu())
        entropies.index_add_(0, owners, found.entropies.double().cpu())
        confidence.append(found.confidence.double().cpu())
        correct.append(found.correct.cpu())
        ranks += int(found.ranks.clamp(max=MOST_RANK).sum())
        done += len(rows)
        on_batch(done, len(heldout.inputs))
    if not (losses + entropies).isfinite().all():
        raise FloatingPointError("the losses are not finite")
    return Measured(
        losses.tolist(),
        entropies.tolist(),
        heldout.document_tokens,
        heldout.document_bytes,
        calibration_error(torch.cat(confidence), torch.cat(correct)),
        changed_documents,
        time.monotonic() - began,
        ranks,
    )


def _read(
    parts: Parts, heldout: HeldoutSet, ranks: Ranks = ALONE
) -> Iterator[tuple[Tensor, HeadInput, Tensor]]:
    """The model on all rows, some at a time: numbers of the rows [rows], what it gives to the loss,
    targets [rows, seq].

    The longest come first: they need the most memory, and rows of a length waste none on padding.
    Each rank reads its own rows.
    """
    was_training = parts.training
    parts.eval()
    device = parts.head.weight.device
    ends = torch.arange(1, heldout.targets.shape[1] + 1)
    lengths = ((heldout.targets != IGNORED_LABEL) * ends).amax(1)
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        width = max(1, int(lengths[order[start]]))
        end = min(start + max(1, BATCH_TOKENS // width) * ranks.world, len(order))
        # past the end nothing counts, but all ranks have to run a sharded model equally often
        places = torch.arange(start, start + -(-(end - start) // ranks.world) * ranks.world)
        mine = places[ranks.rank :: ranks.world]
        rows = order[mine.clamp_max(len(order) - 1)]
        targets = heldout.targets[rows, :width]
        targets[mine >= end] = IGNORED_LABEL
        inputs = heldout.inputs[rows, :width].to(device)
        yield rows, HeadInput.of(parts, inputs, heldout.vocabulary), targets.to(device)
        start = end
    release(parts)
    parts.train(was_training)


@dataclass(frozen=True)
class TokenStatistics:
    """Of every token [tokens]: its loss and the entropy of its prediction in nats, the probability
    of the likeliest word, whether that came, and the token's rank among the words, from 1."""

    losses: Tensor
    entropies: Tensor
    confidence: Tensor
    correct: Tensor
    ranks: Tensor


@torch.no_grad()
def token_statistics(
    source: HeadInput, targets: Tensor, *, chunk_tokens: int | None = None
) -> TokenStatistics:
    """targets [tokens], each one of the words; logits exist for a chunk of tokens at a time."""
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(targets.device.type, source.weight.shape[0])
    losses, entropies, confidence = torch.empty(
        3, len(targets), device=targets.device, dtype=source.wide
    )
    correct, ranks = torch.empty_like(targets, dtype=torch.bool), torch.empty_like(targets)
    head = source.ready()
    for rows in chunks(len(targets), chunk_tokens):
        logits = head.logits_(head.product(rows))
        probabilities = torch.empty_like(logits)
        log_sum = softmax_(logits, probabilities)
        wanted = targets[rows].unsqueeze(-1)
        own = logits.gather(-1, wanted)
        losses[rows] = (log_sum - own).squeeze(-1)
        ranks[rows] = (logits > own).sum(-1) + 1
        confidence[rows] = log_sum.neg().exp_().squeeze(-1)
        correct[rows] = (likeliest(logits) == wanted).squeeze(-1)
        entropies[rows] = log_sum.squeeze(-1) - probabilities.mul_(logits).sum(-1)
    return TokenStatistics(losses, entropies, confidence, correct, ranks)
