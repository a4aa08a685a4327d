"""Losses against a float64 reference, and the properties other tools get wrong."""

from typing import get_args

import pytest
import torch
from torch.nn import functional

from capgap.distill.divergences import Divergence, DivergenceName
from capgap.distill.head import IGNORED_LABEL, HeadInput, token_losses
from capgap.distill.losses import column_loss
from capgap.models.build import build_model
from capgap.models.parts import Parts
from capgap.models.shape import ladder_shape


def make_head(generator, tokens, width, vocabulary, *, bias=False):
    return HeadInput(
        torch.randn(tokens, width, generator=generator).requires_grad_(),
        (torch.randn(vocabulary, width, generator=generator) * 0.3).requires_grad_(),
        torch.randn(vocabulary, generator=generator).requires_grad_() if bias else None,
    )


def reference_loss(student, teacher, targets, alpha, temperature):
    """The loss as its formula reads, in float64 with full logits."""
    logits = student.hidden.double() @ student.weight.double().T
    if student.bias is not None:
        logits = logits + student.bias.double()
    ce = functional.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    if teacher is None:
        return ce, ce, None
    teacher_logits = teacher.hidden.detach().double() @ teacher.weight.detach().double().T
    kl = functional.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher_logits / temperature).log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)[targets != IGNORED_LABEL]
    return (1 - alpha) * ce + alpha * temperature**2 * kl.sum(), ce, kl.sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_match_float64(alpha, temperature, bias):
    generator = torch.Generator().manual_seed(3)
    tokens, vocabulary = 37, 101
    students = [
        make_head(generator, tokens, 8, vocabulary, bias=bias),
        make_head(generator, tokens, 12, vocabulary),
    ]
    teacher = make_head(generator, tokens, 16, vocabulary)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[[0, 5, 36]] = IGNORED_LABEL
    result = column_loss(
        students,
        targets,
        alphas=[alpha, 0.3],
        teacher=teacher,
        temperature=temperature,
        chunk_tokens=10,
    )
    assert result.tokens == 34
    torch.autograd.backward([one.loss for one in result.students])
    for student, one, weight in zip(students, result.students, [alpha, 0.3], strict=True):
        leaves = [
            leaf for leaf in (student.hidden, student.weight, student.bias) if leaf is not None
        ]
        ours = [leaf.grad.clone() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        loss, ce, kl = reference_loss(student, teacher, targets, weight, temperature)
        loss.backward()
        torch.testing.assert_close(one.loss.double(), loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.ce.double(), ce, rtol=1e-5, atol=1e-5)
        if weight > 0:
            torch.testing.assert_close(one.kl.double(), kl, rtol=1e-5, atol=1e-5)
        else:
            assert one.kl is None
        for got, leaf in zip(ours, leaves, strict=True):
            torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=2e-5)


