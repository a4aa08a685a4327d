"""AdamW with its parameter groups, and the schedule as pure functions of the step."""

import math

import torch
from torch import nn

BETAS = (0.9, 0.95)


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
    model: nn.Module, *, weight_decay: float, decay_embeddings: bool
) -> torch.optim.AdamW:
    groups = parameter_groups(model, weight_decay=weight_decay, decay_embeddings=decay_embeddings)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def schedule(step: int, *, steps: int, warmup_fraction: float) -> float:
    """The share of the peak learning rate at a step counted from 0: linear warm-up, cosine to 0.

    The warm-up's last step and the first after it are at the peak; the last step is just above 0.
    """
    warmup = max(1, round(steps * warmup_fraction))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * progress))
