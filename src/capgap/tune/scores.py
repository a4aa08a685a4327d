"""Held-out conversations and pairs: how likely a model finds the answers."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from capgap.corpus.tokenizer import num_words
from capgap.distill.head import IGNORED_LABEL
from capgap.evaluate.losses import HeldoutLoss, HeldoutSet, evaluate_heldout
from capgap.models.parts import Parts
from capgap.tune.template import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def score_answers(
    model: PreTrainedModel,
    tokenizer: "PreTrainedTokenizerFast",
    examples: Sequence[Example],
    *,
    bf16: bool,
) -> HeldoutLoss:
    """Nats of the assistant's tokens: an example is a document, its bytes are those of the answers'
    text. Under bf16 autocast where training has it too."""
    answers = [tokenizer.decode(one.spoken, skip_special_tokens=True) for one in examples]
    inputs = [torch.tensor(one.ids[:-1]) for one in examples]
    targets = [torch.tensor(one.labels[1:]) for one in examples]
    heldout = HeldoutSet(
        pad_sequence(inputs, batch_first=True),
        pad_sequence(targets, batch_first=True, padding_value=IGNORED_LABEL),
        torch.arange(len(examples)),
        [one.num_counted for one in examples],
        [len(answer.encode()) for answer in answers],
        num_words(tokenizer),
    )
    with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
        return evaluate_heldout(Parts(model), heldout)


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
