"""A model's own loss, entropy and calibration on text in its own tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capgap.corpus.marks import Marks
from capgap.corpus.tokens import HeldoutDocument
from capgap.distill.chunking import chunk_rows
from capgap.distill.head import IGNORED_LABEL, HeadInput, chunks, likeliest, softmax_
from capgap.evaluate.heldout import BATCH_TOKENS
from capgap.evaluate.measured import MOST_RANK, Measured, calibration_error
from capgap.models.parts import Parts


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
    losses, entropies, confidence = (
        torch.empty(targets.shape[0], device=targets.device, dtype=source.wide) for _ in range(3)
    )
    correct = torch.empty(targets.shape[0], device=targets.device, dtype=torch.bool)
    ranks = torch.empty(targets.shape[0], device=targets.device, dtype=torch.int64)
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


@torch.no_grad()
def measure_model(
    parts: Parts,
    documents: Sequence[HeldoutDocument],
    marks: Marks,
    *,
    window: int,
    vocabulary: int | None = None,
    changed_documents: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, rows: None,
) -> Measured:
    """Reads the documents in rows of at most `window` tokens and predicts every token once, each
    row from the context that `marks` give it. Of a model's words the first `vocabulary` count,
    as when it teaches. `on_batch` is told the rows that are done and how many there are.
    FloatingPointError where a loss is not finite.
    """
    was_training = parts.training
    parts.eval()
    began = time.monotonic()
    device = parts.head.weight.device
    rows = _rows(documents, marks, window)
    losses, entropies = np.zeros(len(documents)), np.zeros(len(documents))
    confidence: list[NDArray[np.float64]] = []
    correct: list[NDArray[np.bool_]] = []
    done, ranks = 0, 0
    for batch in _batches(rows):
        inputs, targets = (side.to(device) for side in _padded(batch))
        source = HeadInput.of(parts, inputs, vocabulary)
        counted = targets.reshape(-1) != IGNORED_LABEL
        source = replace(source, hidden=source.hidden[counted])
        found = token_statistics(source, targets.reshape(-1)[counted])
        owners = np.repeat([row.document for row in batch], [len(row.targets) for row in batch])
        np.add.at(losses, owners, found.losses.double().cpu().numpy())
        np.add.at(entropies, owners, found.entropies.double().cpu().numpy())
        confidence.append(found.confidence.double().cpu().numpy())
        correct.append(found.correct.cpu().numpy())
        ranks += int(found.ranks.clamp(max=MOST_RANK).sum())
        done += len(batch)
        on_batch(done, len(rows))
    parts.train(was_training)
    if not np.isfinite(losses + entropies).all():
        raise FloatingPointError("the losses are not finite")
    return Measured(
        losses.tolist(),
        entropies.tolist(),
        [len(document.tokens) - 1 for document in documents],
        [document.num_bytes for document in documents],
        calibration_error(np.concatenate(confidence), np.concatenate(correct)),
        changed_documents,
        time.monotonic() - began,
        ranks,
    )


@dataclass(frozen=True)
class _Row:
    """Some tokens of a document, each with the one before it: int64 [tokens] both."""

    document: int
    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]


def _rows(documents: Sequence[HeldoutDocument], marks: Marks, window: int) -> list[_Row]:
    """The longest first: they need the most memory, and rows of a length waste none on padding."""
    rows = [
        _Row(index, piece[:-1], piece[1:])
        for index, (tokens, _) in enumerate(documents)
        for piece in marks.rows(tokens, window)
    ]
    return sorted(rows, key=lambda row: -len(row.targets))


def _batches(rows: Sequence[_Row]) -> Iterator[Sequence[_Row]]:
    start = 0
    while start < len(rows):
        end = start + max(1, BATCH_TOKENS // len(rows[start].targets))
        yield rows[start:end]
        start = end


def _padded(batch: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    """inputs, targets [rows, tokens]; no token of a row sees what fills it up behind its end."""
    shape = len(batch), len(batch[0].targets)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, IGNORED_LABEL, np.int64)
    for place, row in enumerate(batch):
        inputs[place, : len(row.inputs)] = row.inputs
        targets[place, : len(row.targets)] = row.targets
    return torch.from_numpy(inputs), torch.from_numpy(targets)
