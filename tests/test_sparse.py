"""The soft term from a cache against float64 on the whole vocabulary; what its bytes keep."""

import math

import pytest
import torch

from capgap.distill.cache import CacheFormat
from capgap.distill.divergences import Divergence, SparseSignal
from capgap.distill.head import IGNORED_LABEL, HeadInput
from capgap.distill.losses import column_loss

TOKENS, WORDS, WIDTH = 23, 41, 8


def heads(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def head(width):
        return HeadInput(
            torch.randn(TOKENS, width, generator=generator, dtype=torch.float64),
            torch.randn(WORDS, width, generator=generator, dtype=torch.float64),
        )

    student, teacher = head(WIDTH), head(12)
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    targets = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    targets[[2, 3, 20]] = IGNORED_LABEL
    return student, teacher, targets


def top_signal(teacher, top_k, temperature):
    """In float64, without the rounding of a cache."""
    logits = teacher.hidden @ teacher.weight.T
    shares, words = (logits / temperature).softmax(-1).topk(top_k, -1)
    zero = torch.zeros(TOKENS, 1, dtype=torch.float64)
    return SparseSignal(
        words,
        shares,
        1 - shares.sum(-1, keepdim=True),
        zero,
        zero,
        zero,
        temperature,
        WORDS,
        True,
    )


def buckets(logits, words):
    """Log-probabilities of the words and of all others together."""
    everything = logits.log_softmax(-1)
    others = everything.scatter(1, words, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([everything.gather(1, words), others], dim=1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
@pytest.mark.parametrize(
    "divergence",
    [Divergence(), Divergence("reverse_kl"), Divergence("jsd", 0.3), Divergence("skewed_kl", 0.2)],
    ids=str,
)
def test_buckets_match_float64_autograd(divergence, alpha, temperature):
    student, teacher, targets = heads()
    signal = top_signal(teacher, 5, temperature)
    result = column_loss(
        [student],
        targets,
        alphas=[alpha],
        teacher=signal,
        temperature=temperature,
        divergence=divergence,
        chunk_tokens=7,
    )
    result.students[0].loss.backward()
    ours = [student.hidden.grad.clone(), student.weight.grad.clone()]
    student.hidden.grad = student.weight.grad = None

    logits = student.hidden @ student.weight.T
    log_p = buckets(teacher.hidden @ teacher.weight.T / temperature, signal.words)
    log_q = buckets(logits / temperature, signal.words)
    value, _ = divergence.value_and_gradient(log_p, log_q)
    valid = targets != IGNORED_LABEL
    ce = torch.nn.functional.cross_entropy(logits[valid], targets[valid], reduction="sum")
    loss = (1 - alpha) * ce + alpha * temperature**2 * value[valid].sum()
    loss.backward()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[valid].sum()
    torch.testing.assert_close(result.students[0].loss, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(result.students[0].kl, kl, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours[0], student.hidden.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(ours[1], student.weight.grad, rtol=1e-9, atol=1e-10)


def test_value_and_gradient_are_zero_where_the_buckets_are_equal():
    _, teacher, targets = heads()
    student = HeadInput(teacher.hidden.clone().requires_grad_(), teacher.weight)
    result = column_loss([student], targets, alphas=[1.0], teacher=top_signal(teacher, 5, 1.0))
    result.students[0].loss.backward()
    assert abs(result.students[0].loss.item()) < 1e-12
    assert student.hidden.grad.abs().max() < 1e-12


@pytest.mark.parametrize(("top_k", "samples"), [(0, 6), (4, 5), (7, 0), (39, 3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_records_keep_words_shares_and_statistics(top_k, samples, temperature):
    _, teacher, targets = heads()
    targets = targets.clamp_min(0)
    kept = CacheFormat(WORDS, top_k, samples, temperature)
    records = kept.encode(teacher, targets, torch.rand(TOKENS))
    assert records.shape == (TOKENS, kept.token_bytes)
    assert records.dtype == torch.uint8
    signal = kept.decode(records)
    logits = teacher.hidden @ teacher.weight.T
    probabilities = (logits / temperature).softmax(-1).float()
    best, words = probabilities.topk(top_k, -1)
    assert torch.equal(signal.words[:, :top_k], words)
    torch.testing.assert_close(signal.shares[:, :top_k], best, rtol=5e-3, atol=1e-4)
    whole = signal.shares.sum(-1, keepdim=True)
    if samples == 0:
        whole = whole + signal.tail
    torch.testing.assert_close(whole, torch.ones(TOKENS, 1), rtol=1e-6, atol=1e-6)
    # drawn words are none of the best
    for row in range(TOKENS):
        drawn = signal.words[row, top_k:][signal.shares[row, top_k:] > 0]
        assert not set(drawn.tolist()) & set(words[row].tolist())
    log_p = logits.log_softmax(-1)
    ce = -log_p.gather(1, targets.unsqueeze(1))
    entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True)
    soft = (logits / temperature).log_softmax(-1)
    soft_entropy = -(soft.exp() * soft).sum(-1, keepdim=True)
    torch.testing.assert_close(signal.label_loss.double(), ce, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(signal.entropy.double(), entropy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(signal.soft_entropy.double(), soft_entropy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("top_k", "samples"), [(0, 3), (4, 3)])
def test_drawn_words_give_the_gradient_of_the_whole_distribution_on_average(top_k, samples):
    """Over all places of the random beginning, the mean is the exact forward KL."""
    student, teacher, targets = heads(1)
    exact = column_loss([student], targets, alphas=[1.0], teacher=teacher)
    exact.students[0].loss.backward()
    expected = student.weight.grad.clone()
    kept = CacheFormat(WORDS, top_k, samples)
    total, kl = torch.zeros_like(expected), 0.0
    spread = []
    places = 400
    for place in range(places):
        student.weight.grad = None
        at = torch.full((TOKENS,), (place + 0.5) / places)
        signal = kept.decode(kept.encode(teacher, targets.clamp_min(0), at))
        result = column_loss([student], targets, alphas=[1.0], teacher=signal)
        result.students[0].loss.backward()
        total += student.weight.grad
        kl += result.students[0].kl.item()
        spread.append((student.weight.grad - expected).norm())
    scale = expected.norm()
    assert (total / places - expected).norm() < 0.005 * scale
    assert kl / places == pytest.approx(exact.students[0].kl.item(), rel=5e-3)
    assert torch.stack(spread).mean() > 0.02 * scale  # a single draw is far from it


def test_default_records_have_at_most_114_bytes():
    assert CacheFormat(151_936).token_bytes <= 114
    assert CacheFormat(49_152).token_bytes <= 114


def test_three_byte_words_come_back():
    kept = CacheFormat(200_000, top_k=3, samples=0)
    weight = torch.zeros(200_000, 1)
    weight[[70_000, 131_071, 199_999], 0] = torch.tensor([3.0, 2.0, 1.0])
    source = HeadInput(torch.ones(2, 1) * 4, weight)
    signal = kept.decode(kept.encode(source, torch.zeros(2, dtype=torch.long), torch.zeros(2)))
    assert signal.words.tolist() == [[70_000, 131_071, 199_999]] * 2


@pytest.mark.parametrize(
    "wrong", [{"top_k": 0, "samples": 0}, {"top_k": 300}, {"temperature": 0.0}, {"samples": -1}]
)
def test_what_cannot_be_kept_is_refused(wrong):
    with pytest.raises(ValueError, match=r"top-k|temperature|samples"):
        CacheFormat(**({"vocabulary": 300} | wrong))


def test_a_signal_serves_its_own_temperature_and_drawn_words_the_forward_kl_alone():
    student, teacher, targets = heads()
    drawn = CacheFormat(WORDS, 4, 3)
    signal = drawn.decode(drawn.encode(teacher, targets.clamp_min(0), torch.rand(TOKENS)))
    with pytest.raises(ValueError, match="temperature 1, not 2"):
        column_loss([student], targets, alphas=[1.0], teacher=signal, temperature=2.0)
    with pytest.raises(ValueError, match="forward KL alone"):
        column_loss(
            [student], targets, alphas=[1.0], teacher=signal, divergence=Divergence("reverse_kl")
        )


def test_a_cache_is_made_from_logits_that_are_not_rounded():
    """Of a teacher in bf16 it holds what float64 makes of the same weights, to float16."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(301, 64, generator=generator) * 6 / 64**0.5).bfloat16()
    hidden = torch.randn(50, 64, generator=generator).bfloat16()
    places = torch.rand(50, generator=generator)
    kept = CacheFormat(301, top_k=5, samples=0)
    targets = torch.zeros(50, dtype=torch.int64)
    signal = kept.decode(kept.encode(HeadInput(hidden, weight), targets, places))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    shares, words = exact.exp().topk(5, -1)
    assert torch.equal(signal.words, words)
    # float16 has 11 bits: of a logarithm of 8 it is off by 0.004 at the most
    torch.testing.assert_close(signal.shares.double(), shares, rtol=4e-3, atol=0)
    torch.testing.assert_close(signal.label_loss.double(), -exact[:, :1], rtol=1e-3, atol=0)


def test_no_row_that_fills_up_a_head_is_kept():
    """Where all but a few words have no probability that fp32 can tell."""
    weight = torch.full((300, 1), -300.0)
    weight[[3, 299]] = 1.0
    kept = CacheFormat(300, top_k=6, samples=4)
    source = HeadInput(torch.ones(2, 1), weight)
    signal = kept.decode(kept.encode(source, torch.tensor([3, 299]), torch.tensor([0.0, 0.9])))
    assert signal.words.max() < 300
    assert set(signal.words[0, :2].tolist()) == {3, 299}
