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


def in_double(monkeypatch):
    """Norms and attention of transformers round to single precision, whose sums depend, on some
    processors, on how many rows are read at once."""

    def wide(function):
        def call(*arguments, **options):
            given = [torch.float64 if one is torch.float32 else one for one in arguments]
            if options.get("dtype") is torch.float32:
                options["dtype"] = torch.float64
            return function(*given, **options)

        return call

    monkeypatch.setattr(torch.Tensor, "to", wide(torch.Tensor.to))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch.nn.functional, "softmax", wide(torch.nn.functional.softmax))
