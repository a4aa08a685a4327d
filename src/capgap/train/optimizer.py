"""AdamW with its parameter groups, and the schedule as pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run, as a share of its peak.

    After a linear warm-up over `warmup_fraction` of the steps: `cosine` falls to `final_rate` at
    the end; `wsd` (arXiv 2404.06395) stays at the peak, and falls in a straight line over the last
    `decay_fraction` of the steps.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_rate: float = 0.0

    def share(self, step: int, steps: int) -> float:
        """At a step counted from 0. The warm-up's last step and the first after it are at the peak;
        the last step is just above the end of the fall."""
        warmup = max(1, round(steps * self.warmup_fraction))
        if step < warmup:
            return (step + 1) / warmup
        if self.kind == "cosine":
            progress = (step - warmup) / max(1, steps - warmup)
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = min(1.0, (steps - step) / max(1, round(steps * self.decay_fraction)))
        return self.final_rate + (1 - self.final_rate) * left


COSINE = Schedule()


def parameter_groups(
    model: nn.Module, *, weight_decay: float, decay_embeddings: bool
) -> list[dict[str, object]]:
    """Weight decay on matrices alone: never on norms and biases, on embeddings only by choice."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed, kept = [], []
    for parameter in model.parameters():
        if parameter.ndim < 2 or (id(parameter) in embeddings and not decay_embeddings):
            kept.append(parameter)
        else:
            decayed.append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    *,
    weight_decay: float,
    decay_embeddings: bool,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.AdamW:
    groups = parameter_groups(model, weight_decay=weight_decay, decay_embeddings=decay_embeddings)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
