"""The distillation loss of every student of a column, chunked along tokens.

For each student: (1 - alpha) CE(labels) + alpha * temperature^2 * D(teacher, student), the soft
term at the given temperature (Hinton et al., arXiv 1503.02531), with D the forward KL or another
divergence. Losses are sums over tokens: who calls divides once by the valid tokens of the whole
global batch, so the result does not depend on how the batch was split. The gradient is taken while
a chunk's logits are at hand, so nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capgap.distill.chunking import block_rows, chunk_rows
from capgap.distill.divergences import Divergence
from capgap.distill.head import (
    IGNORED_LABEL,
    HeadInput,
    ReadyHead,
    chunks,
    likeliest,
    softmax_,
)
from capgap.distill.sparse import SoftTerm, SparseSignal, sparse_term

FORWARD_KL = Divergence()


@dataclass(frozen=True)
class StudentLoss:
    """Sums over valid tokens. `loss` carries the gradient; the others are detached scalars.

    divergence, kl and agreement are None where no teacher takes part; nats, labels at temperature
    1, divergence and kl at the loss's temperature without its square. `kl` is KL(teacher ||
    student) whatever the divergence of the loss is, so that runs can be compared.
    """

    loss: Tensor
    ce: Tensor
    divergence: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None


@dataclass(frozen=True)
class TeacherStatistics:
    """Sums over valid tokens at temperature 1, in nats."""

    ce: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class ColumnLoss:
    """One entry a student, in the order given, and the teacher's own statistics."""

    students: list[StudentLoss]
    teacher: TeacherStatistics | None
    tokens: Tensor


def column_loss(
    students: Sequence[HeadInput],
    targets: Tensor,
    *,
    alphas: Sequence[float],
    teacher: HeadInput | SparseSignal | None = None,
    temperature: float = 1.0,
    divergence: Divergence = FORWARD_KL,
    chunk_tokens: int | None = None,
) -> ColumnLoss:
    """Losses of all students of one teacher, whose logits are computed once a chunk.

    targets [tokens], IGNORED_LABEL where a position does not count. A student with alpha 0 costs
    no soft term; alpha above 0 needs a teacher. A SparseSignal stands for a teacher whose logits
    were not kept: it holds for one temperature, drawn words for the forward KL alone.

    Raises ValueError where alphas, heads or the signal do not fit together.
    """
    if len(alphas) != len(students):
        raise ValueError(f"{len(students)} students but {len(alphas)} alphas")
    if teacher is None and any(alpha > 0 for alpha in alphas):
        raise ValueError("alpha above 0 needs a teacher")
    words = {student.weight.shape[0] for student in students}
    if isinstance(teacher, SparseSignal):
        words.add(teacher.vocabulary)
        _check_signal(teacher, temperature, divergence)
    elif teacher is not None:
        words.add(teacher.weight.shape[0])
    if len(words) > 1:
        raise ValueError(f"heads of {sorted(words)} words: cut all to the vocabulary they share")
    (vocabulary,) = words
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(targets.device.type, vocabulary)
    settings = [(student.logit_scale, student.softcap, student.dtype) for student in students]
    work = _Work(targets, list(alphas), settings, teacher, temperature, divergence, chunk_tokens)
    tensors: list[Tensor | None] = []
    for student in students:
        tensors += [student.hidden, student.weight, student.bias]
    losses, sums, teacher_sums = _ColumnLoss.apply(work, *tensors)
    results = []
    for index, alpha in enumerate(alphas):
        soft = teacher is not None and alpha > 0
        knows_best = not isinstance(teacher, SparseSignal) or teacher.knows_best
        results.append(
            StudentLoss(
                loss=losses[index],
                ce=sums[index, 0],
                divergence=sums[index, 1] if soft else None,
                kl=sums[index, 2] if soft else None,
                agreement=sums[index, 3] if soft and knows_best else None,
            )
        )
    statistics = None if teacher is None else TeacherStatistics(teacher_sums[0], teacher_sums[1])
    return ColumnLoss(results, statistics, (targets != IGNORED_LABEL).sum())


def _check_signal(signal: SparseSignal, temperature: float, divergence: Divergence) -> None:
    if signal.temperature != temperature:
        raise ValueError(
            f"the signal holds for temperature {signal.temperature:g}, not {temperature:g}"
        )
    if signal.tail is None and divergence.name != "forward_kl":
        raise ValueError(f"drawn words estimate the forward KL alone, not {divergence}")


