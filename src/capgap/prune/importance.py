"""Importance of heads, neurons, hidden units and layers: first order, on masks of ones."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.errors import UserError
from capgap.models.build import Parts, shape_of
from capgap.models.families import FAMILIES
from capgap.models.shape import Shape
from capgap.sizes import scoring_flops


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


def score(model: PreTrainedModel, batches: Iterable[Tensor]) -> Importance:
    """First-order importance of every unit of `model` (arXiv 1905.10650, as in 2311.07052).

    Masks of ones sit on the units; a unit's importance is the mean over `batches` (LongTensors
    [batch, seq + 1] of token ids) of |d loss / d mask|, divided by the L2 norm over its layer
    (heads, neurons) or over all (hidden units, layers). The model is left as it was.

    Raises UserError if there is no batch, or a loss is not finite.
    """
    shape = shape_of(model.config)
    dtype = torch.promote_types(model.dtype, torch.float32)
    masks = Masks.ones(shape, dtype=dtype, device=model.device)
    for mask in masks.as_list():
        mask.requires_grad_()
    sums = [torch.zeros_like(mask) for mask in masks.as_list()]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    was_training = model.training
    num_batches = tokens = 0
    try:
        model.eval()
        # frozen weights: their gradients would cost a third of the work for nothing
        for weight in trained:
            weight.requires_grad_(False)
        with masked(model, masks), torch.enable_grad():
            for windows in batches:
                windows = windows.to(model.device)
                loss = loss_of(model, windows)
                if not torch.isfinite(loss):
                    raise UserError(
                        f"the loss on importance batch {num_batches} is {loss.item()}: the model "
                        "to prune is broken, take a sound one"
                    )
                gradients = torch.autograd.grad(loss, masks.as_list())
                for total, gradient in zip(sums, gradients, strict=True):
                    total += gradient.abs()
                num_batches += 1
                tokens += windows[:, 1:].numel()
    finally:
        model.train(was_training)
        for weight in trained:
            weight.requires_grad_()
    if num_batches == 0:
        raise UserError("importance needs at least one batch of tokens, there was none")
    heads, neurons, hidden, layers = (_normalised(total / num_batches) for total in sums)
    flops = scoring_flops(shape.parameters().total, tokens)
    return Importance(heads, neurons, hidden, layers, tokens=tokens, flops=flops)


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their L2 norm along the last axis; all-zero scores stay zero."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return (scores / norm.clamp_min(torch.finfo(scores.dtype).tiny)).float().cpu()
