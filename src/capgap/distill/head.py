"""Hidden states and the head that makes logits of them, chunk by chunk.

[tokens, vocabulary] never exists: who needs logits makes those of a chunk of tokens, and works on
them a block at a time, which stays in a CPU's cache from one operation to the next.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from capgap.distill import HEAD_MULTIPLE, chunk_rows, padded_rows
from capgap.models.parts import Parts

IGNORED_LABEL = -100
# The logit of what is no word; times a probability of 0 it is 0, as an infinite one is not
LOWEST = -1e30
T = TypeVar("T")


def each_tensor(record: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with a change made to all of its tensors."""
    tensors = {name: one for name, one in vars(record).items() if isinstance(one, Tensor)}
    changed: Any = {name: change(one) for name, one in tensors.items()}
    return replace(record, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class HeadInput:
    """What a model gives to the loss: hidden states, and the head that makes logits of them.

    hidden [tokens, width]; weight [vocabulary, width]; bias [vocabulary] or None; scale and cap as
    in `capgap.models.parts.Parts`; dtype: what the head's product reads its inputs in, None for
    that of `hidden`.
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
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return cls(hidden, weight, bias, parts.logit_scale, parts.softcap, dtype)

    def to(self, device: torch.device) -> "HeadInput":
        """On that device."""
        return each_tensor(self, lambda tensor: tensor.to(device))

    def ready(self) -> "ReadyHead":
        """Cast and filled up once, not for every chunk.

        A CPU reads everything in fp32: few have units for bf16, and those that do cast while they
        multiply.
        """
        is_cpu = self.hidden.device.type == "cpu"
        wanted = self.dtype or self.hidden.dtype
        dtype = self.wide if is_cpu else wanted
        return ReadyHead(
            self.hidden.to(dtype),
            _filled_up(self.weight, dtype),
            None if self.bias is None else _filled_up(self.bias, self.wide),
            self.logit_scale,
            self.softcap,
            self.weight.shape[0],
            self.wide,
            reads_bf16=is_cpu and wanted == torch.bfloat16,
        )

    @property
    def wide(self) -> torch.dtype:
        """fp32, or float64 where the model is in float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


@dataclass(frozen=True)
class ReadyHead:
    """A head at work: hidden states and weights in the dtype of its products, logits in `wide`.

    hidden [tokens, width]; weight [padded, width] and bias [padded] or None, of which the first
    `vocabulary` rows are words. The other columns of logits are LOWEST, so that they have no part
    in any sum. reads_bf16: a CPU may round what it multiplies to bf16, and sums in fp32.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    vocabulary: int
    wide: torch.dtype
    reads_bf16: bool

    @torch.no_grad()
    def product(self, rows: slice, out: Tensor | None = None) -> Tensor:
        """What the head makes of these tokens, [rows, padded] in `wide`, in `out` where given."""
        hidden = self.hidden[rows]
        if out is None:
            out = hidden.new_empty(len(hidden), len(self.weight), dtype=self.wide)
        self.multiply(hidden, self.weight.T, out)
        return out if self.bias is None else out.add_(self.bias)

    def logits_(self, product: Tensor) -> Tensor:
        """The model's logits of a product, in its place unless it is compiled: then they are not
        written at all."""
        if torch.compiler.is_compiling():
            product = product.clone()
        if self.logit_scale != 1.0:
            product.mul_(self.logit_scale)
        if self.softcap is not None:
            product.div_(self.softcap).tanh_().mul_(self.softcap)
        product[:, self.vocabulary :] = LOWEST
        return product

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (head's product), from the logits: the scale, and the slope of the cap."""
        if self.softcap is None:
            return self.logit_scale
        slope = (1 - (logits / self.softcap).square_()).mul_(self.logit_scale)
        # of LOWEST it would not be finite
        slope[:, self.vocabulary :] = 0.0
        return slope

    def multiply(self, left: Tensor, right: Tensor, out: Tensor, *, add: bool = False) -> None:
        """Fills `out` with left @ right, or adds it; summed in fp32, and rounded to out's dtype."""
        with _cpu_reads_bf16() if self.reads_bf16 else nullcontext():
            if out.dtype == left.dtype:
                torch.addmm(out, left, right, beta=float(add), out=out)
            elif add:
                torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
            else:
                torch.mm(left, right, out_dtype=out.dtype, out=out)


@contextmanager
def _cpu_reads_bf16() -> Iterator[None]:
    """fp32 products of a CPU that has units for bf16 (AVX-512, AMX) read their inputs as bf16."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _filled_up(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """A head's weight or bias in whole tiles; itself where it is so already."""
    count = padded_rows(len(rows))
    if count == len(rows):
        return rows.to(dtype)
    filled = rows.new_zeros(count, *rows.shape[1:], dtype=dtype)
    filled[: len(rows)] = rows
    return filled


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
    if torch.compiler.is_compiling():
        total = logits.exp().sum(-1, keepdim=True).log()
        probabilities.copy_((logits - total).exp())
        return total
    torch.softmax(logits, -1, out=probabilities)
    return probabilities.amax(-1, keepdim=True).log_().neg_()


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest word of every row, the first of equals, [rows, 1]."""
    rows = len(logits)
    if logits.is_cuda:
        return logits.argmax(-1, keepdim=True)
    # on a CPU argmax takes far longer than amax: the best block is found first
    blocks = logits.view(rows, -1, HEAD_MULTIPLE)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, HEAD_MULTIPLE)).squeeze(1)
    return block * HEAD_MULTIPLE + inside.argmax(-1, keepdim=True)


@torch.no_grad()
def token_losses(source: HeadInput, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of every token [tokens], 0 where the target is IGNORED_LABEL; no gradient."""
    chunk_tokens = chunk_tokens or chunk_rows(targets.device.type, source.weight.shape[0])
    losses = torch.empty(targets.shape[0], device=targets.device, dtype=source.wide)
    head = source.ready()
    for rows in chunks(len(targets), chunk_tokens):
        logits = head.logits_(head.product(rows))
        losses[rows] = nn.functional.cross_entropy(
            logits, targets[rows], ignore_index=IGNORED_LABEL, reduction="none"
        )
    return losses