@dataclass(frozen=True)
class _Work:
    targets: Tensor
    alphas: list[float]
    settings: list[tuple[float, float | None, torch.dtype | None]]
    teacher: HeadInput | SparseSignal | None
    temperature: float
    divergence: Divergence
    chunk_tokens: int


class _Memory:
    """What chunks and blocks are computed in, taken once: on a CPU the first touch of fresh memory
    costs more than the arithmetic on it.

    logits, teacher_probabilities, teacher_logs [rows of a chunk, padded]; probabilities [rows of a
    block, padded].
    """

    def __init__(self, work: _Work, student: ReadyHead) -> None:
        device, padded = work.targets.device, len(student.weight)
        rows = min(work.chunk_tokens, len(work.targets))
        self.block = block_rows(device.type, padded, rows)

        def empty(count: int) -> Tensor:
            return torch.empty(count, padded, dtype=student.wide, device=device)

        self.logits, self.probabilities = empty(rows), empty(self.block)
        is_online = isinstance(work.teacher, HeadInput)
        needs_logs = is_online and work.divergence.name != "forward_kl"
        self.teacher_probabilities = empty(rows) if is_online else None
        self.teacher_logs = empty(rows) if needs_logs else None

    def gradient(self, student: ReadyHead, rows: int) -> Tensor:
        """[rows, padded] in the dtype of the student's products, in the memory of the logits.

        Rows of fewer bytes: the gradient of a block ends where its logits ended, or before.
        """
        count = rows * self.logits.shape[1]
        return self.logits.view(-1).view(student.weight.dtype)[:count].view(rows, -1)


@dataclass(frozen=True)
class _TeacherChunk:
    """The teacher's side of a chunk, shared by all students of the column.

    probabilities [rows, vocabulary] at the loss's temperature, 0 in rows that do not count; logs,
    their logarithms, where they are needed. [rows, 1]: log_total, as softmax_ gives it; expected,
    of the logits less the largest, by the probabilities; best, the likeliest word.
    """

    probabilities: Tensor
    logs: Tensor | None
    log_total: Tensor
    expected: Tensor
    best: Tensor

    @classmethod
    def of(
        cls,
        work: _Work,
        teacher: ReadyHead,
        memory: _Memory,
        rows: slice,
        labels: Tensor,
        valid: Tensor,
        sums: Tensor,
    ) -> "_TeacherChunk":
        """Adds the teacher's (ce, entropy) to `sums`."""
        assert memory.teacher_probabilities is not None
        count = len(labels)
        chunk = cls(
            memory.teacher_probabilities[:count],
            None if memory.teacher_logs is None else memory.teacher_logs[:count],
            torch.empty_like(valid),
            torch.empty_like(valid),
            torch.empty_like(labels),
        )
        product = teacher.product(rows, memory.logits[:count])
        rows_sums = valid.new_empty(count, 2)
        for block in chunks(count, memory.block):
            logits = teacher.logits_(product[block])
            chunk.rows(block)._fill(work, logits, labels[block], valid[block], rows_sums[block])
        sums.add_((rows_sums * valid).sum(0))
        return chunk

    def rows(self, rows: slice) -> "_TeacherChunk":
        logs = None if self.logs is None else self.logs[rows]
        others = (self.log_total[rows], self.expected[rows], self.best[rows])
        return _TeacherChunk(self.probabilities[rows], logs, *others)

    def _fill(
        self, work: _Work, logits: Tensor, labels: Tensor, valid: Tensor, told: Tensor
    ) -> None:
        """Tells (ce, entropy) of every row [rows, 2]."""
        self.best.copy_(likeliest(logits))
        log_total = softmax_(logits, self.probabilities)
        expected = _expected(self.probabilities, logits)
        torch.cat([log_total - logits.gather(1, labels), log_total - expected], 1, out=told)
        if work.temperature != 1.0:
            log_total = softmax_(logits.div_(work.temperature), self.probabilities)
            expected = _expected(self.probabilities, logits)
        self.log_total.copy_(log_total)
        torch.mul(expected, valid, out=self.expected)
        self.probabilities.mul_(valid)
        if self.logs is not None:
            torch.sub(logits, log_total, out=self.logs)


