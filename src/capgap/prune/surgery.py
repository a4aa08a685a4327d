"""The cut: a smaller plain transformers model from the most important units of a larger one."""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.errors import UserError
from capgap.models.build import shape_of, size_fields
from capgap.models.families import HEAD, Axes
from capgap.models.shape import Shape
from capgap.prune.importance import Importance, score
from capgap.prune.shape import pruned_shape, why_no_cut
from capgap.prune.units import unit_of_rows


@dataclass(frozen=True)
class Kept:
    """Indices of the units that stay, ascending.

    layers [kept layers]; hidden [kept hidden]; heads [kept layers, kept kv_heads] and neurons
    [kept layers, kept ffn], row by row for the kept layers.
    """

    layers: Tensor
    hidden: Tensor
    heads: Tensor
    neurons: Tensor


def choose(importance: Importance, shape: Shape) -> Kept:
    """The most important units that fill `shape`, in their old order.

    Of equally important units the first stay. Heads and neurons are ranked within their layer,
    since a uniform shape keeps as many in each.
    """
    layers = _top(importance.layers, shape.layers)
    return Kept(
        layers=layers,
        hidden=_top(importance.hidden, shape.hidden),
        heads=_top(importance.heads[layers], shape.kv_heads),
        neurons=_top(importance.neurons[layers], shape.ffn),
    )


def _top(scores: Tensor, number: int) -> Tensor:
    """Indices of the `number` largest scores along the last axis, ascending."""
    order = torch.argsort(scores, dim=-1, descending=True, stable=True)
    return order[..., :number].sort(dim=-1).values


def cut(model: PreTrainedModel, importance: Importance, shape: Shape) -> PreTrainedModel:
    """A new model of `shape` from the most important units of `model`, which stays as it is.

    Weights are copied, not rescaled; everything in the config but the sizes is kept; dtype,
    device and training flag are those of `model`.
    Raises UserError if `shape` does not fit inside the model.
    """
    own = shape_of(model.config)
    _check(own, importance, shape)
    kept = choose(importance, shape)
    smaller = _empty_like(model, shape, kept)
    family = own.family
    weights = model.state_dict()
    cuts = {}
    with torch.no_grad():
        for name, axes in family.tensors.items():
            cuts[name] = _select(weights[name], axes, _axis_indices(own, shape, kept, layer=0))
        for new_layer, old_layer in enumerate(kept.layers.tolist()):
            indices = _axis_indices(own, shape, kept, layer=new_layer)
            for name, axes in family.layer_tensors.items():
                weight = weights[f"{family.layers}.{old_layer}.{name}"]
                cuts[f"{family.layers}.{new_layer}.{name}"] = _select(weight, axes, indices)
        if family.scaled_embedding and shape.hidden != own.hidden:
            _keep_scale(cuts, own, shape)
    # strict: a tensor that the family does not name is an error, not a random weight
    smaller.load_state_dict(cuts, strict=True)
    return smaller


def prune(
    model: PreTrainedModel, batches: Iterable[Tensor] | Importance, non_embedding: int
) -> PreTrainedModel:
    """Cut `model` to `non_embedding` parameters, within 2%, normally within 0.5%.

    `batches` are LongTensors [batch, seq + 1] of token ids to measure the importance on, or an
    importance already measured. Raises UserError as `pruned_shape` and `score` do.
    """
    # first the shape: it fails at once where the size is impossible
    shape = pruned_shape(shape_of(model.config), non_embedding)
    importance = batches if isinstance(batches, Importance) else score(model, batches)
    return cut(model, importance, shape)


def _check(own: Shape, importance: Importance, shape: Shape) -> None:
    problem = why_no_cut(own, shape)
    if problem:
        raise UserError(problem)
    measured = (importance.layers.shape[0], importance.heads.shape[1], importance.neurons.shape[1])
    if (*measured, importance.hidden.shape[0]) != (own.layers, own.kv_heads, own.ffn, own.hidden):
        raise UserError("the importance was measured on a model of another shape")


def _empty_like(model: PreTrainedModel, shape: Shape, kept: Kept) -> PreTrainedModel:
    """A model of `shape` with the settings of `model`; its weights are still to be filled."""
    config = copy.deepcopy(model.config)
    for name, value in size_fields(shape).items():
        setattr(config, name, value)
    # a layer keeps its kind: sliding or full attention
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in kept.layers.tolist()]
    with torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).train(model.training)


def _keep_scale(cuts: dict[str, Tensor], own: Shape, shape: Shape) -> None:
    """Such a model multiplies token embeddings by sqrt(hidden), the new one by less: its table
    makes up for it, and where that is the head too, the last norm makes up for the table."""
    family, ratio = own.family, math.sqrt(own.hidden / shape.hidden)
    table, norm = f"{family.embeddings[0]}.weight", f"{family.final_norm}.weight"
    cuts[table] = cuts[table] * ratio
    if own.tied:
        cuts[HEAD] = cuts[table]
        cuts[norm] = (cuts[norm] + family.norm_offset) / ratio - family.norm_offset


def _axis_indices(own: Shape, shape: Shape, kept: Kept, *, layer: int) -> dict[str, Tensor]:
    """For every kind of axis that is cut the rows to keep, in the kept layer number `layer`."""
    units = {"hidden": kept.hidden, "heads": kept.heads[layer], "neurons": kept.neurons[layer]}
    indices = {"words": torch.arange(shape.vocabulary)}
    kinds = {
        kind for axes in (own.family.tensors | own.family.layer_tensors).values() for kind in axes
    }
    for kind in kinds:
        found = unit_of_rows(kind, own)
        if found is not None:
            unit, rows = found
            indices[kind] = torch.isin(rows, units[unit]).nonzero().squeeze(1)
    return indices


def _select(weight: Tensor, axes: Axes, indices: dict[str, Tensor]) -> Tensor:
    for axis, kind in enumerate(axes):
        if kind in indices:
            weight = weight.index_select(axis, indices[kind].to(weight.device))
    return weight
