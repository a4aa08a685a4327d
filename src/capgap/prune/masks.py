"""Masks on units: a whole model computes what the cut one would."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.models.families import FAMILIES
from capgap.models.shape import Shape


@dataclass(frozen=True)
class Masks:
    """A factor on every unit: 1 keeps it, 0 removes it.

    heads [layers, kv_heads]: a key-value head with all its query heads; neurons [layers, ffn];
    hidden [hidden], shared by all layers; layers [layers], on what a layer adds to the residual.
    """

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    layers: Tensor

    @staticmethod
    def ones(shape: Shape, *, dtype: torch.dtype, device: torch.device) -> "Masks":
        """The masks that change nothing."""

        def one(*size: int) -> Tensor:
            return torch.ones(size, dtype=dtype, device=device)

        return Masks(
            heads=one(shape.layers, shape.kv_heads),
            neurons=one(shape.layers, shape.ffn),
            hidden=one(shape.hidden),
            layers=one(shape.layers),
        )

    def as_list(self) -> list[Tensor]:
        return [self.heads, self.neurons, self.hidden, self.layers]


@contextmanager
def masked(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """While inside, `model` computes with `masks`; afterwards it is as before.

    With masks of zeros and ones the model computes what the cut model would: hidden units are
    masked wherever they are written (embeddings, norms, the two writes of a layer), and norms
    take their statistics over the kept units alone.
    """
    family = FAMILIES[model.config.model_type]

    # The hooks index the masks when they run, so that every forward pass has its own graph.
    def mask_inputs(units: Tensor, index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            # a head's mask covers its neighbouring inputs, a neuron's just one
            width = inputs[0].shape[-1] // units.shape[1]
            return (inputs[0] * units[index].repeat_interleave(width).to(inputs[0].dtype),)

        return hook

    def mask_write(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output * (masks.hidden * masks.layers[index]).to(output.dtype)

        return hook

    def mask_embedding(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * masks.hidden.to(output.dtype)

    def mask_norm(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return norm(module, inputs[0], masks.hidden).to(output.dtype)

    def mask_head_norm(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            width = inputs[0].shape[-1] // masks.heads.shape[1]
            mask = masks.heads[index].repeat_interleave(width)
            return norm(module, inputs[0], mask).to(output.dtype)

        return hook

    norm = partial(_norm, offset=family.norm_offset)
    handles = []
    try:
        for name in family.embeddings:
            embedding = model.get_submodule(name)
            handles.append(embedding.register_forward_hook(mask_embedding))
        final_norm = model.get_submodule(family.final_norm)
        handles.append(final_norm.register_forward_hook(mask_norm))
        for index, layer in enumerate(model.get_submodule(family.layers).children()):
            for name in family.layer_norms:
                handles.append(layer.get_submodule(name).register_forward_hook(mask_norm))
            for name in family.head_norms:
                module = layer.get_submodule(name)
                handles.append(module.register_forward_hook(mask_head_norm(index)))
            for name, units in (
                (family.head_inputs, masks.heads),
                (family.neuron_inputs, masks.neurons),
            ):
                module = layer.get_submodule(name)
                handles.append(module.register_forward_pre_hook(mask_inputs(units, index)))
            # last: a write may be a norm, whose own hook comes before
            for name in family.writes:
                handles.append(layer.get_submodule(name).register_forward_hook(mask_write(index)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm(module: Any, values: Tensor, mask: Tensor, *, offset: float) -> Tensor:
    """LayerNorm or RMSNorm of `values` [..., units] over the units that `mask` [units] keeps, with
    weights that count from `offset`."""
    # half precision is too coarse for the statistics
    wide = torch.promote_types(values.dtype, torch.float32)
    values, weight = values.to(wide), mask.to(wide) / mask.sum()
    if isinstance(module, nn.LayerNorm):
        values = values - (weight * values).sum(-1, keepdim=True)
        epsilon, bias = module.eps, module.bias
    else:
        # Gemma has a name of its own
        epsilon, bias = getattr(module, "variance_epsilon", None) or module.eps, None
    variance = (weight * values.square()).sum(-1, keepdim=True)
    normed = (module.weight + offset) * values * torch.rsqrt(variance + epsilon)
    return (normed if bias is None else normed + bias) * mask
