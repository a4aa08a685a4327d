"""Tiny models in which every weight matters: what tests of pruning cut and score."""

import torch
from transformers import PreTrainedModel

from capgap.models.build import build_model
from capgap.models.shape import Shape


def lively(shape: Shape, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Biases and norm weights are not at their defaults."""
    model = build_model(shape, seed=3).to(dtype)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=dtype)
    return model
