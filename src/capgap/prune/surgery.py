"""The cut: a smaller plain transformers model from the most important units of a larger one."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from capgap.errors import UserError
from capgap.models.build import shape_of, size_fields
from capgap.models.shape import Shape
from capgap.prune.importance import Importance, score
from capgap.prune.layout import LAYOUTS, Axes
from capgap.prune.shape import pruned_shape, why_no_cut


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
    smaller = _empty_like(model, shape)
    kept = choose(importance, shape)
    layout = LAYOUTS[own.architecture]
    weights = model.state_dict()
    cuts = {}
    with torch.no_grad():
        for name, axes in layout.tensors.items():
            cuts[name] = _select(weights[name], axes, _axis_indices(own, shape, kept, layer=0))
        for new_layer, old_layer in enumerate(kept.layers.tolist()):
            indices = _axis_indices(own, shape, kept, layer=new_layer)
            for name, axes in layout.layer_tensors.items():
                weight = weights[f"{layout.layers}.{old_layer}.{name}"]
                cuts[f"{layout.layers}.{new_layer}.{name}"] = _select(weight, axes, indices)
    # strict: a tensor that the layout does not name is an error, not a random weight
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


def _empty_like(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """A model of `shape` with the settings of `model`; its weights are still to be filled."""
    config = copy.deepcopy(model.config)
    for name, value in size_fields(shape).items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(
            config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
        )
    smaller.generation_config = copy.deepcopy(model.generation_config)
    return smaller.to(model.device).train(model.training)


def _axis_indices(own: Shape, shape: Shape, kept: Kept, *, layer: int) -> dict[str, Tensor]:
    """For every kind of axis the indices to keep, in the kept layer number `layer`."""
    heads = kept.heads[layer]
    one_kind = _blocks(heads, own.head_size)
    return {
        "words": torch.arange(shape.vocabulary),
        "hidden": kept.hidden,
        "neurons": kept.neurons[layer],
        "query": _blocks(heads, own.heads // own.kv_heads * own.head_size),
        "key": one_kind,
        "head_qkv": _blocks(heads, 3 * own.head_size),
        "qkv_head": torch.cat([one_kind + kind * own.hidden for kind in range(3)]),
    }


def _blocks(indices: Tensor, width: int) -> Tensor:
    """Positions covered by blocks of `width`: [1, 3] and 2 -> [2, 3, 6, 7]."""
    return (indices[:, None] * width + torch.arange(width)).flatten()


def _select(weight: Tensor, axes: Axes, indices: dict[str, Tensor]) -> Tensor:
    for axis, kind in enumerate(axes):
        if kind != "all":
            weight = weight.index_select(axis, indices[kind].to(weight.device))
    return weight
