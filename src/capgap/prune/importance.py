"""Importance of heads, neurons, hidden units and layers, by several scores."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.errors import UserError
from capgap.models.build import shape_of
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.prune.masks import Masks, masked
from capgap.prune.methods import (
    Depth,
    Method,
    check_methods,
    layers_by,
    reading_methods,
    scoring_flops,
)
from capgap.prune.units import layer_weights, sums_by_unit, unit_of_rows

UNITS = ("heads", "neurons", "hidden", "layers")
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Importance:
    """How much the loss depends on each unit, and what it cost to measure.

    heads [layers, kv_heads] and neurons [layers, ffn] have L2 norm 1 in each layer, hidden
    [hidden] and layers [layers] overall; all in float32 on the CPU. `tokens` were scored with
    `flops` floating-point operations. `provenance` says of what model, text and method.
    """

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    layers: Tensor
    tokens: int
    flops: int
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class ScoringState:
    """Sums over the batches read so far, by method and unit: a scoring that stops goes on from it.

    The tensors have the shapes of an Importance, float32 on the model's device; hidden is [places,
    hidden], a row for every place where it is measured (every norm for activations, else one).
    """

    sums: dict[str, Scores] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0


def loss_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean cross-entropy, nats per token, of predicting `windows` [batch, seq + 1]."""
    targets = windows[:, 1:].flatten()
    source = HeadInput.of(Parts(model), windows[:, :-1])
    # chunk by chunk: all logits of a batch at once take gigabytes where the vocabulary is large
    return column_loss([source], targets, alphas=[0.0]).students[0].loss / len(targets)


def score(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    method: Method = "activation",
    depth: Depth | None = None,
    seed: int = 0,
    state: ScoringState | None = None,
    on_batch: Callable[[ScoringState], None] = lambda state: None,
) -> Importance:
    """Importance of every unit of `model`, from batches [batch, seq + 1] of token ids.

    method, for heads, neurons and hidden units:

    - weights: mean over batches of the sum of |weight x gradient| over a unit's weights (arXiv
      2305.11627); the only one that holds gradients of all weights;
    - first_order: mean over batches of |d loss / d mask|, masks of ones sitting on the units (arXiv
      1905.10650, as in 2311.07052); the best right after the cut;
    - activation: mean over tokens of a head's output norm, of |neuron|, and of |hidden unit|
      behind the norms that read the stream (arXiv 2407.14679), each norm's over their L2 norm; what
      serves best on models that others made (docs/pruning.md), and the cheapest that reads text;
    - norm: root of the sum of squares of a unit's weights, without any text;
    - random: the control, drawn by `seed`.

    depth, for layers, by default as the method has it: `first_order`, on masks of what a layer
    adds; `influence`, 1 less the cosine of a layer's input and output (arXiv 2403.03853), which
    `activation` takes too; `ends`, which keeps the middle: the first and last go first. `weights`
    and `norm` sum over all of a layer's weights.

    Scores are divided by their L2 norm over a layer (heads, neurons) or over all. The model is left
    as it was. `state` are the sums over batches before these, `on_batch` is told of them after
    every batch. Raises UserError for an unknown method, for no batch where text is needed, or a
    loss or weights that are not finite.
    """
    check_methods(method, depth)
    shape = shape_of(model.config)
    reading = reading_methods(method, depth)
    Parts(model)  # what it tries is no text to be scored
    for name, weight in model.named_parameters():
        # norms hide weights whose squares overflow: activations are 0 then, and finite
        wide = torch.promote_types(weight.dtype, torch.float32)
        if not torch.isfinite(torch.linalg.vector_norm(weight, dtype=wide)):
            raise UserError(
                f"non-finite norm of {name}: the model to prune is broken, take a sound one"
            )
    state = state or ScoringState()
    for name in reading:
        measured = shape.layers * len(_input_norms(shape)) if name == "activation" else 1
        state.sums.setdefault(name, _no_scores(shape, model.device, measured))
    for windows in batches if reading else ():
        for name in reading:
            _READERS[name](model, shape, windows.to(model.device), state)
        state.batches += 1
        state.tokens += windows[:, 1:].numel()
        on_batch(state)
    if reading and not state.batches:
        raise UserError("importance needs at least one batch of tokens, there was none")
    scores = dict(_scores_by(method, model, shape, state, seed))
    if depth == "ends":
        places = torch.arange(shape.layers)
        scores["layers"] = (torch.minimum(places, places.flip(0)) + 1).float()
    else:
        by = layers_by(method, depth)
        scores["layers"] = _scores_by(by, model, shape, state, seed)["layers"]
    return Importance(
        heads=_normalised(scores["heads"]),
        neurons=_normalised(scores["neurons"]),
        hidden=_normalised(_normalised(scores["hidden"]).sum(0)),
        layers=_normalised(scores["layers"]),
        tokens=state.tokens,
        flops=scoring_flops(method, depth, shape.parameters().total, state.tokens),
    )


def _scores_by(
    method: str, model: PreTrainedModel, shape: Shape, state: ScoringState, seed: int
) -> Scores:
    if method in state.sums:
        return state.sums[method]
    return _weight_norms(model, shape) if method == "norm" else _random(shape, seed)


def _first_order(
    model: PreTrainedModel, shape: Shape, windows: Tensor, state: ScoringState
) -> None:
    dtype = torch.promote_types(model.dtype, torch.float32)
    masks = Masks.ones(shape, dtype=dtype, device=model.device)
    for mask in masks.as_list():
        mask.requires_grad_()
    # frozen weights: their gradients would cost a third of the work for nothing
    with _measuring(model, weights=False), masked(model, masks):
        loss = _sound_loss(model, windows, state)
        gradients = torch.autograd.grad(loss, masks.as_list())
    for name, gradient in zip(UNITS, gradients, strict=True):
        state.sums["first_order"][name] += gradient.abs()


