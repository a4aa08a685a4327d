"""Loss surfaces: what a model's loss is as a function of its size, its tokens and its teacher.

N parameters (non-embedding), D training tokens, L a loss in nats per token, L_T the teacher's;
the letters of the formulas are those of arXiv 2502.08606.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]


def log_power_sum(
    first: float, a: float, log_n: Floats, second: float, b: float, log_d: Floats
) -> tuple[Floats, Floats, Floats]:
    """log(first / n^a + second / d^b) without overflow, and the logarithms of both terms.

    A factor of 0 is a term that is not there.
    """
    with np.errstate(divide="ignore"):
        one, other = np.log(first) - a * log_n, np.log(second) - b * log_d
    return np.logaddexp(one, other), one, other


@dataclass(frozen=True)
class TeacherTokens:
    """What teachers of N parameters were trained on: factor N^exponent tokens."""

    factor: float
    exponent: float = 1.0

    def of(self, parameters: ArrayLike) -> Floats:
        """Tokens, of the shape of `parameters`."""
        return self.factor * np.asarray(parameters, dtype=float) ** self.exponent


@dataclass(frozen=True)
class SupervisedSurface:
    """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma, a model trained without a teacher."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float = 1.0

    def loss(self, parameters: ArrayLike, tokens: ArrayLike) -> Floats:
        """Nats per token, of the broadcast shape of both."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        powers, _, _ = log_power_sum(self.A, self.alpha, np.log(n), self.B, self.beta, np.log(d))
        return self.E + np.exp(self.gamma * powers)

    def compute_optimal_tokens(self) -> TeacherTokens:
        """Tokens at which the loss is the lowest for its FLOPs, 6 N D: where both terms fall alike,
        alpha A / N^alpha = beta B / D^beta."""
        ratio = self.beta * self.B / (self.alpha * self.A)
        return TeacherTokens(float(ratio ** (1 / self.beta)), self.alpha / self.beta)


@dataclass(frozen=True)
class DistillationSurface:
    """The loss of a student of N parameters that learns from a teacher on D tokens:

    L_S = L_T + L_T^-c0 (1 + (L_T / (d1 L))^(1/f1))^(-c1 f1) (A / N^alpha + B / D^beta)^gamma

    with L = supervised.loss(N, D), what the student would reach alone. Students from scratch, pure
    forward KL at temperature 1 (arXiv 2502.08606, eq. 8).
    """

    supervised: SupervisedSurface
    A: float
    B: float
    alpha: float
    beta: float
    gamma: float
    c0: float
    c1: float
    f1: float
    d1: float

    def loss(self, parameters: ArrayLike, tokens: ArrayLike, teacher_loss: ArrayLike) -> Floats:
        """Nats per token, of the broadcast shape of the three."""
        n, d = np.asarray(parameters, dtype=float), np.asarray(tokens, dtype=float)
        above = np.asarray(teacher_loss, dtype=float)
        ratio = np.log(above / (self.d1 * self.supervised.loss(n, d)))
        powers, _, _ = log_power_sum(self.A, self.alpha, np.log(n), self.B, self.beta, np.log(d))
        gap = self.c1 * self.f1 * np.logaddexp(0.0, ratio / self.f1)
        return above + np.exp(-self.c0 * np.log(above) - gap + self.gamma * powers)

    def best_teacher(
        self,
        parameters: float,
        tokens: float,
        *,
        teacher_tokens: TeacherTokens | None = None,
        ratios: tuple[float, float] = (0.25, 1000.0),
        tolerance: float = 0.001,
    ) -> "BestTeacher":
        """The teacher under which this student is the best, of teachers trained on so many tokens,
        by default as many as are compute-optimal.

        Looked for between `ratios` times the student, to 0.1%. `within` are the ratios whose loss
        is at most `tolerance` above the lowest, a share of it: the minimum is flat.
        """
        grid = np.geomspace(*ratios, 8001)
        sizes = grid * parameters
        read = (teacher_tokens or self.supervised.compute_optimal_tokens()).of(sizes)
        losses = self.loss(parameters, tokens, self.supervised.loss(sizes, read))
        best = int(losses.argmin())
        near = grid[losses <= (1 + tolerance) * losses[best]]
        return BestTeacher(
            ratio=float(grid[best]),
            loss=float(losses[best]),
            within=(float(near[0]), float(near[-1])),
        )


@dataclass(frozen=True)
class BestTeacher:
    """T/S of the best teacher, the student's loss under it, and the ratios that are as good."""

    ratio: float
    loss: float
    within: tuple[float, float]
