"""The distillation loss of every student of a column, chunked along tokens.

For each student: (1 - alpha) CE(labels) + alpha * temperature^2 * D(teacher, student), the soft
term at the given temperature (Hinton et al., arXiv 1503.02531), with D the forward KL or another
divergence. Losses are sums over tokens: who calls divides once by the valid tokens of the whole
global batch, so the result does not depend on how the batch was split. [tokens, vocabulary] never
exists: logits live for one chunk of tokens, and the gradient is taken while the chunk's logits are
at hand, so nothing is computed twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from capgap.distill.divergences import Divergence
from capgap.distill.sparse import SparseSignal, sparse_term
from capgap.models.build import Parts

IGNORED_LABEL = -100
FORWARD_KL = Divergence()
# Logits of one chunk stay near the processor's cache on a CPU and fill the cores of a GPU.
CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**27}
# Matrix products of fewer rows run at half their speed or less.
LEAST_ROWS = 128
BEST_BLOCK = 64
BLOCK_ELEMENTS = 2**18


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

    @torch.no_grad()
    def logits(self, rows: slice, scratch: "Scratch | None" = None) -> Tensor:
        """Logits [rows, vocabulary] of a source that is `ready`, in fresh memory or in `scratch`.

        No gradient goes back. The product runs in the inputs' dtype, the rest in `wide`.
        """
        hidden = self.hidden[rows]
        scratch = scratch or Scratch()
        product = scratch.take("product" if hidden.dtype != self.wide else "logits", self, rows)
        if self.bias is None:
            torch.mm(hidden, self.weight.T, out=product)
        else:
            torch.addmm(self.bias, hidden, self.weight.T, out=product)
        logits = product
        if hidden.dtype != self.wide:
            logits = scratch.take("logits", self, rows, self.wide).copy_(product)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        return (
            logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)
        )

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logits / d (head's product), from the logits: the scale, and the slope of the cap."""
        if self.softcap is None:
            return self.logit_scale
        return (1 - (logits / self.softcap).square_()).mul_(self.logit_scale)

    @property
    def wide(self) -> torch.dtype:
        """fp32, or float64 where the model is in float64."""
        return torch.promote_types(self.hidden.dtype, torch.float32)


class Scratch:
    """Memory of [rows, vocabulary] that every chunk uses again.

    On a CPU the first touch of fresh memory costs more than the arithmetic on it.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(
        self, name: str, head: HeadInput, rows: slice, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[rows, vocabulary of the head], what it held of the last taking of that name lost."""
        dtype = dtype or head.hidden.dtype
        count, vocabulary = len(head.hidden[rows]), head.weight.shape[0]
        memory = self._memory.get((name, dtype))
        if memory is None or len(memory) < count:
            memory = torch.empty(count, vocabulary, dtype=dtype, device=head.hidden.device)
            self._memory[name, dtype] = memory
        return memory[:count]


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
        chunk_tokens = chunk_rows(targets.device, vocabulary)
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


