"""Which unit every row of a tensor's axis belongs to."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from capgap.models.shape import Shape


def unit_of_rows(kind: str, shape: Shape) -> tuple[str, Tensor] | None:
    """For an axis that runs over `kind` (see models/families.py) what its units are called in an
    Importance (heads, neurons or hidden), and the unit of each row [rows].

    None where no unit is cut. A head is a key-value head with all its query heads.
    """
    heads, size = torch.arange(shape.kv_heads), shape.head_size
    query = heads.repeat_interleave(shape.heads // shape.kv_heads * size)
    key = heads.repeat_interleave(size)
    neurons = torch.arange(shape.ffn)
    return {
        "hidden": ("hidden", torch.arange(shape.hidden)),
        "neurons": ("neurons", neurons),
        "gate_up": ("neurons", neurons.repeat(2)),
        "query": ("heads", query),
        "key": ("heads", key),
        "head_qkv": ("heads", heads.repeat_interleave(3 * size)),
        "qkv": ("heads", torch.cat([query, key, key])),
    }.get(kind)


def sums_by_unit(values: Tensor, axis: int, rows: Tensor, units: int) -> Tensor:
    """Sums of `values` over all axes but one, then over the rows of every unit, [units]."""
    others = [other for other in range(values.ndim) if other != axis]
    by_row = values.sum(others) if others else values
    return by_row.new_zeros(units).index_add_(0, rows.to(by_row.device), by_row)


def layer_weights(
    model: nn.Module, shape: Shape
) -> Iterator[tuple[int, nn.Parameter, tuple[str, ...]]]:
    """(layer, weight, what its axes run over) of all tensors of all layers."""
    family = shape.family
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        for name, axes in family.layer_tensors.items():
            yield index, layer.get_parameter(name), axes
