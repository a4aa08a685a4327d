"""The distillation loss of every student of a column, chunked along tokens.

For each student: (1 - alpha) CE(labels) + alpha * temperature^2 * D(teacher, student), the soft
term at the given temperature (Hinton et al., arXiv 1503.02531), with D the forward KL or another
divergence. Losses are sums over tokens, to be divided once by the valid tokens of the whole global
batch, so the result does not depend on how the batch was split. The gradient is taken while a
chunk's logits are at hand, so nothing is computed twice.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capgap.distill import block_rows, chunk_rows
from capgap.distill.divergences import Divergence, SoftTerm, SparseSignal, expectation, sparse_term
from capgap.distill.head import (
    IGNORED_LABEL,
    HeadInput,
    ReadyHead,
    chunks,
    each_tensor,
    likeliest,
    softmax_,
)

FORWARD_KL = Divergence()
# Of a compiled loss in one process, at the most
VERSIONS = 64


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
    compiled: bool = False,
) -> ColumnLoss:
    """Losses of all students of one teacher, whose logits are computed once a chunk: of each the
    sum over tokens of (1 - alpha) CE + alpha temperature^2 D, with D the `divergence`, to be
    divided once, by the tokens of the whole batch.

    targets [tokens], IGNORED_LABEL where a position does not count. A student with alpha 0 costs
    no soft term; alpha above 0 needs a teacher. A SparseSignal stands for a teacher whose logits
    were not kept: it holds for one temperature, drawn words for the forward KL alone. compiled:
    what lies between the products of a chunk goes through torch.compile.

    Raises ValueError where alphas, heads or the signal do not fit together.
    """
    if len(alphas) != len(students):
        raise ValueError(f"{len(students)} students but {len(alphas)} alphas")
    if teacher is None and any(alpha > 0 for alpha in alphas):
        raise ValueError("alpha above 0 needs a teacher")
    words = {student.weight.shape[0] for student in students}
    if isinstance(teacher, SparseSignal):
        words.add(teacher.vocabulary)
        if teacher.temperature != temperature:
            raise ValueError(
                f"the signal holds for temperature {teacher.temperature:g}, not {temperature:g}"
            )
        if teacher.tail is None and divergence.name != "forward_kl":
            raise ValueError(f"drawn words estimate the forward KL alone, not {divergence}")
    elif teacher is not None:
        words.add(teacher.weight.shape[0])
    if len(words) > 1:
        raise ValueError(f"heads of {sorted(words)} words: cut all to the vocabulary they share")
    (vocabulary,) = words
    chunk_tokens = chunk_tokens or chunk_rows(targets.device.type, vocabulary)
    work = _Pass(
        students, targets, alphas, teacher, temperature, divergence, chunk_tokens, compiled
    )
    tensors = [tensor for one in students for tensor in (one.hidden, one.weight, one.bias)]
    losses, sums, teacher_sums = _ColumnLoss.apply(work, *tensors)
    knows_best = not isinstance(teacher, SparseSignal) or teacher.knows_best
    results = []
    for alpha, loss, (ce, value, kl, agreement) in zip(alphas, losses, sums, strict=True):
        is_soft = teacher is not None and alpha > 0
        soft = (value, kl, agreement if knows_best else None) if is_soft else (None, None, None)
        results.append(StudentLoss(loss, ce, *soft))
    statistics = None if teacher is None else TeacherStatistics(*teacher_sums)
    return ColumnLoss(results, statistics, (targets != IGNORED_LABEL).sum())


class _ColumnLoss(torch.autograd.Function):
    """Gradients are computed in the forward pass and only scaled in the backward pass.

    `tensors` are those of the students' heads (hidden, weight, bias), by which they are taken.
    """

    @staticmethod
    def forward(ctx: Any, work: "_Pass", *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        # every product says its own dtype
        with torch.autocast(work.targets.device.type, enabled=False):
            gradients = work.run(learns=any(ctx.needs_input_grad))
        ctx.gradients = gradients and [one.of_inputs() for one in gradients]
        # no tensor of the alphas: making one on a GPU would wait for the copy
        losses = torch.stack(
            [
                (1 - alpha) * ce + alpha * work.temperature**2 * divergence
                for alpha, (ce, divergence, *_) in zip(work.alphas, work.sums, strict=True)
            ]
        )
        ctx.mark_non_differentiable(work.sums, work.teacher_sums)
        return losses, work.sums, work.teacher_sums

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

    def rows(self, rows: slice) -> "_TeacherChunk":
        return each_tensor(self, operator.itemgetter(rows))


_Soft = _TeacherChunk | SparseSignal


@functools.cache
def _fused(rows: Callable[..., None]) -> Callable[..., None]:
    """By torch.compile, whose kernels serve all students of one vocabulary; a version for every
    number of rows, alpha and kind of teacher."""
    from torch._dynamo import config

    config.recompile_limit += VERSIONS
    config.accumulated_recompile_limit += VERSIONS
    return torch.compile(rows, dynamic=False)


@dataclass
class _Pass:
    """One pass over all tokens, chunk by chunk, with the memory that chunks and blocks are computed
    in. It is taken once: on a CPU the first touch of fresh memory costs more than the arithmetic
    on it.

    sums [students, 4]: (ce, divergence, kl, agreement); teacher_sums [2]: (ce, entropy).
    logits, teacher_probabilities, teacher_logs [rows of a chunk, padded]; probabilities [rows of a
    block, padded].
    """

    students: Sequence[HeadInput]
    targets: Tensor
    alphas: Sequence[float]
    teacher: HeadInput | SparseSignal | None
    temperature: float
    divergence: Divergence
    chunk_tokens: int
    compiled: bool

    def run(self, *, learns: bool) -> list[_Gradients] | None:
        """Fills `sums` and `teacher_sums`; the students' gradients if it `learns`."""
        students = [student.ready() for student in self.students]
        gradients = [_Gradients(student) for student in students] if learns else None
        device, wide = self.targets.device, students[0].wide
        self.sums = torch.zeros(len(students), 4, device=device, dtype=wide)
        self.teacher_sums = torch.zeros(2, device=device, dtype=wide)
        signal = self.teacher.to(wide) if isinstance(self.teacher, SparseSignal) else None
        head = self.teacher.ready() if isinstance(self.teacher, HeadInput) else None
        self._take_memory(students[0])
        student_rows = _fused(_Pass._student_rows) if self.compiled else _Pass._student_rows
        for rows in chunks(len(self.targets), self.chunk_tokens):
            valid = (self.targets[rows] != IGNORED_LABEL).to(wide).unsqueeze(1)
            labels = self.targets[rows].clamp_min(0).unsqueeze(1)
            teacher: _Soft | None = None
            if signal is not None:
                teacher = signal.rows(rows)
                self.teacher_sums[0] += (teacher.label_loss * valid).sum()
                self.teacher_sums[1] += (teacher.entropy * valid).sum()
            elif head is not None:
                teacher = self._teacher_chunk(head, rows, labels, valid)
            for index, (student, alpha) in enumerate(zip(students, self.alphas, strict=True)):
                soft = teacher if alpha > 0 else None
                product = student.product(rows, self.logits[: len(labels)])
                # rows of fewer bytes than logits: the gradient of a block ends where its logits
                # ended, or before; kernels of their own order write elsewhere
                memory = self.probabilities if self.compiled else self.logits
                memory = memory.view(-1).view(student.weight.dtype)[: product.numel()]
                product_gradient = memory.view(product.shape)
                row_sums = valid.new_empty(len(labels), 4)
                for block in chunks(len(labels), self.block):
                    student_rows(
                        self,
                        student,
                        product[block],
                        labels[block],
                        valid[block],
                        alpha,
                        None if soft is None else soft.rows(block),
                        row_sums[block],
                        product_gradient[block],
                    )
                self.sums[index].add_((row_sums * valid).sum(0))
                if gradients is not None:
                    gradients[index].add(rows, product_gradient)
        return gradients

    def _take_memory(self, student: ReadyHead) -> None:
        device, padded = self.targets.device, len(student.weight)
        rows = min(self.chunk_tokens, len(self.targets))
        self.block = rows if self.compiled else block_rows(device.type, padded, rows)

        def empty(count: int) -> Tensor:
            return torch.empty(count, padded, dtype=student.wide, device=device)

        self.logits, self.probabilities = empty(rows), empty(self.block)
        is_online = isinstance(self.teacher, HeadInput)
        needs_logs = is_online and self.divergence.name != "forward_kl"
        self.teacher_probabilities = empty(rows) if is_online else None
        self.teacher_logs = empty(rows) if needs_logs else None

    def _teacher_chunk(
        self, teacher: ReadyHead, rows: slice, labels: Tensor, valid: Tensor
    ) -> _TeacherChunk:
        """Adds the teacher's (ce, entropy) to `teacher_sums`."""
        assert self.teacher_probabilities is not None
        count = len(labels)
        probabilities = self.teacher_probabilities[:count]
        logs = None if self.teacher_logs is None else self.teacher_logs[:count]
        log_total, expected = torch.empty_like(valid), torch.empty_like(valid)
        whole = _TeacherChunk(probabilities, logs, log_total, expected, torch.empty_like(labels))
        product = teacher.product(rows, self.logits[:count])
        row_sums = valid.new_empty(count, 2)
        teacher_rows = _fused(_Pass._teacher_rows) if self.compiled else _Pass._teacher_rows
        for block in chunks(count, self.block):
            part = whole.rows(block)
            teacher_rows(
                self, teacher, product[block], labels[block], valid[block], row_sums[block], part
            )
        self.teacher_sums.add_((row_sums * valid).sum(0))
        return whole

    def _teacher_rows(
        self,
        teacher: ReadyHead,
        product: Tensor,
        labels: Tensor,
        valid: Tensor,
        row_sums: Tensor,
        chunk: _TeacherChunk,
    ) -> None:
        """Fills `chunk`, and `row_sums` [rows, 2] with (ce, entropy), of a block's product."""
        logits = teacher.logits_(product)
        chunk.best.copy_(likeliest(logits))
        total = softmax_(logits, chunk.probabilities)
        mean = expectation(chunk.probabilities, logits)
        row_sums.copy_(torch.cat([total - logits.gather(1, labels), total - mean], 1))
        if self.temperature != 1.0:
            total = softmax_(logits.div_(self.temperature), chunk.probabilities)
            mean = expectation(chunk.probabilities, logits)
        chunk.log_total.copy_(total)
        chunk.expected.copy_(mean * valid)
        chunk.probabilities.mul_(valid)
        if chunk.logs is not None:
            torch.sub(logits, total, out=chunk.logs)

    def _student_rows(
        self,
        student: ReadyHead,
        product: Tensor,
        labels: Tensor,
        valid: Tensor,
        alpha: float,
        teacher: _Soft | None,
        row_sums: Tensor,
        gradient: Tensor,
    ) -> None:
        """Fills `gradient` [rows, padded], d loss / d product of a block, and `row_sums` [rows, 4]
        with (ce, divergence, kl, agreement)."""
        logits = student.logits_(product)
        slope = student.slope(logits)
        found = self._logit_gradient(logits, labels, valid, alpha, teacher, row_sums)
        if not isinstance(slope, float) or slope != 1.0:
            found.mul_(slope)
        gradient.copy_(found)

    def _logit_gradient(
        self,
        logits: Tensor,
        labels: Tensor,
        valid: Tensor,
        alpha: float,
        teacher: _Soft | None,
        row_sums: Tensor,
    ) -> Tensor:
        """d loss / d logits, in the memory of `probabilities`; overwrites `logits`."""
        fused = torch.compiler.is_compiling()
        probabilities = torch.empty_like(logits) if fused else self.probabilities[: len(logits)]
        log_total = softmax_(logits, probabilities)
        ce = log_total - logits.gather(1, labels)
        if teacher is None:
            probabilities.mul_(valid)
            row_sums.copy_(torch.cat([ce, torch.zeros_like(row_sums[:, 1:])], 1))
        else:
            best = teacher.best if isinstance(teacher, _TeacherChunk) else teacher.words[:, :1]
            # the largest logit is 0 now
            agrees = (logits.gather(1, best) == 0).to(ce.dtype)
            term = self._add_soft_gradient(logits, probabilities, log_total, valid, alpha, teacher)
            row_sums.copy_(torch.cat([ce, term.value, term.kl, agrees], 1))
        at_label = valid * (alpha - 1.0)
        if fused:
            # within the kernel that writes all words
            is_label = torch.arange(logits.shape[1], device=logits.device) == labels
            return probabilities.add_(torch.where(is_label, at_label, 0.0))
        return probabilities.scatter_add_(1, labels, at_label)

    def _add_soft_gradient(
        self,
        logits: Tensor,
        probabilities: Tensor,
        log_total: Tensor,
        valid: Tensor,
        alpha: float,
        teacher: _Soft,
    ) -> SoftTerm:
        """The student's `probabilities` become (1 - alpha) of them and alpha d soft term / d logits
        in rows that count, 0 in others."""
        weight, soft_probabilities = alpha, probabilities
        if self.temperature != 1.0:
            weight, soft_probabilities = alpha * self.temperature, torch.empty_like(probabilities)
            log_total = softmax_(logits.div_(self.temperature), soft_probabilities)
        if isinstance(teacher, SparseSignal):
            term = sparse_term(logits, soft_probabilities, log_total, teacher, self.divergence)
        else:
            term = self._dense_term(logits, log_total, teacher)
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

    def _dense_term(self, logits: Tensor, log_total: Tensor, teacher: _TeacherChunk) -> SoftTerm:
        """The soft term of a block from all of the teacher's words; logits as softmax_ leaves them.

        Both sides of the KL are summed in the same way, so that it is 0 where logits are equal.
        """
        expected = expectation(teacher.probabilities, logits)
        kl = (teacher.expected - expected) + (log_total - teacher.log_total)
        if teacher.logs is None:
            return SoftTerm(kl, kl, 1.0, None)
        value, slope = self.divergence.value_and_gradient(teacher.logs, logits.sub_(log_total))
        return SoftTerm(value, kl, 0.0, slope)
