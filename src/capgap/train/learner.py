"""One model in training."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from capgap.models.parts import Parts

# What the last step of a training can do, after which no other notices
NOT_FINITE = {"message": "non-finite held-out loss after the last step"}
CURVE_COLUMNS = (
    "step",
    "tokens",
    "ce",
    "kl",
    "teacher_ce",
    "teacher_entropy",
    "agreement",
    "gradient_norm",
    "learning_rate",
)


@dataclass
class Learner:
    """It ends after `steps`, or at its first non-finite loss or gradient.

    `parts` is the same model, as the loop calls it; `parallelize` may have sharded it.
    """

    id: str
    model: PreTrainedModel
    steps: int
    learning_rate: float
    alpha: float = 0.0
    curve: dict[str, list[float | None]] = field(
        default_factory=lambda: {column: [] for column in CURVE_COLUMNS}
    )
    failure: dict[str, Any] | None = None
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = Parts(self.model)

    def active(self, step: int) -> bool:
        return self.failure is None and step < self.steps