def test_teacher_statistics_match_float64():
    generator = torch.Generator().manual_seed(5)
    student, teacher = (make_head(generator, 23, 8, 50) for _ in range(2))
    targets = torch.randint(0, 50, (23,), generator=generator)
    result = column_loss(
        [student], targets, alphas=[0.5], teacher=teacher, temperature=3.0, chunk_tokens=7
    )
    logits = teacher.hidden.detach().double() @ teacher.weight.detach().double().T
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
    ce = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(result.teacher.ce.double(), ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.teacher.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    student_logits = student.hidden @ student.weight.T
    agree = (student_logits.argmax(-1) == logits.argmax(-1)).sum()
    assert result.students[0].agreement == agree


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl_and_its_gradient_are_zero_at_student_equals_teacher(temperature):
    generator = torch.Generator().manual_seed(1)
    student = make_head(generator, 19, 8, 64)
    teacher = HeadInput(student.hidden.detach().clone(), student.weight.detach().clone())
    targets = torch.randint(0, 64, (19,), generator=generator)
    result = column_loss([student], targets, alphas=[1.0], teacher=teacher, temperature=temperature)
    result.students[0].loss.backward()
    assert result.students[0].kl.item() == 0.0
    assert student.hidden.grad.abs().max() < 1e-6
    assert student.weight.grad.abs().max() < 1e-5


def test_words_that_underflow_on_both_sides_give_no_nan():
    hidden = torch.ones(4, 2)
    weight = torch.zeros(6, 2)
    weight[0], weight[1] = 300.0, -300.0
    student = HeadInput(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    result = column_loss(
        [student],
        torch.tensor([0, 1, 2, 0]),
        alphas=[0.5],
        teacher=HeadInput(hidden * 0.9, weight),
    )
    result.students[0].loss.backward()
    assert torch.isfinite(result.students[0].loss)
    assert torch.isfinite(student.hidden.grad).all()


def test_loss_does_not_depend_on_the_split():
    """Sums over parts equal the sum over the whole: values and gradients."""
    generator = torch.Generator().manual_seed(2)
    student = make_head(generator, 40, 8, 30)
    teacher = make_head(generator, 40, 10, 30)
    targets = torch.randint(0, 30, (40,), generator=generator)
    targets[3:17] = IGNORED_LABEL
    whole = column_loss([student], targets, alphas=[0.4], teacher=teacher)
    whole.students[0].loss.backward()
    expected = student.weight.grad.clone()
    student.weight.grad = None
    total = torch.zeros(())
    for rows in (slice(0, 11), slice(11, 40)):
        part = column_loss(
            [HeadInput(student.hidden[rows], student.weight)],
            targets[rows],
            alphas=[0.4],
            teacher=HeadInput(teacher.hidden[rows], teacher.weight),
        )
        part.students[0].loss.backward()
        total += part.students[0].loss.detach()
    torch.testing.assert_close(total, whole.students[0].loss.detach())
    torch.testing.assert_close(student.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_bf16_inputs_accumulate_in_fp32():
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(64, 16, generator=generator).bfloat16()
    weight = torch.randn(32, 16, generator=generator).bfloat16()
    student = HeadInput(hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    targets = torch.randint(0, 32, (64,), generator=generator)
    result = column_loss([student], targets, alphas=[0.0])
    result.students[0].loss.backward()
    logits = hidden.double() @ weight.double().T
    expected = functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(result.students[0].ce.double(), expected, rtol=1e-5, atol=1e-4)
    assert student.hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("distance", [0.02, 0.1])
def test_bf16_inputs_near_their_teacher_have_the_gradient_of_float64(distance):
    """At a KL of 0.0016, and of 0.039; logits that are rounded to bf16 are off by 40% and 8%."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(1003, 64, generator=generator) * 3 / 64**0.5).bfloat16()
    hidden = torch.randn(256, 64, generator=generator).bfloat16()
    change = distance * torch.randn(256, 64, generator=generator)
    teacher = HeadInput((hidden.float() + change).bfloat16(), weight)
    targets = torch.zeros(256, dtype=torch.int64)
    # the gradients themselves in fp32, as those of weights are that autocast rounds
    inputs = [one.float().requires_grad_() for one in (hidden, weight)]
    student = HeadInput(*inputs, dtype=torch.bfloat16)
    result = column_loss([student], targets, alphas=[1.0], teacher=teacher, chunk_tokens=100)
    result.students[0].loss.backward()
    exact = [one.double().requires_grad_() for one in (hidden, weight)]
    kl = functional.kl_div(
        (exact[0] @ exact[1].T).log_softmax(-1),
        (teacher.hidden.double() @ weight.double().T).log_softmax(-1),
        log_target=True,
        reduction="sum",
    )
    kl.backward()
    assert result.students[0].kl.item() == pytest.approx(kl.item(), rel=1e-4)
    for ours, reference in zip(inputs, exact, strict=True):
        assert (ours.grad.double() - reference.grad).norm() < 0.005 * reference.grad.norm()


def test_a_gpu_multiplies_in_bf16_what_it_adds_up_in_fp32():
    """Without one: torch's meta device tells the dtypes, and which product was asked for."""
    hidden = torch.empty(10, 8, device="meta")
    head = HeadInput(hidden, torch.empty(101, 8, device="meta"), dtype=torch.bfloat16).ready()
    assert (head.hidden.dtype, head.weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (len(head.weight), head.vocabulary) == (128, 101)
    logits = head.logits_(head.product(slice(2, 7)))
    assert (logits.dtype, logits.shape) == (torch.float32, (5, 128))
    gradient = torch.empty(101, 5, dtype=torch.bfloat16, device="meta")
    # not added to what is there: torch 2.11 cannot tell the dtypes of that
    head.multiply(gradient, head.hidden[:5], torch.empty(101, 8, device="meta"))


@pytest.mark.parametrize("divergence", get_args(DivergenceName))
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_what_fills_up_a_head_has_no_part_in_anything(divergence, scale):
    """A vocabulary of 61 beside the same with rows of its own up to 64 that are never likely."""
    generator = torch.Generator().manual_seed(2)
    students, teachers = [], []
    for heads, width in ((students, 8), (teachers, 12)):
        hidden = torch.randn(20, width, generator=generator, dtype=torch.float64)
        weight = torch.randn(61, width, generator=generator, dtype=torch.float64) * scale
        bias = torch.randn(61, generator=generator, dtype=torch.float64)
        never = torch.full((3,), -1e9, dtype=torch.float64)
        heads.append((hidden, weight, bias))
        heads.append((hidden, functional.pad(weight, (0, 0, 0, 3)), torch.cat([bias, never])))
    found = []
    targets = torch.randint(0, 61, (20,), generator=generator)
    for student, teacher in zip(students, teachers, strict=True):
        leaves = [one.clone().requires_grad_() for one in student]
        result = column_loss(
            [HeadInput(*leaves)],
            targets,
            alphas=[0.5],
            teacher=HeadInput(*teacher),
            temperature=2.0,
            divergence=Divergence(divergence),
            chunk_tokens=7,
        )
        result.students[0].loss.backward()
        found.append([result.students[0].loss.detach(), *(one.grad for one in leaves)])
    for ours, wide in zip(*found, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, wide[: len(ours)] if ours.ndim else wide)


def test_bf16_gradients_are_summed_in_fp32_and_scaled_alike():
    """In bf16, 75 chunks would be off by a percent, and 1/600 by 0.2 percent."""
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(600, 16, generator=generator, requires_grad=True)
    weight = torch.randn(32, 16, generator=generator, requires_grad=True)
    targets = torch.randint(0, 32, (600,), generator=generator)
    student = HeadInput(hidden, weight, dtype=torch.bfloat16)
    result = column_loss([student], targets, alphas=[0.0], chunk_tokens=8)
    (result.students[0].loss / 600).backward()
    exact = [one.detach().bfloat16().double().requires_grad_() for one in (hidden, weight)]
    functional.cross_entropy(exact[0] @ exact[1].T, targets).backward()
    # the hidden states' own is told in bf16
    for found, reference, far in zip((hidden, weight), exact, (6e-3, 3e-3), strict=True):
        found, reference = found.grad.double().flatten(), reference.grad.flatten()
        assert (found - reference).norm() < far * reference.norm()
        assert (found @ reference / (reference @ reference)).item() == pytest.approx(1, abs=5e-4)


def test_token_losses_are_zero_at_ignored_positions():
    generator = torch.Generator().manual_seed(4)
    source = make_head(generator, 21, 8, 40)
    targets = torch.randint(0, 40, (21,), generator=generator)
    targets[7] = IGNORED_LABEL
    logits = source.hidden.detach() @ source.weight.detach().T
    expected = functional.cross_entropy(
        logits, targets, ignore_index=IGNORED_LABEL, reduction="none"
    )
    got = token_losses(source, targets, chunk_tokens=5)
    torch.testing.assert_close(got, expected)
    assert got[7] == 0


def test_rows_that_pad_a_table_do_not_count():
    """The same tokenizer with tables of 40, 44 and 48 rows: as if all had 37."""
    words, generator = 37, torch.Generator().manual_seed(5)
    inputs = torch.randint(0, words, (2, 9), generator=generator)
    targets = torch.randint(0, words, (18,), generator=generator)
    teacher, first, second = (
        build_model(ladder_shape("llama", 20_000, vocabulary=rows, positions=16), seed=rows)
        for rows in (48, 40, 44)
    )
    signal = HeadInput.of(Parts(teacher.requires_grad_(False)), inputs, words)
    students = [HeadInput.of(Parts(model), inputs, words) for model in (first, second)]
    result = column_loss(students, targets, alphas=[0.5, 1.0], teacher=signal, chunk_tokens=5)
    teacher_logits = teacher(inputs).logits[..., :words].flatten(0, 1)
    for model, alpha, found in zip((first, second), (0.5, 1.0), result.students, strict=True):
        logits = model(inputs).logits[..., :words].flatten(0, 1)
        ce = functional.cross_entropy(logits, targets, reduction="sum")
        kl = functional.kl_div(logits.log_softmax(-1), teacher_logits.softmax(-1), reduction="sum")
        torch.testing.assert_close(found.loss, (1 - alpha) * ce + alpha * kl)
    sum(found.loss for found in result.students).backward()
    for model in (first, second):
        gradient = model.get_output_embeddings().weight.grad
        assert torch.all(gradient[words:] == 0)
        assert torch.any(gradient[:words] != 0)


def test_tables_of_different_sizes_are_refused():
    generator = torch.Generator().manual_seed(5)
    student, teacher = (make_head(generator, 3, 4, rows) for rows in (5, 6))
    with pytest.raises(ValueError, match=r"heads of \[5, 6\] words"):
        column_loss([student], torch.zeros(3, dtype=torch.long), alphas=[0.5], teacher=teacher)


def test_alpha_needs_a_teacher():
    generator = torch.Generator().manual_seed(4)
    with pytest.raises(ValueError, match="needs a teacher"):
        column_loss([make_head(generator, 3, 4, 5)], torch.zeros(3, dtype=torch.long), alphas=[0.5])


def test_gradients_are_not_held_once_they_are_used():
    generator = torch.Generator().manual_seed(5)
    student = make_head(generator, 20, 8, 50)
    result = column_loss([student], torch.zeros(20, dtype=torch.int64), alphas=[0.0])
    result.students[0].loss.backward()
    # the loss is one of several that come out of one function
    (function,) = (one for one, _ in result.students[0].loss.grad_fn.next_functions)
    assert function.gradients is None
    assert student.weight.grad is not None
