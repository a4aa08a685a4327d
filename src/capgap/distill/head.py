"""Hidden states and the head that makes logits of them, chunk by chunk.

[tokens, vocabulary] never exists: who needs logits makes those of a chunk of tokens, and works on
them a block at a time, which stays in a CPU's cache from one operation to the next.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from capgap.distill.chunking import chunk_rows
from capgap.models.build import Parts

IGNORED_LABEL = -100
BEST_BLOCK = 64


@dataclass(frozen=True)
class HeadInput:
    """What a model gives to the loss: hidden states, and the head that makes logits of them.

    hidden [tokens, width]; weight [vocabulary, width]; bias [vocabulary] or None; scale and cap as
    in `capgap.models.build.Parts`; dtype: of the head's product, None for that of `hidden`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        parts: Parts,
        input_ids: Tensor,
        vocabulary: int | None = None,
        positions: Tensor | None = None,
    ) -> "HeadInput":
        """Runs the backbone on input_ids [batch, seq]; tokens = batch x seq.

        Under autocast the head's product is to run in its dtype, wherever it is computed. Only
        the first `vocabulary` words of the head count: the tables of models that share a
        tokenizer are padded to different sizes, with rows that stand for no token.
        """
        hidden = parts(input_ids, positions)
        weight: Tensor = parts.head.weight
        bias: Tensor | None = parts.head.bias
        if vocabulary is not None and vocabulary < weight.shape[0]:
            weight, bias = weight[:vocabulary], None if bias is None else bias[:vocabulary]
        device = input_ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            bias,
            parts.logit_scale,
            parts.softcap,
            dtype,
        )

    def to(self, device: torch.device) -> "HeadInput":
        """On that device; itself where it is there already."""
        bias = None if self.bias is None else self.bias.to(device)
        return replace(
            self, hidden=self.hidden.to(device), weight=self.weight.to(device), bias=bias
        )

    def ready(self) -> "HeadInput":
        """Everything in the dtype of the product; cast once, not for every chunk."""
        dtype = self.dtype or self.hidden.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def product(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """What the head makes of these tokens, [rows, vocabulary] in the inputs' dtype, of a source
        that is `ready`; in fresh memory or in `out`. No gradient goes back."""
        if self.bias is None:
            return torch.mm(self.hidden[rows], self.weight.T, out=out)
        return torch.addmm(self.bias, self.hidden[rows], self.weight.T, out=out)

    def logits(self, product: Tensor, out: Tensor | None = None) -> Tensor:
        """The model's logits of a product, in `wide`: in `out`, or where the product is."""
        logits = product.to(self.wide) if out is None else out.copy_(product)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (head's product), from the logits: the scale, and the slope of the cap."""
        if self.softcap is None:
            return self.logit_scale
        return (1 - (logits / self.softcap).square_()).mul_(self.logit_scale)

    @property
    def wide(self) -> torch.dtype:
        """fp32, or float64 where the model is in float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """0 .. tokens in parts of at most so many rows."""
    for start in range(0, tokens, rows):
        yield slice(start, min(start + rows, tokens))


def softmax_(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Fills `probabilities` [rows, vocabulary]; takes every row's largest logit off `logits`.

    Returns [rows, 1] the logarithm of what the exponentials of those then add up to. torch's own
    softmax takes two thirds of the time of its exponential alone on a CPU; the likeliest word's
    logit is now 0, so its probability tells the sum.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    torch.softmax(logits, -1, out=probabilities)
    return probabilities.amax(-1, keepdim=True).log_().neg_()


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest word of every row, the first of equals, [rows, 1]."""
    rows, vocabulary = logits.shape
    if logits.is_cuda or vocabulary % BEST_BLOCK:
        return logits.argmax(-1, keepdim=True)
    # on a CPU argmax takes far longer than amax: the best block is found first
    blocks = logits.view(rows, -1, BEST_BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BEST_BLOCK)).squeeze(1)
    return block * BEST_BLOCK + inside.argmax(-1, keepdim=True)


@torch.no_grad()
def token_losses(source: HeadInput, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of every token [tokens], 0 where the target is IGNORED_LABEL; no gradient."""
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(targets.device.type, source.weight.shape[0])
    losses = torch.empty(targets.shape[0], device=targets.device, dtype=source.wide)
    source = source.ready()
    for rows in chunks(len(targets), chunk_tokens):
        losses[rows] = nn.functional.cross_entropy(
            source.logits(source.product(rows)),
            targets[rows],
            ignore_index=IGNORED_LABEL,
            reduction="none",
        )
    return losses
