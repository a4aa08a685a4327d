"""Importance of heads, neurons, hidden units and layers, by several scores."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.errors import UserError
from capgap.models.build import Parts, shape_of
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.prune.units import layer_weights, sums_by_unit, unit_of_rows

Method = Literal["first_order", "weights", "activation", "norm", "random"]
Depth = Literal["first_order", "influence", "ends"]
METHODS = get_args(Method)
DEPTHS = get_args(Depth)
# The method that a depth is measured with; `ends` needs none
DEPTH_METHODS: dict[str, Method] = {"first_order": "first_order", "influence": "activation"}
# Operations of what reads text, by parameter and token: forward, and backward to the activations
# or to the weights too
FLOPS = {"first_order": 4, "weights": 6, "activation": 2}


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


@dataclass(frozen=True)
class Importance:
    """How much the loss depends on each unit, and what it cost to measure.

    heads [layers, kv_heads] and neurons [layers, ffn] have L2 norm 1 in each layer, hidden
    [hidden] and layers [layers] overall; all in float32 on the CPU. `tokens` were scored with
    `flops` floating-point operations.
    """

    heads: Tensor
    neurons: Tensor
    hidden: Tensor
    layers: Tensor
    tokens: int
    flops: int


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


def loss_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean cross-entropy, nats per token, of predicting `windows` [batch, seq + 1]."""
    parts = Parts(model)
    # float32 at least: a sum over the vocabulary in bf16 loses digits
    logits = parts.logits(parts(windows[:, :-1]))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def score(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    method: Method = "first_order",
    depth: Depth | None = None,
    seed: int = 0,
) -> Importance:
    """Importance of every unit of `model`, from batches [batch, seq + 1] of token ids.

    method, for heads, neurons and hidden units:

    - first_order: mean over batches of |d loss / d mask|, masks of ones sitting on the units (arXiv
      1905.10650, as in 2311.07052);
    - weights: mean over batches of the sum of |weight x gradient| over a unit's weights (arXiv
      2305.11627);
    - activation: mean over tokens of a head's output norm, of |neuron|, and of |hidden unit|
      behind the layers' norms (arXiv 2407.14679);
    - norm: root of the sum of squares of a unit's weights, without any text;
    - random: the control, drawn by `seed`.

    depth, for layers, by default as the method has it: `first_order`, on masks of what a layer
    adds; `influence`, 1 less the cosine of a layer's input and output (arXiv 2403.03853), which
    `activation` takes too; `ends`, which keeps the middle: the first and last go first. `weights`
    and `norm` sum over all of a layer's weights.

    Scores are divided by their L2 norm over a layer (heads, neurons) or over all. The model is left
    as it was. Raises UserError for an unknown method, for no batch where text is needed, or a loss
    that is not finite.
    """
    for name, asked, known in (("method", method, METHODS), ("depth", depth, (None, *DEPTHS))):
        if asked not in known:
            told = ", ".join(str(one) for one in known if one)
            raise UserError(f"no importance {name} {asked!r}: take one of {told}")
    shape = shape_of(model.config)
    layers_by = DEPTH_METHODS.get(depth or "", method)
    operations = sum(FLOPS.get(one, 0) for one in {method, layers_by})
    batches = list(batches) if operations else []
    if operations and not batches:
        raise UserError("importance needs at least one batch of tokens, there was none")
    scorers = {
        "first_order": _first_order,
        "weights": _weight_gradients,
        "activation": _activations,
        "norm": _weight_norms,
        "random": lambda *_: _random(shape, seed),
    }
    scores = scorers[method](model, shape, batches)
    if depth == "ends":
        places = torch.arange(shape.layers)
        scores["layers"] = (torch.minimum(places, places.flip(0)) + 1).float()
    elif layers_by != method:
        scores["layers"] = scorers[layers_by](model, shape, batches)["layers"]
    tokens = sum(windows[:, 1:].numel() for windows in batches)
    return Importance(
        **{name: _normalised(scores[name]) for name in ("heads", "neurons", "hidden", "layers")},
        tokens=tokens,
        flops=operations * shape.parameters().total * tokens,
    )


Scores = dict[str, Tensor]


def _first_order(model: PreTrainedModel, shape: Shape, batches: Sequence[Tensor]) -> Scores:
    dtype = torch.promote_types(model.dtype, torch.float32)
    masks = Masks.ones(shape, dtype=dtype, device=model.device)
    for mask in masks.as_list():
        mask.requires_grad_()
    sums = [torch.zeros_like(mask) for mask in masks.as_list()]
    # frozen weights: their gradients would cost a third of the work for nothing
    with _measuring(model, weights=False), masked(model, masks):
        for number, windows in enumerate(batches):
            loss = _sound_loss(model, windows, number)
            gradients = torch.autograd.grad(loss, masks.as_list())
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient.abs()
    return dict(zip(("heads", "neurons", "hidden", "layers"), sums, strict=True))