class _ColumnLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # every product says its own dtype
        with torch.autocast(work.targets.device.type, enabled=False):
            students = [
                HeadInput(hidden, weight, bias, *settings).ready()
                for hidden, weight, bias, settings in zip(
                    tensors[::3], tensors[1::3], tensors[2::3], work.settings, strict=True
                )
                if hidden is not None and weight is not None
            ]
            gradients = None
            if any(ctx.needs_input_grad):
                gradients = [_Gradients(student) for student in students]
            sums, teacher_sums = _chunks(work, students, gradients)
        ctx.gradients = gradients and [one.of_inputs() for one in gradients]
        # no tensor of the alphas: making one on a GPU would wait for the copy
        losses = torch.stack(
            [
                (1 - alpha) * ce + alpha * work.temperature**2 * divergence
                for alpha, (ce, divergence, *_) in zip(work.alphas, sums, strict=True)
            ]
        )
        ctx.mark_non_differentiable(sums, teacher_sums)
        return losses, sums, teacher_sums

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Any, ...]:
        outputs: list[Tensor | None] = [None]
        # let go of here, so that a head's gradient becomes its `.grad` without a copy
        all_gradients, ctx.gradients = ctx.gradients, None
        for scale, gradients in zip(grad_losses, all_gradients, strict=True):
            # in the dtype of the scale: rounded to bf16 it would be off for all tokens alike
            outputs += [
                None
                if gradient is None
                else gradient.mul_(scale)
                if gradient.dtype == scale.dtype
                else (gradient.to(scale.dtype) * scale).to(gradient.dtype)
                for gradient in gradients
            ]
        return tuple(outputs)


