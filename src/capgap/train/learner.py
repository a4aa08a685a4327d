"""One model in training, and its optimizer."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from capgap.models.parts import Parts

# What the last step of a training can do, after which no other notices
NOT_FINITE = {"message": "non-finite held-out loss after the last step"}
OF_A_TEACHER = ("kl", "teacher_ce", "teacher_entropy", "agreement")
CURVE = ("step", "tokens", "ce", *OF_A_TEACHER, "gradient_norm", "learning_rate")
BETAS = (0.9, 0.95)


@dataclass
class Learner:
    """One model in training, which ends after `steps`, or at its first loss or gradient that is not
    finite. `curve` gets what its record shows of it (docs/output.md#recordjson).

    `parts` is the same model, as the loop calls it; `parallelize` may have sharded it.
    """

    id: str
    model: PreTrainedModel
    steps: int
    learning_rate: float
    alpha: float = 0.0
    curve: dict[str, list[float | None]] = field(
        default_factory=lambda: {column: [] for column in CURVE}
    )
    failure: dict[str, Any] | None = None
    parts: Parts = field(init=False)

    def __post_init__(self) -> None:
        self.parts = Parts(self.model)

    def active(self, step: int) -> bool:
        return self.failure is None and step < self.steps


def make_optimizer(
    model: nn.Module,
    *,
    weight_decay: float,
    decay_embeddings: bool,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.AdamW:
    """Weight decay on matrices alone: never on norms and biases, on embeddings only by choice."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    spared = set() if decay_embeddings else {id(p) for table in tables for p in table.parameters()}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        (kept if parameter.ndim < 2 or id(parameter) in spared else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