def _weight_gradients(model: PreTrainedModel, shape: Shape, batches: Sequence[Tensor]) -> Scores:
    scores = _no_scores(shape)
    with _measuring(model, weights=True):
        tensors = list(layer_weights(model, shape))
        for number, windows in enumerate(batches):
            loss = _sound_loss(model, windows, number)
            gradients = torch.autograd.grad(loss, [weight for _, weight, _ in tensors])
            for (layer, weight, axes), gradient in zip(tensors, gradients, strict=True):
                _add_by_unit(scores, shape, layer, (weight * gradient).detach().abs(), axes)
    return scores


def _weight_norms(model: PreTrainedModel, shape: Shape, batches: Sequence[Tensor]) -> Scores:
    scores = _no_scores(shape)
    for layer, weight, axes in layer_weights(model, shape):
        _add_by_unit(scores, shape, layer, weight.detach().float().square(), axes)
    return {name: total.sqrt() for name, total in scores.items()}


def _random(shape: Shape, seed: int) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(zeros.shape, generator=generator)
        for name, zeros in _no_scores(shape).items()
    }


def _activations(model: PreTrainedModel, shape: Shape, batches: Sequence[Tensor]) -> Scores:
    family, scores = shape.family, _no_scores(shape)
    handles = []

    def add(name: str, index: int | None, values: Tensor) -> None:
        """values [..., units], to be summed over tokens"""
        total = scores[name] if index is None else scores[name][index]
        total += values.flatten(0, -2).sum(0).cpu()

    def heads(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            groups = inputs[0].float().unflatten(-1, (shape.kv_heads, -1))
            add("heads", index, groups.norm(dim=-1))

        return hook

    def neurons(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            add("neurons", index, inputs[0].float().abs())

        return hook

    def hidden(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        add("hidden", None, output.float().abs())

    def influence(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosine = functional.cosine_similarity(inputs[0].float(), after.float(), dim=-1)
            scores["layers"][index] += (1 - cosine).sum().cpu()

        return hook

    try:
        for index, layer in enumerate(model.get_submodule(family.layers).children()):
            module = layer.get_submodule(family.head_inputs)
            handles.append(module.register_forward_pre_hook(heads(index)))
            module = layer.get_submodule(family.neuron_inputs)
            handles.append(module.register_forward_pre_hook(neurons(index)))
            for name in family.layer_norms:
                handles.append(layer.get_submodule(name).register_forward_hook(hidden))
            handles.append(layer.register_forward_hook(influence(index)))
        with _measuring(model, weights=False), torch.no_grad():
            for number, windows in enumerate(batches):
                _sound_loss(model, windows, number)
    finally:
        for handle in handles:
            handle.remove()
    return scores


def _no_scores(shape: Shape) -> Scores:
    return {
        "heads": torch.zeros(shape.layers, shape.kv_heads),
        "neurons": torch.zeros(shape.layers, shape.ffn),
        "hidden": torch.zeros(shape.hidden),
        "layers": torch.zeros(shape.layers),
    }


def _add_by_unit(
    scores: Scores, shape: Shape, layer: int, values: Tensor, axes: tuple[str, ...]
) -> None:
    """Adds what a tensor's weights are worth to the units that own its rows, and to its layer."""
    values = values.float().cpu()
    scores["layers"][layer] += values.sum()
    for axis, kind in enumerate(axes):
        found = unit_of_rows(kind, shape)
        if found is not None:
            unit, rows = found
            total = scores[unit] if unit == "hidden" else scores[unit][layer]
            total += sums_by_unit(values, axis, rows, len(total))


@contextmanager
def _measuring(model: PreTrainedModel, *, weights: bool) -> Iterator[None]:
    """Evaluation, with gradients of the weights or without; then as it was."""
    was_training = model.training
    asked = [weight.requires_grad for weight in model.parameters()]
    try:
        model.eval().requires_grad_(weights)
        with torch.enable_grad():
            yield
    finally:
        model.train(was_training)
        for weight, wanted in zip(model.parameters(), asked, strict=True):
            weight.requires_grad_(wanted)


def _sound_loss(model: PreTrainedModel, windows: Tensor, number: int) -> Tensor:
    loss = loss_of(model, windows.to(model.device))
    if not torch.isfinite(loss):
        raise UserError(
            f"the loss on importance batch {number} is {loss.item()}: the model to prune is "
            "broken, take a sound one"
        )
    return loss


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their L2 norm along the last axis; all-zero scores stay zero."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return (scores / norm.clamp_min(torch.finfo(scores.dtype).tiny)).float().cpu()
