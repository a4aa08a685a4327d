"""The loss of distillation for training loops of others: transformers' Trainer, TRL, Lightning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.distill import DivergenceName
from capgap.distill.cache import CacheFormat
from capgap.distill.divergences import Divergence, SparseSignal
from capgap.distill.head import IGNORED_LABEL, HeadInput
from capgap.distill.losses import column_loss
from capgap.models.parts import Parts


def distillation_loss(
    hidden: Tensor,
    head: nn.Linear | Tensor,
    labels: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Linear | Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    divergence_mix: float = 0.5,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """(1 - alpha) CE(labels) + alpha temperature^2 D(teacher, student) (arXiv 1503.02531) from
    hidden states and heads, in nats a token; logits [tokens, vocabulary] are never whole.

    hidden, teacher_hidden [batch, seq, width]: the states after the last norm, each model with its
    own width; heads: an nn.Linear, or its weight [vocabulary, width]; labels [batch, seq]: the
    token *after* each position, -100 where none counts. The sum is divided by num_items, or by the
    labels that count. ValueError: alpha above 0 without a teacher, other vocabularies.
    """
    teacher = None
    if teacher_hidden is not None and teacher_head is not None:
        teacher = _head_input(teacher_hidden.detach(), teacher_head)
    student = _head_input(hidden, head)
    how = Divergence(divergence, divergence_mix)
    return _mean(student, labels, teacher, alpha, temperature, how, num_items)


class TeacherColumn:
    """A teacher's signal as a column of a dataset, kept once for all students and epochs:
    `dataset.map(TeacherColumn(teacher), batched=True, batch_size=8)` adds `teacher`, the `top_k`
    likeliest words of every position and the rest as one, 2 to 3 bytes and a half float a word.

    It reads `input_ids`, all of one length.
    """

    def __init__(
        self, teacher: PreTrainedModel, *, top_k: int = 64, temperature: float = 1.0
    ) -> None:
        self.parts = Parts(teacher).eval()
        vocabulary = len(self.parts.head.weight)
        self.format = CacheFormat(
            vocabulary=vocabulary,
            top_k=min(top_k, vocabulary - 1),
            samples=0,
            temperature=temperature,
        )

    @torch.no_grad()
    def __call__(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """rows["input_ids"] [batch, seq] to {"teacher": uint8 [batch, seq, bytes of a token]}."""
        ids = torch.as_tensor(rows["input_ids"], device=self.parts.head.weight.device)
        targets = _shifted(ids).clamp_min(0).reshape(-1)
        source = HeadInput.of(self.parts, ids)
        records = self.format.encode(source, targets, torch.zeros(len(targets), device=ids.device))
        return {"teacher": records.reshape(*ids.shape, -1).numpy()}


class DistillationLoss(nn.Module):
    """The loss of a student, as `distillation_loss`, from the tokens of a batch.

    teacher: a model, which is frozen and runs beside the student, or a TeacherColumn, whose column
    `teacher` comes with the batch. UserError for a model whose logits are not those of its parts.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | TeacherColumn,
        *,
        alpha: float = 0.5,
        temperature: float = 1.0,
        divergence: DivergenceName = "forward_kl",
        divergence_mix: float = 0.5,
    ) -> None:
        super().__init__()
        self.student = Parts(student)
        self.alpha, self.temperature = alpha, temperature
        self.divergence = Divergence(divergence, divergence_mix)
        self.column = teacher if isinstance(teacher, TeacherColumn) else None
        # in a list: a frozen teacher is no part of what is trained and saved
        self._teacher: list[Parts] = []
        if not isinstance(teacher, TeacherColumn):
            self._teacher = [Parts(teacher).eval().requires_grad_(False)]
        heads = [self.student.head, *(one.head for one in self._teacher)]
        self.vocabulary = min(len(head.weight) for head in heads)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        teacher: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> Tensor:
        """input_ids [batch, seq]; labels [batch, seq] as transformers has them, each token's own,
        -100 where it does not count; the tokens themselves if none. teacher: of a TeacherColumn.

        ValueError for padding on the left, which would move the positions.
        """
        labels = input_ids if labels is None else labels
        if attention_mask is not None:
            if bool((attention_mask.diff(dim=1) > 0).any()):
                raise ValueError("padding on the left: set tokenizer.padding_side = 'right'")
            labels = labels.masked_fill(attention_mask == 0, IGNORED_LABEL)
        student = HeadInput.of(self.student, input_ids, self.vocabulary)
        signal: HeadInput | SparseSignal
        if self.column is not None:
            if teacher is None:
                raise ValueError(
                    "the batch lacks the column 'teacher': remove_unused_columns=False"
                )
            signal = self.column.format.decode(teacher.to(input_ids.device, torch.uint8))
        else:
            (parts,) = self._teacher
            with torch.no_grad():
                source = HeadInput.of(
                    parts, input_ids.to(parts.head.weight.device), self.vocabulary
                )
            signal = source.to(input_ids.device)
        how = (self.alpha, self.temperature, self.divergence, num_items)
        return _mean(student, _shifted(labels), signal, *how)


def _mean(
    student: HeadInput,
    targets: Tensor,
    teacher: HeadInput | SparseSignal | None,
    alpha: float,
    temperature: float,
    divergence: Divergence,
    num_items: Tensor | int | None,
) -> Tensor:
    found = column_loss(
        [student],
        targets.reshape(-1),
        alphas=[alpha],
        teacher=teacher,
        temperature=temperature,
        divergence=divergence,
    )
    return found.students[0].loss / (found.tokens if num_items is None else num_items)


def _head_input(hidden: Tensor, head: nn.Linear | Tensor) -> HeadInput:
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(head, Tensor):
        return HeadInput(hidden, head)
    return HeadInput(hidden, head.weight, head.bias)


def _shifted(labels: Tensor) -> Tensor:
    """The label of every position is the token after it [batch, seq]."""
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
