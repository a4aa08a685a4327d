"""Held-out conversations and pairs: how likely a model finds the answers."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel

from capgap.corpus.tokenizer import num_words
from capgap.distill.head import IGNORED_LABEL
from capgap.evaluate.heldout import HeldoutLoss, HeldoutSet, evaluate_heldout
from capgap.models.parts import Parts
from capgap.tune.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def answer_set(tokenizer: "PreTrainedTokenizerFast", examples: Sequence[Example]) -> HeldoutSet:
    """The examples as rows of which only the assistant's tokens are scored; a document is one of
    them, its bytes are those of the answers' text."""
    width = max(len(one.ids) for one in examples) - 1
    inputs = np.zeros((len(examples), width), np.int64)
    targets = np.full((len(examples), width), IGNORED_LABEL, np.int64)
    for row, one in enumerate(examples):
        inputs[row, : len(one.ids) - 1] = one.ids[:-1]
        targets[row, : len(one.ids) - 1] = one.labels[1:]
    return HeldoutSet(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.arange(len(examples)),
        [one.num_counted for one in examples],
        [len(_answers(tokenizer, one).encode()) for one in examples],
        num_words(tokenizer),
    )


def score_answers(model: PreTrainedModel, answers: HeldoutSet, *, bf16: bool) -> HeldoutLoss:
    """Nats of every conversation's answers; under bf16 autocast where training has it too."""
    device = model.device.type
    with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
        return evaluate_heldout(Parts(model), answers)


def preference(
    chosen: Sequence[float],
    rejected: Sequence[float],
    *,
    before: tuple[Sequence[float], Sequence[float]],
    beta: float,
) -> dict[str, Any]:
    """What pairs tell, from the negative log-likelihoods of their answers in nats.

    `before`: those of the reference. loss: of DPO (arXiv 2305.18290), the mean of -log sigmoid(beta
    x margin), the margin being by how much more the chosen answer has gained over the reference
    than the rejected one; accuracy: the share of pairs with a margin above 0, None where the
    model is the reference; chosen_likelier: the share whose chosen answer is the likelier text.
    """
    likelier = np.subtract(rejected, chosen)
    margins = likelier - np.subtract(before[1], before[0])
    return {
        "loss": float(np.logaddexp(0, -beta * margins).mean()),
        "accuracy": float((margins > 0).mean()) if margins.any() else None,
        "margin": float(margins.mean()),
        "chosen_likelier": float((likelier > 0).mean()),
        "chosen_nats": list(map(float, chosen)),
        "rejected_nats": list(map(float, rejected)),
    }


def _answers(tokenizer: "PreTrainedTokenizerFast", example: Example) -> str:
    ids = [i for i, counts in zip(example.ids, example.counted, strict=True) if counts]
    return str(tokenizer.decode(ids, skip_special_tokens=True))
