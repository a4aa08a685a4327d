"""Loss surfaces: what a model's loss is as a function of its size, its tokens and its teacher.

N parameters (non-embedding), D training tokens, L a loss in nats per token, L_T the teacher's;
the letters of the formulas are those of arXiv 2502.08606.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating[Any]]


# T/S between which the best teacher is looked for; one at an end is none
RATIOS = (0.25, 1000.0)
Slopes = dict[str, Floats]  # by coefficient, along its logarithm; along c0 itself


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
        return self.with_slopes(parameters, tokens)[0]

    def with_slopes(self, parameters: ArrayLike, tokens: ArrayLike) -> tuple[Floats, Slopes]:
        """The loss, and its slopes along the coefficients."""
        power, slopes = _power(self, parameters, tokens)
        return self.E + power, slopes | {"E": np.full_like(power, self.E)}

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
        alone = self.supervised.loss(parameters, tokens)
        return self.with_slopes(parameters, tokens, teacher_loss, alone)[0]

    def with_slopes(
        self, parameters: ArrayLike, tokens: ArrayLike, teacher_loss: ArrayLike, alone: ArrayLike
    ) -> tuple[Floats, Slopes]:
        """The loss, and its slopes along the coefficients of this surface; alone: the loss of the
        student without a teacher."""
        above = np.asarray(teacher_loss, dtype=float)
        power, slopes = _power(self, parameters, tokens)
        ratio = np.log(above / (self.d1 * np.asarray(alone))) / self.f1
        soft = np.logaddexp(0.0, ratio)
        step = np.exp(ratio - soft)  # the logistic function of ratio
        factor = np.exp(-self.c0 * np.log(above) - self.c1 * self.f1 * soft)
        gain = factor * power
        own = {
            "c0": -gain * np.log(above),
            "c1": -gain * self.c1 * self.f1 * soft,
            "f1": -gain * self.c1 * self.f1 * (soft - step * ratio),
            "d1": gain * self.c1 * step,
        }
        return above + gain, own | {name: factor * slope for name, slope in slopes.items()}

    def best_teacher(
        self,
        parameters: float,
        tokens: float,
        *,
        teacher_tokens: TeacherTokens | None = None,
    ) -> "BestTeacher":
        """The teacher under which this student is the best, of teachers trained on so many tokens,
        by default as many as are compute-optimal.

        Looked for between RATIOS times the student, to 0.1%. `within` are the ratios whose loss is
        at most 0.1% above the lowest: the minimum is flat.
        """
        grid = np.geomspace(*RATIOS, 8001)
        sizes = grid * parameters
        read = (teacher_tokens or self.supervised.compute_optimal_tokens()).of(sizes)
        losses = self.loss(parameters, tokens, self.supervised.loss(sizes, read))
        best = int(losses.argmin())
        near = grid[losses <= 1.001 * losses[best]]
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


def _power(
    surface: SupervisedSurface | DistillationSurface, parameters: ArrayLike, tokens: ArrayLike
) -> tuple[Floats, Slopes]:
    """(A / N^alpha + B / D^beta)^gamma without overflow, and its slopes; a factor of 0 is a term
    that is not there."""
    log_n, log_d = (np.log(np.asarray(axis, dtype=float)) for axis in (parameters, tokens))
    with np.errstate(divide="ignore"):
        first = np.log(surface.A) - surface.alpha * log_n
        second = np.log(surface.B) - surface.beta * log_d
    both = np.logaddexp(first, second)
    power = np.exp(surface.gamma * both)
    grown = surface.gamma * power
    one, other = grown * np.exp(first - both), grown * np.exp(second - both)
    return power, {
        "A": one,
        "B": other,
        "alpha": -one * surface.alpha * log_n,
        "beta": -other * surface.beta * log_d,
        "gamma": grown * both,
    }
