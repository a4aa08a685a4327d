"""The cut: a smaller plain transformers model from the most important units of a larger one."""

import copy
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from capgap.errors import UserError, border
from capgap.models.build import shape_of, size_fields
from capgap.models.families import HEAD, Axes
from capgap.models.shape import Shape, why_no_cut
from capgap.models.stored import StoredWeights, empty_model
from capgap.prune import Method
from capgap.prune.importance import Importance, score
from capgap.prune.units import Units, unit_of_rows


def choose(importance: Importance, shape: Shape) -> Units:
    """The indices of the most important units that fill `shape`, in their old order; of heads and
    neurons row by row for the kept layers.

    Of equally important units the first stay. Heads and neurons are ranked within their layer,
    since a uniform shape keeps as many in each.
    """

    def top(scores: Tensor, number: int) -> Tensor:
        order = torch.argsort(scores, dim=-1, descending=True, stable=True)
        return order[..., :number].sort(dim=-1).values

    layers = top(importance.layers, shape.layers)
    return {
        "layers": layers,
        "hidden": top(importance.hidden, shape.hidden),
        "heads": top(importance.heads[layers], shape.kv_heads),
        "neurons": top(importance.neurons[layers], shape.ffn),
    }


def score_lost(importance: Importance) -> Callable[[Shape], float]:
    """How much score a shape gives up: minus the logarithm of the share that stays, multiplied over
    layers, hidden units, heads and neurons (of these two the mean over layers)."""

    def shares(scores: Tensor) -> Tensor:
        """Share of all score that the 0, 1, 2, ... most important units have, [units + 1]."""
        ranked = scores.reshape(-1, scores.shape[-1]).double().sort(-1, descending=True).values
        kept = (ranked.cumsum(-1) / ranked.sum(-1, keepdim=True)).mean(0)
        return torch.cat([kept.new_zeros(1), kept])

    units = {"layers": "layers", "hidden": "hidden", "kv_heads": "heads", "ffn": "neurons"}
    by_size = {size: shares(getattr(importance, unit)) for size, unit in units.items()}

    def lost(shape: Shape) -> float:
        return -sum(math.log(kept[getattr(shape, name)]) for name, kept in by_size.items())

    return lost


