"""How far a student's distribution is from its teacher's, with the gradient by its logits.

All forms work on log-probabilities, so a word that underflows on one side or on both gives no NaN.
With p the teacher's probabilities, q the student's, each value is 0 where q = p.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from capgap.errors import UserError

DivergenceName = Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"]


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
            return _expected(p, log_p - log_q), q - p
        if self.name == "reverse_kl":
            difference = log_q - log_p
            value = _expected(q, difference)
            return value, q * (difference - value)
        if self.name == "total_variation":
            value = 0.5 * (p - q).abs().sum(-1, keepdim=True)
            return value, _through_softmax(q, 0.5 * torch.sign(q - p))
        log_m = torch.logaddexp(log_p + math.log(self.mix), log_q + math.log(1 - self.mix))
        to_teacher, to_student = log_p - log_m, log_q - log_m
        if self.name == "skewed_kl":
            # p / m in logarithms: both may underflow
            slope = -(1 - self.mix) * torch.exp(to_teacher)
            return _expected(p, to_teacher), _through_softmax(q, slope)
        value = self.mix * _expected(p, to_teacher) + (1 - self.mix) * _expected(q, to_student)
        return value, _through_softmax(q, (1 - self.mix) * to_student)


def _expected(probabilities: Tensor, values: Tensor) -> Tensor:
    """Sum of probabilities x values a row, [rows, 1]."""
    return torch.linalg.vecdot(probabilities, values).unsqueeze(-1)


def _through_softmax(q: Tensor, slope: Tensor) -> Tensor:
    """From d value / d q [rows, vocabulary] to d value / d logits.

    A constant added to a row of `slope` changes nothing, so such constants are left out above.
    """
    return q * (slope - _expected(q, slope))
