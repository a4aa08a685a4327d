"""The loss alone: hidden states and heads of both models to the loss and its gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from peers.cases import Case


@dataclass(frozen=True)
class LossInput:
    """hidden [tokens, width], weight [vocabulary, width] of each model; targets [tokens].

    The student's are fp32 and want gradients; the teacher's are of the teacher's dtype.
    """

    case: Case
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    targets: Tensor

    @classmethod
    def random(cls, case: Case) -> "LossInput":
        """Of states of unit size and heads as a new model has them."""
        generator = torch.Generator(case.device).manual_seed(0)

        def draw(rows: int, width: int, scale: float, dtype: torch.dtype) -> Tensor:
            size = (rows, width)
            values = torch.randn(size, generator=generator, device=case.device, dtype=dtype)
            return values.mul_(scale)

        low = torch.bfloat16 if case.precision == "bf16" else torch.float32
        tensors = []
        for shape, dtype in ((case.student, torch.float32), (case.teacher, low)):
            tensors.append(draw(case.tokens, shape.hidden, 1.0, dtype))
            tensors.append(draw(shape.vocabulary, shape.hidden, 0.8 / shape.hidden**0.5, dtype))
        for tensor in tensors[:2]:
            tensor.requires_grad_()
        targets = torch.randint(
            case.student.vocabulary, (case.tokens,), generator=generator, device=case.device
        )
        return cls(case, *tensors, targets)


LossEngine = Callable[[LossInput], Tensor]


def ours(source: LossInput, *, compiled: bool = False) -> Tensor:
    dtype = torch.bfloat16 if source.case.precision == "bf16" else None
    result = column_loss(
        [HeadInput(source.hidden, source.weight, dtype=dtype)],
        source.targets,
        alphas=[source.case.alpha],
        teacher=HeadInput(source.teacher_hidden, source.teacher_weight),
        compiled=compiled,
    )
    return result.students[0].loss / source.case.tokens


def plain(source: LossInput) -> Tensor:
    with autocast(source.case):
        logits = nn.functional.linear(source.hidden, source.weight)
    with torch.no_grad():
        teacher_logits = nn.functional.linear(source.teacher_hidden, source.teacher_weight)
    return full_loss(logits, teacher_logits, source.targets, source.case)


def liger(source: LossInput) -> Tensor:
    with autocast(source.case):
        return liger_loss(source.case)(
            source.hidden,
            source.weight,
            source.teacher_hidden,
            source.teacher_weight,
            source.targets,
        )


def trl(source: LossInput) -> Tensor:
    """The function that DistillationTrainer calls; the forward KL is its beta 0."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    with autocast(source.case):
        losses, _ = ChunkedDivergenceFunction.apply(
            source.hidden,
            source.weight,
            None,
            source.teacher_hidden,
            source.teacher_weight,
            None,
            0.0,
        )
    return losses.mean()


LOSSES: dict[str, LossEngine] = {
    "ours": ours,
    "compiled": partial(ours, compiled=True),
    "plain": plain,
    "liger": liger,
    "trl": trl,
}


def autocast(case: Case) -> torch.autocast:
    """bf16 for a student of that precision."""
    return torch.autocast(case.device, torch.bfloat16, enabled=case.precision == "bf16")


def full_loss(logits: Tensor, teacher_logits: Tensor, targets: Tensor, case: Case) -> Tensor:
    """Mean over tokens; logits [tokens, vocabulary] of any dtype, the loss in fp32."""
    log_student = functional.log_softmax(logits.float(), -1)
    log_teacher = functional.log_softmax(teacher_logits.float(), -1)
    loss = functional.kl_div(log_student, log_teacher, log_target=True, reduction="batchmean")
    if case.alpha == 1.0:
        return loss
    return case.alpha * loss + (1 - case.alpha) * functional.nll_loss(log_student, targets)


def liger_loss(case: Case) -> nn.Module:
    """Compiled on a GPU, which is Liger's default; not on a CPU, where that is slower."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    return LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - case.alpha,
        weight_soft_loss=case.alpha,
        beta=0.0,
        compiled=case.device == "cuda",
    )