def _weight_gradients(
    model: PreTrainedModel, shape: Shape, windows: Tensor, state: ScoringState
) -> None:
    with _measuring(model, weights=True):
        tensors = list(layer_weights(model, shape))
        loss = _sound_loss(model, windows, state)
        gradients = torch.autograd.grad(loss, [weight for _, weight, _ in tensors])
    for (layer, weight, axes), gradient in zip(tensors, gradients, strict=True):
        worth = (weight.detach().float() * gradient.float()).abs()
        _add_by_unit(state.sums["weights"], shape, layer, worth, axes)


def _activations(
    model: PreTrainedModel, shape: Shape, windows: Tensor, state: ScoringState
) -> None:
    family, scores = shape.family, state.sums["activation"]
    handles = []

    def add(name: str, index: int, values: Tensor) -> None:
        """values [..., units], to be summed over tokens"""
        scores[name][index] += values.flatten(0, -2).sum(0)

    def heads(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            groups = inputs[0].float().unflatten(-1, (shape.kv_heads, -1))
            add("heads", index, groups.norm(dim=-1))

        return hook

    def neurons(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            add("neurons", index, inputs[0].float().abs())

        return hook

    def hidden(place: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            add("hidden", place, output.float().abs())

        return hook

    def influence(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            scores["layers"][index] += (1 - cosine).sum()

        return hook

    norms = _input_norms(shape)
    try:
        for index, layer in enumerate(model.get_submodule(family.layers).children()):
            module = layer.get_submodule(family.head_inputs)
            handles.append(module.register_forward_pre_hook(heads(index)))
            module = layer.get_submodule(family.neuron_inputs)
            handles.append(module.register_forward_pre_hook(neurons(index)))
            for place, name in enumerate(norms, index * len(norms)):
                handles.append(layer.get_submodule(name).register_forward_hook(hidden(place)))
            handles.append(layer.register_forward_hook(influence(index)))
        with _measuring(model, weights=False), torch.no_grad():
            _check_sound(Parts(model)(windows[:, :-1]).sum(), state)
    finally:
        for handle in handles:
            handle.remove()


_READERS = {
    "first_order": _first_order,
    "weights": _weight_gradients,
    "activation": _activations,
}


def _weight_norms(model: PreTrainedModel, shape: Shape) -> Scores:
    scores = _no_scores(shape, model.device)
    for layer, weight, axes in layer_weights(model, shape):
        _add_by_unit(scores, shape, layer, weight.detach().float().square(), axes)
    return {name: total.sqrt() for name, total in scores.items()}


def _random(shape: Shape, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(zeros.shape, generator=generator)
        for name, zeros in _no_scores(shape, torch.device("cpu")).items()
    }


def _input_norms(shape: Shape) -> list[str]:
    """A layer's norms that read the stream, or those that write into it where it has no others.

    What the last layers of Gemma 3 write is hundreds of times what all others read.
    """
    norms, writes = shape.family.layer_norms, shape.family.writes
    return [name for name in norms if name not in writes] or list(norms)


def _no_scores(shape: Shape, device: torch.device, places: int = 1) -> Scores:
    return {
        "heads": torch.zeros(shape.layers, shape.kv_heads, device=device),
        "neurons": torch.zeros(shape.layers, shape.ffn, device=device),
        "hidden": torch.zeros(places, shape.hidden, device=device),
        "layers": torch.zeros(shape.layers, device=device),
    }


def _add_by_unit(
    scores: Scores, shape: Shape, layer: int, values: Tensor, axes: tuple[str, ...]
) -> None:
    """Adds what a tensor's weights are worth to the units that own its rows, and to its layer."""
    scores["layers"][layer] += values.sum()
    for axis, kind in enumerate(axes):
        found = unit_of_rows(kind, shape)
        if found is not None:
            unit, rows = found
            total = scores[unit][0 if unit == "hidden" else layer]
            total += sums_by_unit(values, axis, rows, len(total))


@contextmanager
def _measuring(model: PreTrainedModel, *, weights: bool) -> Iterator[None]:
    """Without dropout, with gradients of the weights or without; then as it was.

    Where activations are checkpointed the layers stay in training, because transformers does it
    only there; what lies inside them does not, so that nothing is dropped.
    """
    was_training = [module.training for module in model.modules()]
    asked = [weight.requires_grad for weight in model.parameters()]
    try:
        model.eval().requires_grad_(weights)
        for layer in Parts(model).layers:
            layer.training = getattr(layer, "gradient_checkpointing", False)
        with torch.enable_grad():
            yield
    finally:
        for module, training in zip(model.modules(), was_training, strict=True):
            module.training = training
        for weight, wanted in zip(model.parameters(), asked, strict=True):
            weight.requires_grad_(wanted)


def _sound_loss(model: PreTrainedModel, windows: Tensor, state: ScoringState) -> Tensor:
    loss = loss_of(model, windows)
    _check_sound(loss, state)
    return loss


def _check_sound(value: Tensor, state: ScoringState) -> None:
    if not torch.isfinite(value):
        raise UserError(
            f"importance batch {state.batches} gives {value.item()}: the model to prune is broken, "
            "take a sound one"
        )


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their L2 norm along the last axis; all-zero scores stay zero."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return (scores / norm.clamp_min(torch.finfo(scores.dtype).tiny)).float().cpu()
