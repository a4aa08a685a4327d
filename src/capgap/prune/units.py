"""The units that a cut keeps or removes: which rows of tensors are theirs, and masks on them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from capgap.models.families import FAMILIES, Axes
from capgap.models.shape import Shape

# By the kind of units: heads [layers, kv_heads], a key-value head with all its query heads; neurons
# [layers, ffn]; hidden [hidden], shared by all layers; layers [layers]
Units = dict[str, Tensor]


def unit_of_rows(kind: str, shape: Shape) -> tuple[str, Tensor] | None:
    """For an axis that runs over `kind` (see models/families.py) the name of its units (heads,
    neurons or hidden) and the unit of each row [rows]; None where no unit is cut.

    A head is a key-value head with all its query heads.
    """
    heads, neurons, size = torch.arange(shape.kv_heads), torch.arange(shape.ffn), shape.head_size
    query = heads.repeat_interleave(shape.heads // shape.kv_heads * size)
    key = heads.repeat_interleave(size)
    return {
        "hidden": ("hidden", torch.arange(shape.hidden)),
        "neurons": ("neurons", neurons),
        "gate_up": ("neurons", neurons.repeat(2)),
        "query": ("heads", query),
        "key": ("heads", key),
        "head_qkv": ("heads", heads.repeat_interleave(3 * size)),
        "qkv": ("heads", torch.cat([query, key, key])),
    }.get(kind)


def layer_weights(model: nn.Module, shape: Shape) -> Iterator[tuple[int, nn.Parameter, Axes]]:
    """(layer, weight, what its axes run over) of all tensors of all layers."""
    family = shape.family
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for name, axes in family.layer_tensors.items():
            yield index, layer.get_parameter(name), axes


def unit_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """The sizes of the tensors of `Units`."""
    heads, neurons = (shape.layers, shape.kv_heads), (shape.layers, shape.ffn)
    return {"heads": heads, "neurons": neurons, "hidden": (shape.hidden,), "layers": heads[:1]}


@contextmanager
def masked(model: PreTrainedModel, masks: Units) -> Iterator[None]:
    """While inside, `model` computes with `masks`; afterwards it is as before.

    A mask is a factor on every unit: 1 keeps it, 0 removes it; a layer's is on what it adds.

    With masks of zeros and ones the model computes what the cut model would: hidden units are
    masked wherever they are written (embeddings, norms, the two writes of a layer), and norms
    take their statistics over the kept units alone.
    """
    family = FAMILIES[model.config.model_type]

    # The hooks index the masks when they run, so that every forward pass has its own graph.
    def mask_inputs(units: Tensor, index: int, module: Any, inputs: tuple[Tensor]) -> Tensor:
        # a head's mask covers its neighbouring inputs, a neuron's just one
        width = inputs[0].shape[-1] // units.shape[1]
        return inputs[0] * units[index].repeat_interleave(width).to(inputs[0].dtype)

    def mask_write(index: int, module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * (masks["hidden"] * masks["layers"][index]).to(output.dtype)

    def mask_embedding(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output * masks["hidden"].to(output.dtype)

    def mask_norm(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return _norm(module, inputs[0], masks["hidden"], family.norm_offset).to(output.dtype)

    def mask_head_norm(index: int, module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        heads = masks["heads"][index]
        mask = heads.repeat_interleave(inputs[0].shape[-1] // len(heads))
        return _norm(module, inputs[0], mask, family.norm_offset).to(output.dtype)

    with ExitStack() as hooks:

        def after(parent: nn.Module, name: str, hook: Any) -> None:
            hooks.enter_context(parent.get_submodule(name).register_forward_hook(hook))

        def before(parent: nn.Module, name: str, hook: Any) -> None:
            hooks.enter_context(parent.get_submodule(name).register_forward_pre_hook(hook))

        for name in family.embeddings:
            after(model, name, mask_embedding)
        after(model, family.final_norm, mask_norm)
        for index, layer in enumerate(model.get_submodule(family.layers).children()):
            for name in family.layer_norms:
                after(layer, name, mask_norm)
            for name in family.head_norms:
                after(layer, name, partial(mask_head_norm, index))
            before(layer, family.head_inputs, partial(mask_inputs, masks["heads"], index))
            before(layer, family.neuron_inputs, partial(mask_inputs, masks["neurons"], index))
            # last: a write may be a norm, whose own hook comes before
            for name in family.writes:
                after(layer, name, partial(mask_write, index))
        yield


def _norm(module: Any, values: Tensor, mask: Tensor, offset: float) -> Tensor:
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
