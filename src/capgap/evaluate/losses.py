"""How models read held-out text: one reader of rows, for losses by document as for entropy and
calibration beside them."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from capgap.corpus.tokens import HeldoutDocument, Marks
from capgap.distill import chunk_rows
from capgap.distill.head import IGNORED_LABEL, HeadInput, chunks, likeliest, softmax_, token_losses
from capgap.evaluate.measured import MOST_RANK, HeldoutLoss, Measured, calibration_error
from capgap.models.parallel import ALONE, Ranks, release
from capgap.models.parts import Parts

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class HeldoutSet:
    """Held-out documents cut into rows of at most `window` targets, ready to be read.

    inputs, targets [rows, window]; document [rows]: the document that a row belongs to. Positions
    past a document's end carry IGNORED_LABEL; causal attention keeps them from being seen. Of a
    model's logits the first `vocabulary` count, all where it is None: the others pad its table.
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
    rows = [row for of_document in pieces for row in of_document]
    inputs = torch.zeros(len(rows), window, dtype=torch.int64)
    targets = torch.full_like(inputs, IGNORED_LABEL)
    for index, row in enumerate(rows):
        inputs[index, : len(row) - 1] = torch.from_numpy(row[:-1])
        targets[index, : len(row) - 1] = torch.from_numpy(row[1:])
    return HeldoutSet(
        inputs,
        targets,
        torch.arange(len(documents)).repeat_interleave(torch.tensor([len(p) for p in pieces])),
        [len(tokens) - 1 for tokens, _ in documents],
        [num_bytes for _, num_bytes in documents],
        vocabulary,
    )


@torch.no_grad()
def evaluate_heldout(parts: Parts, heldout: HeldoutSet, ranks: Ranks = ALONE) -> HeldoutLoss:
    """Held-out loss by document, of what `heldout_set` made: every token is predicted once, from
    the tokens before it in its row.

    Several ranks share the rows; all of them learn the result.
    """
    sums = torch.zeros(len(heldout.document_tokens), dtype=torch.float64)
    for rows, source, targets in _read(parts, heldout, ranks):
        losses = token_losses(source, targets.reshape(-1)).reshape(targets.shape)
        sums.index_add_(0, heldout.document[rows], losses.double().sum(1).cpu())
    return HeldoutLoss(ranks.total(sums).tolist(), heldout.document_tokens, heldout.document_bytes)


@torch.no_grad()
def measure_model(
    parts: Parts,
    heldout: HeldoutSet,
    *,
    changed_documents: int = 0,
    on_batch: Callable[[int, int], None] = lambda done, rows: None,
) -> Measured:
    """Loss, entropy and calibration, every token predicted once. `on_batch` gets the rows that are
    done and how many there are. FloatingPointError where a loss is not finite."""
    began = time.monotonic()
    losses, entropies = torch.zeros(2, len(heldout.document_tokens), dtype=torch.float64)
    confidence, correct = [], []
    done, ranks = 0, 0
    for rows, source, targets in _read(parts, heldout):
        counted = targets != IGNORED_LABEL
        source = replace(source, hidden=source.hidden[counted.reshape(-1)])
        batch = token_statistics(source, targets[counted])
        owners = heldout.document[rows].repeat_interleave(counted.sum(1).cpu())
        losses.index_add_(0, owners, batch.losses.double().cpu())
        entropies.index_add_(0, owners, batch.entropies.double().cpu())
        confidence.append(batch.confidence.double().cpu())
        correct.append(batch.correct.cpu())
        ranks += int(batch.ranks.clamp(max=MOST_RANK).sum())
        done += len(rows)
        on_batch(done, len(heldout.inputs))
    if not (losses + entropies).isfinite().all():
        raise FloatingPointError("the losses are not finite")
    return Measured(
        losses.tolist(),
        heldout.document_tokens,
        heldout.document_bytes,
        document_entropies=entropies.tolist(),
        calibration_error=calibration_error(torch.cat(confidence), torch.cat(correct)),
        changed_documents=changed_documents,
        seconds=time.monotonic() - began,
        ranks=ranks,
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
        shared = torch.arange(start, start + -(-(end - start) // ranks.world) * ranks.world)
        mine = shared[ranks.rank :: ranks.world]
        rows = order[mine.clamp_max(len(order) - 1)]
        targets = heldout.targets[rows, :width]
        targets[mine >= end] = IGNORED_LABEL
        inputs = heldout.inputs[rows, :width].to(device)
        yield rows, HeadInput.of(parts, inputs, heldout.vocabulary), targets.to(device)
        start = end
    release(parts)
    parts.train(was_training)


class TokenStatistics(NamedTuple):
    """By token [tokens]: its loss and the entropy of its prediction in nats, the probability of the
    likeliest token, whether that came, and the rank of the one that came, from 1."""

    losses: Tensor
    entropies: Tensor
    confidence: Tensor
    correct: Tensor
    ranks: Tensor


@torch.no_grad()
def token_statistics(
    source: HeadInput, targets: Tensor, *, chunk_tokens: int | None = None
) -> TokenStatistics:
    """targets [tokens], none ignored; logits exist for a chunk of tokens at a time."""
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