def cut(model: PreTrainedModel, importance: Importance, shape: Shape) -> PreTrainedModel:
    """A new model of `shape` from the most important units of `model`, which stays as it is;
    plain transformers loads it.

    Weights are copied, not rescaled; everything in the config but the sizes is kept; dtype,
    device and training flag are those of `model`.
    Raises UserError if `shape` does not fit inside the model.
    """
    own = shape_of(model.config)
    check_cut(own, importance, shape)
    kept = choose(importance, shape)
    surgery = Surgery(own, shape, kept)
    with torch.random.fork_rng(devices=[]):
        smaller = AutoModelForCausalLM.from_config(
            cut_config(model.config, shape, kept["layers"].tolist()),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    smaller.generation_config = copy.deepcopy(model.generation_config)
    weights = model.state_dict()
    with torch.no_grad():
        cuts = {name: surgery.tensor(name, weights) for name in surgery.sources}
    if own.tied:
        cuts[HEAD] = cuts[f"{own.family.embeddings[0]}.weight"]
    # strict: a tensor that the family does not name is an error, not a random weight
    smaller.load_state_dict(cuts, strict=True)
    return smaller.to(model.device).train(model.training)


def cut_config(config: PreTrainedConfig, shape: Shape, layers: Sequence[int]) -> PreTrainedConfig:
    """A copy of `config` that says the sizes of `shape`; these layers stay."""
    config = copy.deepcopy(config)
    for name, value in size_fields(shape).items():
        setattr(config, name, value)
    # a layer keeps its kind: sliding or full attention, with rotary positions or without
    for name in ("layer_types", "no_rope_layers"):
        kinds = getattr(config, name, None)
        if kinds:
            setattr(config, name, [kinds[layer] for layer in layers])
    return config


def check_cut_config(config: PreTrainedConfig, shape: Shape) -> None:
    """UserError where transformers would not take the config of a cut: it is written, read and
    built, without weights."""
    heads = f"{shape.heads} heads of {shape.head_size}"
    what = f"transformers takes no {shape.architecture} model of hidden {shape.hidden}, {heads}"
    with border(what), tempfile.TemporaryDirectory() as folder:
        cut_config(config, shape, range(shape.layers)).save_pretrained(folder)
        empty_model(AutoConfig.from_pretrained(folder))


def check_cut(own: Shape, importance: Importance, shape: Shape) -> None:
    """UserError if `shape` is no cut of `own`, or the importance is of another model."""
    problem = why_no_cut(own, shape)
    if problem:
        raise UserError(problem)
    measured = (*importance.heads.shape, importance.neurons.shape[1], len(importance.hidden))
    if measured != (own.layers, own.kv_heads, own.ffn, own.hidden):
        raise UserError(
            "the scores were measured on a model of another shape: make some of this one with "
            "`capgap score`"
        )


class Origin(NamedTuple):
    """Where a tensor of the cut model comes from: a name in the whole model, what its axes run
    over, and the layer of the cut model it belongs to (0 for those outside of layers)."""

    name: str
    axes: Axes
    layer: int


class Surgery:
    """The tensors of the cut model, each made from one tensor of the whole model.

    sources: of every tensor of the cut model, by name; a tied head is not among them.
    """

    def __init__(self, own: Shape, shape: Shape, kept: Units) -> None:
        self.own = own
        self.shape = shape
        self.kept = kept
        family = own.family
        self.sources = {name: Origin(name, axes, 0) for name, axes in family.tensors.items()}
        if own.tied:
            del self.sources[HEAD]
        for layer, old_layer in enumerate(kept["layers"].tolist()):
            for name, axes in family.layer_tensors.items():
                source = Origin(f"{family.layers}.{old_layer}.{name}", axes, layer)
                self.sources[f"{family.layers}.{layer}.{name}"] = source

    def tensor(self, name: str, weights: dict[str, Tensor] | StoredWeights) -> Tensor:
        """The tensor `name` of the cut model, in memory of its own."""
        source = self.sources[name]
        whole = weights[source.name]
        weight = whole
        for axis, kind in enumerate(source.axes):
            rows = self._rows(kind, source.layer)
            if rows is not None:
                weight = weight.index_select(axis, rows.to(weight.device))
        return self._rescaled(name, whole.clone() if weight is whole else weight)

    def _rows(self, kind: str, layer: int) -> Tensor | None:
        """The rows that stay of an axis that runs over `kind`; None where all do."""
        if kind == "vocabulary":
            return torch.arange(self.shape.vocabulary)
        owners = unit_of_rows(kind, self.own)
        if owners is None:
            return None
        unit, units_of_rows = owners
        kept = self.kept[unit] if unit == "hidden" else self.kept[unit][layer]
        return torch.isin(units_of_rows, kept).nonzero().squeeze(1)

    def _rescaled(self, name: str, weight: Tensor) -> Tensor:
        """Some models multiply token embeddings by sqrt(hidden), the cut one by less: its table
        makes up for it, and where that is the head too, the last norm makes up for the table."""
        family, own = self.own.family, self.own
        if not family.scaled_embedding or self.shape.hidden == own.hidden:
            return weight
        ratio = math.sqrt(own.hidden / self.shape.hidden)
        if name == f"{family.embeddings[0]}.weight":
            return weight * ratio
        if own.tied and name == f"{family.final_norm}.weight":
            return (weight + family.norm_offset) / ratio - family.norm_offset
        return weight


def prune_model(
    model: PreTrainedModel, params: str | int, batches: Iterable[Tensor] | Importance | None = None
) -> PreTrainedModel:
    """A smaller model of `params` parameters, "300M" without embeddings or "360M total" with them,
    within 1%, normally 0.5%.

    `batches` are LongTensors [batch, seq + 1] of token ids to measure the importance of units on,
    or an importance already measured; without any the weights' norms decide, which is worse
    (docs/pruning.md). Raises UserError as `pruned_shape` and `score` do.
    """
    # a worker of a sweep is given its shapes: only here one is looked for
    from capgap.prune.shape import pruned_shape

    # first the shape: it fails at once where the size is impossible
    shape = pruned_shape(shape_of(model.config), params)
    if not isinstance(batches, Importance):
        method: Method = "norm" if batches is None else "activation"
        batches = score(model, batches or (), method=method)
    return cut(model, batches, shape)
