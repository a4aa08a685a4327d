"""Every divergence against its formula in float64, with autograd's gradient."""

import pytest
import torch

from capgap.distill.divergences import Divergence
from capgap.distill.head import IGNORED_LABEL, HeadInput
from capgap.distill.losses import column_loss
from capgap.errors import UserError

ALL = [
    Divergence("forward_kl"),
    Divergence("reverse_kl"),
    Divergence("jsd", 0.5),
    Divergence("jsd", 0.1),
    Divergence("jsd", 0.9),
    Divergence("skewed_kl", 0.1),
    Divergence("skewed_kl", 0.7),
    Divergence("total_variation"),
]


def formula(divergence, p, q):
    """The definition, word by word, on probabilities [rows, vocabulary]."""

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    mix = divergence.mix
    m = mix * p + (1 - mix) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: mix * kl(p, m) + (1 - mix) * kl(q, m),
        "skewed_kl": lambda: kl(p, m),
        "total_variation": lambda: 0.5 * (p - q).abs().sum(-1),
    }[divergence.name]()


def name_of(divergence):
    return f"{divergence.name}-{divergence.mix}"


@pytest.mark.parametrize("divergence", ALL, ids=name_of)
def test_value_and_gradient_are_those_of_the_formula(divergence):
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(9, 31, generator=generator, dtype=torch.float64)
    student = torch.randn(9, 31, generator=generator, dtype=torch.float64).requires_grad_()
    expected = formula(divergence, teacher.softmax(-1), student.softmax(-1))
    expected.sum().backward()
    value, gradient = divergence.value_and_gradient(
        teacher.log_softmax(-1), student.detach().log_softmax(-1)
    )
    torch.testing.assert_close(value.squeeze(1), expected.detach())
    torch.testing.assert_close(gradient, student.grad)


@pytest.mark.parametrize("divergence", ALL, ids=name_of)
def test_value_and_gradient_are_zero_where_both_agree(divergence):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    value, gradient = divergence.value_and_gradient(logits, logits.clone())
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", ALL, ids=name_of)
def test_words_that_underflow_give_no_nan(divergence):
    """Probabilities of exactly 0 in fp32 on one side, on the other, on both."""
    teacher = torch.tensor([[0.0, -300.0, -300.0, -1.0]]).log_softmax(-1)
    student = torch.tensor([[-300.0, 0.0, -300.0, -1.0]]).log_softmax(-1)
    value, gradient = divergence.value_and_gradient(teacher, student)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert value > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", ALL, ids=name_of)
def test_in_the_chunked_loss_with_mask_labels_and_temperature(divergence, temperature):
    generator = torch.Generator().manual_seed(2)
    tokens, vocabulary, alpha = 23, 37, 0.6
    student = HeadInput(
        torch.randn(tokens, 6, generator=generator).requires_grad_(),
        torch.randn(vocabulary, 6, generator=generator).requires_grad_(),
    )
    teacher = HeadInput(
        torch.randn(tokens, 8, generator=generator),
        torch.randn(vocabulary, 8, generator=generator),
    )
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[[1, 22]] = IGNORED_LABEL
    result = column_loss(
        [student],
        targets,
        alphas=[alpha],
        teacher=teacher,
        temperature=temperature,
        divergence=divergence,
        chunk_tokens=5,
    )
    result.students[0].loss.backward()
    ours = [leaf.grad.clone() for leaf in (student.hidden, student.weight)]
    student.hidden.grad = student.weight.grad = None

    logits = student.hidden.double() @ student.weight.double().T
    teacher_logits = teacher.hidden.double() @ teacher.weight.double().T
    p, q = ((one / temperature).softmax(-1) for one in (teacher_logits, logits))
    valid = targets != IGNORED_LABEL
    ce = torch.nn.functional.cross_entropy(
        logits, targets, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    soft = formula(divergence, p, q)[valid].sum()
    loss = (1 - alpha) * ce + alpha * temperature**2 * soft
    loss.backward()
    one = result.students[0]
    torch.testing.assert_close(one.divergence.double(), soft, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        one.kl.double(), formula(Divergence(), p, q)[valid].sum(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(one.loss.double(), loss, rtol=1e-5, atol=1e-5)
    for got, leaf in zip(ours, (student.hidden, student.weight), strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=3e-5)


def test_jsd_nears_the_kls_at_the_ends_of_its_mix():
    """JSD / mix goes to the forward KL as mix goes to 0, JSD / (1 - mix) to the reverse one."""
    generator = torch.Generator().manual_seed(3)
    log_p, log_q = (
        torch.randn(4, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
        for _ in range(2)
    )
    small, _ = Divergence("jsd", 1e-6).value_and_gradient(log_p, log_q)
    forward, _ = Divergence("forward_kl").value_and_gradient(log_p, log_q)
    torch.testing.assert_close(small / 1e-6, forward, rtol=1e-4, atol=0)
    large, _ = Divergence("jsd", 1 - 1e-6).value_and_gradient(log_p, log_q)
    reverse, _ = Divergence("reverse_kl").value_and_gradient(log_p, log_q)
    torch.testing.assert_close(large / 1e-6, reverse, rtol=1e-4, atol=0)


def test_mistakes():
    with pytest.raises(UserError, match="'kl'"):
        Divergence("kl")
    with pytest.raises(UserError, match=r"1\.0"):
        Divergence("jsd", 1.0)