class _Gradients:
    """Gradients of one student's loss sum by its hidden states and, in `wide`, by its head."""

    def __init__(self, student: ReadyHead) -> None:
        self.student = student
        self.hidden = torch.empty_like(student.hidden)
        # the first chunk's are written, the others' added: nothing has to be zero before
        self._weight = torch.empty_like(student.weight, dtype=student.wide)
        self._bias = None if student.bias is None else torch.zeros_like(student.bias)
        self._begun = False

    def add(self, rows: slice, gradient: Tensor) -> None:
        """gradient [rows, padded] of the student's product."""
        self.student.multiply(gradient, self.student.weight, self.hidden[rows])
        hidden = self.student.hidden[rows]
        self.student.multiply(gradient.T, hidden, self._weight, add=self._begun)
        if self._bias is not None:
            self._bias.add_(gradient.sum(0, dtype=self._bias.dtype))
        self._begun = True

    def of_inputs(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """By hidden states, weight and bias; rows that only fill up the head are left out."""
        words = self.student.vocabulary
        bias = None if self._bias is None else self._bias[:words]
        return self.hidden, self._weight[:words], bias


def _chunks(
    work: _Work, students: Sequence[ReadyHead], gradients: Sequence[_Gradients] | None
) -> tuple[Tensor, Tensor]:
    """All chunks of tokens, one after another; fills `gradients`.

    Returns (ce, divergence, kl, agreement) of every student [students, 4], and the teacher's
    (ce, entropy) [2].
    """
    device, wide = work.targets.device, students[0].wide
    sums = torch.zeros(len(students), 4, device=device, dtype=wide)
    teacher_sums = torch.zeros(2, device=device, dtype=wide)
    source = work.teacher
    head = source.ready() if isinstance(source, HeadInput) else None
    kept = source.to(wide) if isinstance(source, SparseSignal) else None
    memory = _Memory(work, students[0])
    for rows in chunks(len(work.targets), work.chunk_tokens):
        valid = (work.targets[rows] != IGNORED_LABEL).to(wide).unsqueeze(1)
        labels = work.targets[rows].clamp_min(0).unsqueeze(1)
        teacher: _TeacherChunk | SparseSignal | None = None
        if kept is not None:
            teacher = kept.rows(rows)
            teacher_sums[0] += (teacher.label_loss * valid).sum()
            teacher_sums[1] += (teacher.entropy * valid).sum()
        elif head is not None:
            teacher = _TeacherChunk.of(work, head, memory, rows, labels, valid, teacher_sums)
        for index, (student, alpha) in enumerate(zip(students, work.alphas, strict=True)):
            product = student.product(rows, memory.logits[: len(labels)])
            product_gradient = memory.gradient(student, len(labels))
            rows_sums = valid.new_empty(len(labels), 4)
            soft = teacher if alpha > 0 else None
            for block in chunks(len(labels), memory.block):
                logits = student.logits_(product[block])
                slope = student.slope(logits)
                gradient = _logit_gradient(
                    work,
                    logits,
                    memory.probabilities[: len(logits)],
                    labels[block],
                    valid[block],
                    alpha,
                    None if soft is None else soft.rows(block),
                    rows_sums[block],
                )
                if not isinstance(slope, float) or slope != 1.0:
                    gradient.mul_(slope)
                product_gradient[block].copy_(gradient)
            sums[index].add_((rows_sums * valid).sum(0))
            if gradients is not None:
                gradients[index].add(rows, product_gradient)
    return sums, teacher_sums


def _logit_gradient(
    work: _Work,
    logits: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    teacher: _TeacherChunk | SparseSignal | None,
    told: Tensor,
) -> Tensor:
    """d loss / d logits of a block [rows, padded], in the place of `probabilities`.

    Overwrites `logits`; tells (ce, divergence, kl, agreement) of every row [rows, 4].
    """
    log_total = softmax_(logits, probabilities)
    ce = log_total - logits.gather(1, labels)
    if teacher is None:
        probabilities.mul_(valid)
        torch.cat([ce, torch.zeros_like(told[:, 1:])], 1, out=told)
    else:
        best = teacher.best if isinstance(teacher, _TeacherChunk) else teacher.words[:, :1]
        # the largest logit is 0 now
        agrees = (logits.gather(1, best) == 0).to(ce.dtype)
        term = _add_soft_gradient(work, logits, probabilities, log_total, valid, alpha, teacher)
        torch.cat([ce, term.value, term.kl, agrees], 1, out=told)
    return probabilities.scatter_add_(1, labels, valid * (alpha - 1.0))


def _add_soft_gradient(
    work: _Work,
    logits: Tensor,
    probabilities: Tensor,
    log_total: Tensor,
    valid: Tensor,
    alpha: float,
    teacher: _TeacherChunk | SparseSignal,
) -> SoftTerm:
    """The student's `probabilities` become (1 - alpha) of them and alpha d soft term / d logits in
    rows that count, 0 in others."""
    weight, soft_probabilities = alpha, probabilities
    if work.temperature != 1.0:
        weight, soft_probabilities = alpha * work.temperature, torch.empty_like(probabilities)
        log_total = softmax_(logits.div_(work.temperature), soft_probabilities)
    term = (
        sparse_term(logits, soft_probabilities, log_total, teacher, work.divergence)
        if isinstance(teacher, SparseSignal)
        else _dense_term(work, logits, log_total, teacher)
    )
    if soft_probabilities is probabilities:
        probabilities.mul_(valid * (1 - alpha + alpha * term.scale))
    else:
        probabilities.mul_(valid * (1 - alpha))
        probabilities.add_(soft_probabilities.mul_(valid * term.scale), alpha=weight)
    if term.change is None:
        assert isinstance(teacher, _TeacherChunk)
        # 0 already where nothing counts
        probabilities.sub_(teacher.probabilities, alpha=weight)
    elif isinstance(teacher, SparseSignal):
        probabilities.scatter_add_(1, teacher.words, valid * weight * term.change)
    else:
        probabilities.add_(term.change.mul_(valid), alpha=weight)
    return term


def _dense_term(work: _Work, logits: Tensor, log_total: Tensor, teacher: _TeacherChunk) -> SoftTerm:
    """The soft term of a block from all of the teacher's words; logits as softmax_ leaves them.

    Both sides of the KL are summed in the same way, so that it is 0 where logits are equal.
    """
    expected = _expected(teacher.probabilities, logits)
    kl = (teacher.expected - expected) + (log_total - teacher.log_total)
    if teacher.logs is None:
        return SoftTerm(kl, kl, 1.0, None)
    value, slope = work.divergence.value_and_gradient(teacher.logs, logits.sub_(log_total))
    return SoftTerm(value, kl, 0.0, slope)


def _expected(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum of probabilities x values a row, [rows, 1]."""
    return torch.linalg.vecdot(probabilities, values).unsqueeze(1)
