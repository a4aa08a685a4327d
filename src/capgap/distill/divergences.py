"""How far a student's distribution is from its teacher's, with the gradient by its logits: over all
words, or over the few that a cache keeps of a teacher's distribution.

All forms work on log-probabilities, so a word that underflows on one side or on both gives no NaN.
With p the teacher's probabilities, q the student's, each value is 0 where q = p.
"""

import math
import operator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from capgap.distill import DivergenceName
from capgap.distill.head import each_tensor
from capgap.errors import UserError


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and for two of them the share `mix` of the teacher in the mixture.

    forward_kl        KL(p || q) (arXiv 1503.02531)
    reverse_kl        KL(q || p) (arXiv 2306.08543)
    jsd               mix KL(p || m) + (1 - mix) KL(q || m), m = mix p + (1 - mix) q
                      (arXiv 2306.13649)
    skewed_kl         KL(p || m), m = mix p + (1 - mix) q (arXiv 2402.03898)
    total_variation   half the sum of |p - q| (arXiv 2307.15190)

    Raises UserError for an unknown name or a mix that is not above 0 and below 1.
    """

    name: DivergenceName = "forward_kl"
    mix: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in get_args(DivergenceName):
            known = ", ".join(get_args(DivergenceName))
            raise UserError(f"unknown divergence {self.name!r}: take one of {known}")
        if not 0 < self.mix < 1:
            raise UserError(f"divergence mix {self.mix} must lie between 0 and 1")

    def __str__(self) -> str:
        """As records name it: `forward_kl`, `jsd 0.5`."""
        return f"{self.name} {self.mix:g}" if self.name in ("jsd", "skewed_kl") else self.name

    def value_and_gradient(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """(value [rows, 1] in nats, d value / d student logits [rows, vocabulary]).

        log_p, log_q [rows, vocabulary]: log-probabilities of teacher and student, finite.
        """
        p, q = log_p.exp(), log_q.exp()
        if self.name == "forward_kl":
            return expectation(p, log_p - log_q), q - p
        if self.name == "reverse_kl":
            difference = log_q - log_p
            value = expectation(q, difference)
            return value, q * (difference - value)
        if self.name == "total_variation":
            value = 0.5 * (p - q).abs().sum(-1, keepdim=True)
            return value, _through_softmax(q, 0.5 * torch.sign(q - p))
        log_m = torch.logaddexp(log_p + math.log(self.mix), log_q + math.log(1 - self.mix))
        to_teacher, to_student = log_p - log_m, log_q - log_m
        if self.name == "skewed_kl":
            # p / m in logarithms: both may underflow
            slope = -(1 - self.mix) * torch.exp(to_teacher)
            return expectation(p, to_teacher), _through_softmax(q, slope)
        value = self.mix * expectation(p, to_teacher) + (1 - self.mix) * expectation(q, to_student)
        return value, _through_softmax(q, (1 - self.mix) * to_student)


def expectation(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum of probabilities x values a row, [rows, 1]."""
    if torch.compiler.is_compiling():
        # vecdot is a matrix product, which nothing is fused with
        return (probabilities * values).sum(-1, keepdim=True)
    return torch.linalg.vecdot(probabilities, values).unsqueeze(-1)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """From d value / d q [rows, vocabulary] to d value / d logits.

    A constant added to a row of `slope` changes nothing, so such constants are left out above.
    """
    return q * (slope - expectation(q, slope))


@dataclass(frozen=True)
class SparseSignal:
    """A teacher's distribution by a few of its words, at the temperature it was kept for.

    words int64 [tokens, slots], the likeliest first where `knows_best`; shares [tokens, slots] of
    the probability; tail [tokens, 1] the probability of all other words, None where the words
    were drawn: their shares sum to 1 and a word may come twice. label_loss and entropy [tokens, 1]
    at temperature 1, soft_entropy [tokens, 1] at `temperature`; nats.
    """

    words: Tensor
    shares: Tensor
    tail: Tensor | None
    label_loss: Tensor
    entropy: Tensor
    soft_entropy: Tensor
    temperature: float
    vocabulary: int
    knows_best: bool

    def to(self, dtype: torch.dtype) -> "SparseSignal":
        """With floats of the dtype that the loss computes in."""
        return each_tensor(self, lambda one: one.to(dtype) if one.is_floating_point() else one)

    def rows(self, rows: slice) -> "SparseSignal":
        """Those tokens alone."""
        return each_tensor(self, operator.itemgetter(rows))


@dataclass(frozen=True)
class SoftTerm:
    """The soft term of some tokens, its gradient by the soft logits left in parts.

    value, kl [rows, 1]; the gradient is `scale` [rows, 1] x the student's probabilities, with
    `change` added: at the signal's words [rows, slots], or at all words [rows, vocabulary]; None
    stands for the teacher's probabilities, taken off.
    """

    value: Tensor
    kl: Tensor
    scale: Tensor | float
    change: Tensor | None


def sparse_term(
    logits: Tensor,
    probabilities: Tensor,
    log_total: Tensor,
    signal: SparseSignal,
    divergence: Divergence,
) -> SoftTerm:
    """The soft term from a few words a token.

    Either the likeliest words exactly, and all others as one bucket: a divergence over k + 1
    buckets, never above the whole one and 0 where the student's buckets equal the teacher's. Or
    words drawn so that every word's expected share is its probability (arXiv 2503.16870): the
    gradient of the forward KL is then unbiased, whatever was drawn.

    logits, probabilities [rows, vocabulary] and log_total [rows, 1] as softmax_ leaves them, at
    the signal's temperature.
    """
    at_words = logits.gather(1, signal.words)
    if signal.tail is None:
        # drawn words estimate the cross-entropy; the teacher's entropy is known
        kl = (signal.shares * (log_total - at_words)).sum(-1, keepdim=True) - signal.soft_entropy
        return SoftTerm(kl, kl, 1.0, -signal.shares)
    # the tail is summed by itself: 1 less the words' probabilities would cancel
    words = probabilities.gather(1, signal.words)
    tail = probabilities.scatter_(1, signal.words, 0.0).sum(-1, keepdim=True)
    probabilities.scatter_(1, signal.words, words)
    smallest = torch.finfo(tail.dtype).tiny
    tail = tail.clamp_min(smallest)
    log_q = torch.cat([at_words - log_total, tail.log()], dim=1)
    log_p = torch.cat([signal.shares, signal.tail], dim=1).clamp_min(smallest).log()
    value, gradient = divergence.value_and_gradient(log_p, log_q)
    kl = value if divergence.name == "forward_kl" else expectation(log_p.exp(), log_p - log_q)
    # the tail's gradient goes to its words by their part of it
    scale = gradient[:, -1:] / tail
    return SoftTerm(value, kl, scale, gradient[:, :-1] - scale * words)