def chunk_rows(device: torch.device, vocabulary: int) -> int:
    """Tokens whose logits are computed at once: chosen by measurement (docs/benchmarks.md)."""
    elements = CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"])
    return max(LEAST_ROWS, elements // vocabulary)


def token_losses(source: HeadInput, targets: Tensor, *, chunk_tokens: int | None = None) -> Tensor:
    """Cross-entropy of every token [tokens], 0 where the target is IGNORED_LABEL; no gradient."""
    if chunk_tokens is None:
        chunk_tokens = chunk_rows(targets.device, source.weight.shape[0])
    losses = torch.empty(targets.shape[0], device=targets.device, dtype=source.wide)
    with torch.no_grad():
        source = source.ready()
        for start in range(0, targets.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            losses[rows] = nn.functional.cross_entropy(
                source.logits(rows), targets[rows], ignore_index=IGNORED_LABEL, reduction="none"
            )
    return losses


@dataclass(frozen=True)
class _Work:
    targets: Tensor
    alphas: list[float]
    settings: list[tuple[float, float | None, torch.dtype | None]]
    teacher: HeadInput | SparseSignal | None
    temperature: float
    divergence: Divergence
    chunk_tokens: int


@dataclass(frozen=True)
class _TeacherChunk:
    """The teacher's side of a chunk, shared by all students of the column.

    At the loss's temperature, all [rows, 1] but the first two: logits less the largest, and
    probabilities, 0 in rows that do not count.
    """

    shifted: Tensor  # [rows, vocabulary]
    probabilities: Tensor  # [rows, vocabulary]
    log_total: Tensor  # the logarithm of what exp(shifted) adds up to
    expected: Tensor  # of `shifted`, by the probabilities
    best: Tensor  # likeliest word

    @classmethod
    def empty(cls, logits: Tensor, probabilities: Tensor) -> "_TeacherChunk":
        """To be filled, block by block."""
        row = torch.empty(len(logits), 1, dtype=logits.dtype, device=logits.device)
        return cls(logits, probabilities, row, torch.empty_like(row), torch.empty_like(row).long())

    def rows(self, rows: slice) -> "_TeacherChunk":
        return _TeacherChunk(
            self.shifted[rows],
            self.probabilities[rows],
            self.log_total[rows],
            self.expected[rows],
            self.best[rows],
        )

    def fill(self, work: "_Work", labels: Tensor, valid: Tensor, teacher_sums: Tensor) -> None:
        """From logits in the place of `shifted`; adds (ce, entropy) to `teacher_sums`."""
        self.best.copy_(_best(self.shifted))
        shifted = self.shifted.sub_(self.shifted.gather(1, self.best))
        label = shifted.gather(1, labels)
        self._normalise(valid)
        teacher_sums[0] += ((self.log_total - label) * valid).sum()
        teacher_sums[1] += ((self.log_total - self.expected) * valid).sum()
        if work.temperature != 1.0:
            shifted.div_(work.temperature)
            self._normalise(valid)

    def _normalise(self, valid: Tensor) -> None:
        total = self.probabilities.copy_(self.shifted).exp_().sum(-1, keepdim=True)
        self.probabilities.mul_(valid / total)
        torch.log(total, out=self.log_total)
        self.expected.copy_(torch.linalg.vecdot(self.probabilities, self.shifted).unsqueeze(1))


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
                gradients = [_Gradients.zeros(student) for student in students]
            sums, teacher_sums = _chunks(work, students, gradients)
        ctx.gradients = gradients
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
        for index, gradient in enumerate(ctx.gradients):
            scale = grad_losses[index]
            outputs += [
                gradient.hidden.mul_(scale.to(gradient.hidden.dtype)),
                gradient.weight.mul_(scale.to(gradient.weight.dtype)),
                None if gradient.bias is None else gradient.bias.mul_(scale),
            ]
        return tuple(outputs)


def _chunks(
    work: _Work, students: Sequence[HeadInput], gradients: "Sequence[_Gradients] | None"
) -> tuple[Tensor, Tensor]:
    """All chunks of tokens, one after another; fills `gradients`.

    Returns (ce, divergence, kl, agreement) of every student [students, 4], and the teacher's
    (ce, entropy) [2].
    """
    device, wide = work.targets.device, students[0].wide
    sums = torch.zeros(len(students), 4, device=device, dtype=wide)
    teacher_sums = torch.zeros(2, device=device, dtype=wide)
    teacher = work.teacher
    if teacher is not None:
        teacher = teacher.ready() if isinstance(teacher, HeadInput) else teacher.to(wide)
    scratch, teacher_scratch = Scratch(), Scratch()
    for start in range(0, work.targets.shape[0], work.chunk_tokens):
        rows = slice(start, start + work.chunk_tokens)
        valid = (work.targets[rows] != IGNORED_LABEL).to(wide).unsqueeze(1)
        labels = work.targets[rows].clamp_min(0).unsqueeze(1)
        teacher_chunk: _TeacherChunk | SparseSignal | None = None
        if isinstance(teacher, SparseSignal):
            teacher_chunk = teacher.rows(rows)
            teacher_sums[0] += (teacher_chunk.label_loss * valid).sum()
            teacher_sums[1] += (teacher_chunk.entropy * valid).sum()
        elif teacher is not None:
            logits = teacher.logits(rows, teacher_scratch)
            probabilities = teacher_scratch.take("probabilities", teacher, rows, logits.dtype)
            teacher_chunk = _TeacherChunk.empty(logits, probabilities)
            for block in _blocks(logits):
                teacher_chunk.rows(block).fill(work, labels[block], valid[block], teacher_sums)
        for index, student in enumerate(students):
            logits = student.logits(rows, scratch)
            alpha = work.alphas[index]
            soft = teacher_chunk if alpha > 0 else None
            for block in _blocks(logits):
                _student_block(
                    work,
                    student,
                    logits[block],
                    labels[block],
                    valid[block],
                    alpha,
                    None if soft is None else soft.rows(block),
                    sums[index],
                )
            if gradients is not None:
                gradients[index].add(student, rows, logits, scratch)
    return sums, teacher_sums


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of a chunk that stay in a CPU's cache from one pass over them to the next."""
    rows, vocabulary = logits.shape
    step = rows if logits.is_cuda else max(1, BLOCK_ELEMENTS // vocabulary)
    return [slice(start, start + step) for start in range(0, rows, step)]


@dataclass(frozen=True)
class _Gradients:
    """Gradients of one student's loss sum by its hidden states and, in `wide`, by its head."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def zeros(cls, student: HeadInput) -> "_Gradients":
        return cls(
            torch.empty_like(student.hidden),
            torch.zeros_like(student.weight, dtype=student.wide),
            None if student.bias is None else torch.zeros_like(student.bias, dtype=student.wide),
        )

    def add(
        self, student: HeadInput, rows: slice, logit_gradient: Tensor, scratch: Scratch
    ) -> None:
        """logit_gradient [rows, vocabulary]."""
        hidden = student.hidden[rows]
        if self.bias is not None:
            self.bias.add_(logit_gradient.sum(0))
        if hidden.dtype == self.weight.dtype:
            self.weight.addmm_(logit_gradient.T, hidden)
            torch.mm(logit_gradient, student.weight, out=self.hidden[rows])
            return
        gradient = scratch.take("product", student, rows).copy_(logit_gradient)
        self.weight.add_(gradient.T @ hidden)
        torch.mm(gradient, student.weight, out=self.hidden[rows])


def softmax(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(probabilities, log normaliser, largest logit), the last two [rows, 1].

    Overwrites `logits` with the probabilities. One exponential a word: torch's logsumexp followed
    by its exponential would take two.
    """
    largest = logits.amax(-1, keepdim=True)
    probabilities = logits.sub_(largest).exp_()
    total = probabilities.sum(-1, keepdim=True)
    return probabilities.div_(total), total.log_().add_(largest), largest


def _best(logits: Tensor) -> Tensor:
    """The likeliest word of every row, the first of equals, [rows, 1]."""
    rows, vocabulary = logits.shape
    if logits.is_cuda or vocabulary % BEST_BLOCK:
        return logits.argmax(-1, keepdim=True)
    # on a CPU argmax takes far longer than amax: the best block is found first
    blocks = logits.view(rows, -1, BEST_BLOCK)
    block = blocks.amax(-1).argmax(-1, keepdim=True)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, BEST_BLOCK)).squeeze(1)
    return block * BEST_BLOCK + inside.argmax(-1, keepdim=True)


def _student_block(
    work: _Work,
    student: HeadInput,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    teacher: _TeacherChunk | SparseSignal | None,
    sums: Tensor,
) -> None:
    """Adds (ce, divergence, kl, agreement) of a block to `sums`.

    Leaves d loss / d (the head's product) in the place of `logits`.
    """
    slope = student.slope(logits)
    if isinstance(teacher, SparseSignal):
        _sparse_gradient(work, logits, labels, valid, alpha, teacher, sums)
    else:
        _dense_gradient(work, logits, labels, valid, alpha, teacher, sums)
    if not isinstance(slope, float) or slope != 1.0:
        logits.mul_(slope)


def _dense_gradient(
    work: _Work,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    teacher: _TeacherChunk | None,
    sums: Tensor,
) -> None:
    """d loss / d logits in the place of `logits`, from all of the teacher's words."""
    best = None if teacher is None else logits.gather(1, teacher.best)
    largest = logits.amax(-1, keepdim=True)
    shifted = logits.sub_(largest)
    label = shifted.gather(1, labels)
    if teacher is None:
        log_total = _exponentials(shifted, valid)
    elif work.divergence.name == "forward_kl" and work.temperature == 1.0:
        # the usual case, in one buffer; at equal logits both sides are the same sums, so it is 0
        expected = torch.linalg.vecdot(teacher.probabilities, shifted).unsqueeze(1)
        log_total = _exponentials(shifted, valid)
        shifted.sub_(teacher.probabilities, alpha=alpha)
        kl = value = (teacher.expected - expected) + (log_total - teacher.log_total)
    else:
        soft = shifted / work.temperature
        soft_total = torch.logsumexp(soft, -1, keepdim=True)
        expected = torch.linalg.vecdot(teacher.probabilities, soft).unsqueeze(1)
        kl = (teacher.expected - expected) + (soft_total - teacher.log_total)
        value, soft_gradient = work.divergence.value_and_gradient(
            teacher.shifted - teacher.log_total, soft.sub_(soft_total)
        )
        log_total = _exponentials(shifted, valid * (1 - alpha))
        shifted.add_(soft_gradient.mul_(valid), alpha=alpha * work.temperature)
    sums[0] += ((log_total - label) * valid).sum()
    if teacher is not None:
        sums[1] += (value * valid).sum()
        sums[2] += (kl * valid).sum()
        sums[3] += ((best == largest) * valid).sum()
    shifted.scatter_add_(1, labels, valid * (alpha - 1.0))


def _exponentials(shifted: Tensor, weight: Tensor) -> Tensor:
    """Overwrites `shifted` with `weight` [rows, 1] x its softmax; the logarithm of the total."""
    total = shifted.exp_().sum(-1, keepdim=True)
    shifted.mul_(weight / total)
    return total.log_()


def _sparse_gradient(
    work: _Work,
    logits: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    signal: SparseSignal,
    sums: Tensor,
) -> None:
    """d loss / d logits in the place of `logits`, from what a cache kept of the teacher."""
    temperature = work.temperature
    label_logits = logits.gather(1, labels)
    at_first = logits.gather(1, signal.words[:, :1])
    soft_logits = logits if temperature == 1.0 else logits / temperature
    term = sparse_term(soft_logits, signal, work.divergence)
    weight = alpha * temperature
    if temperature == 1.0:
        log_normaliser, largest = term.log_normaliser, term.largest
        logits.mul_((1 - alpha + alpha * term.scale) * (valid / term.total))
    else:
        largest = logits.amax(-1, keepdim=True)
        log_normaliser = _exponentials(logits.sub_(largest), valid * (1 - alpha)) + largest
        logits.add_(term.exponentials.mul_(weight * term.scale * (valid / term.total)))
    logits.scatter_add_(1, signal.words, valid * weight * term.change)
    logits.scatter_add_(1, labels, valid * (alpha - 1.0))
    sums[0] += ((log_normaliser - label_logits) * valid).sum()
    sums[1] += (term.value * valid).sum()
    sums[2] += (term.kl * valid).sum()
    sums[3] += ((at_first == largest) * valid).sum()
