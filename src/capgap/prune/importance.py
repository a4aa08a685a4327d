"""Importance of heads, neurons, hidden units and layers, by several scores; kept as safetensors
with where they come from."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from capgap.artifact import file_written
from capgap.corpus.text import Text
from capgap.distill.head import HeadInput
from capgap.distill.losses import column_loss
from capgap.errors import UserError
from capgap.models.build import shape_of
from capgap.models.families import Axes
from capgap.models.parts import Parts
from capgap.models.shape import Shape
from capgap.prune import (
    SCORING_WINDOWS,
    Depth,
    Method,
    check_methods,
    layers_by,
    reading_methods,
    scoring_flops,
)
from capgap.prune.units import Units, layer_weights, masked, unit_of_rows, unit_sizes

# Of files: 2 has activations by norm; a scoring begun before has sums of another shape
SCHEMA = 2
UNITS = ("heads", "neurons", "hidden", "layers")
_ORDER_SEED = 3_000_017


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

    Tensors as in an Importance, on the model's device; hidden is [norms, hidden], a row for every
    norm where activations are measured, else one.
    """

    sums: dict[str, Units] = field(default_factory=dict)
    batches: int = 0
    tokens: int = 0


def scoring_batches(
    corpus: Text, tokens: int, *, batch_windows: int = SCORING_WINDOWS, seed: int = 0
) -> list[Tensor]:
    """Windows of a corpus in an order of their own, as batches [batch_windows, window + 1] of about
    `tokens` in all, or of the whole corpus where it has fewer."""
    rows = min(max(1, tokens // corpus.window), corpus.windows)
    indices = corpus.batch(seed=_ORDER_SEED + seed, step=0, batch_windows=rows)
    return list(torch.from_numpy(corpus.train.windows_at(indices)).split(batch_windows))


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

    method, for heads, neurons and hidden units (docs/pruning.md compares them):

    - weights: mean over batches of the sum of |weight x gradient| over a unit's weights (arXiv
      2305.11627); the only one that holds gradients of all weights;
    - first_order: mean over batches of |d loss / d mask|, masks of ones sitting on the units (arXiv
      1905.10650, as in 2311.07052);
    - activation: mean over tokens of a head's output norm, of |neuron|, and of |hidden unit|
      behind the norms that read the stream (arXiv 2407.14679), each norm's over their L2 norm;
    - norm: root of the sum of squares of a unit's weights, without any text;
    - random: the control, drawn by `seed`.

    depth, for layers, by default as the method has it: `first_order`, on masks of what a layer
    adds; `influence`, 1 less the cosine of a layer's input and output (arXiv 2403.03853), which
    `activation` takes too; `ends`, which keeps the middle. `weights` and `norm` sum over a layer.

    Scores are divided by their L2 norm over a layer (heads, neurons) or over all. The model is left
    as it was. `state` are the sums over batches before these, `on_batch` gets them after every one.
    UserError: an unknown method, no batch where text is needed, a loss or weights not finite.
    """
    check_methods(method, depth)
    shape = shape_of(model.config)
    reading = reading_methods(method, depth)
    Parts(model)  # what it tries is no text to be scored
    for name, weight in model.named_parameters():
        # norms hide weights whose squares overflow: activations are 0 then, and finite
        wide = torch.promote_types(weight.dtype, torch.float32)
        _check_finite(torch.linalg.vector_norm(weight, dtype=wide), f"norm of {name}")
    state = state or ScoringState()
    for name in reading:
        norms = shape.layers * len(_input_norms(shape)) if name == "activation" else 1
        state.sums.setdefault(name, _zeros(shape, model.device, norms))
    for windows in batches if reading else ():
        for name in reading:
            result = _READERS[name](model, shape, windows.to(model.device), state.sums[name])
            _check_finite(result, f"result of batch {state.batches}")
        state.batches += 1
        state.tokens += windows[:, 1:].numel()
        on_batch(state)
    if reading and not state.batches:
        raise UserError("importance needs at least one batch of tokens, there was none")
    scores = _scores_by(method, model, shape, state, seed)
    by = layers_by(method, depth)
    layers = (scores if by == method else _scores_by(by, model, shape, state, seed))["layers"]
    if depth == "ends":
        numbers = torch.arange(1, shape.layers + 1)
        layers = torch.minimum(numbers, numbers.flip(0)).float()
    return Importance(
        heads=_normalised(scores["heads"]),
        neurons=_normalised(scores["neurons"]),
        hidden=_normalised(_normalised(scores["hidden"]).sum(0)),
        layers=_normalised(layers),
        tokens=state.tokens,
        flops=scoring_flops(method, depth, shape.parameters().total, state.tokens),
    )


def _check_finite(value: Tensor, what: str) -> None:
    if not torch.isfinite(value):
        raise UserError(f"non-finite {what}: the model to prune is broken, take a sound one")


def _scores_by(
    method: str, model: PreTrainedModel, shape: Shape, state: ScoringState, seed: int
) -> Units:
    if method in state.sums:
        return state.sums[method]
    scores = _zeros(shape, model.device)
    if method == "norm":
        for layer, weight, axes in layer_weights(model, shape):
            _add_by_unit(scores, shape, layer, weight.detach().float().square(), axes)
        return {name: total.sqrt() for name, total in scores.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(zero.shape, generator=generator) for name, zero in scores.items()}


# Readers add what a batch says to the sums, and return a number that is finite if all is well


def _first_order(model: PreTrainedModel, shape: Shape, windows: Tensor, sums: Units) -> Tensor:
    dtype = torch.promote_types(model.dtype, torch.float32)
    masks = {
        unit: torch.ones(size, dtype=dtype, device=model.device, requires_grad=True)
        for unit, size in unit_sizes(shape).items()
    }
    # frozen weights: their gradients would cost a third of the work for nothing
    with _measuring(model, weights=False), masked(model, masks):
        loss = loss_of(model, windows)
        gradients = torch.autograd.grad(loss, list(masks.values()))
    for name, gradient in zip(masks, gradients, strict=True):
        sums[name] += gradient.abs()
    return loss


def _weights(model: PreTrainedModel, shape: Shape, windows: Tensor, sums: Units) -> Tensor:
    with _measuring(model, weights=True):
        tensors = list(layer_weights(model, shape))
        loss = loss_of(model, windows)
        gradients = torch.autograd.grad(loss, [weight for _, weight, _ in tensors])
    for (layer, weight, axes), gradient in zip(tensors, gradients, strict=True):
        worth = (weight.detach().float() * gradient.float()).abs()
        _add_by_unit(sums, shape, layer, worth, axes)
    return loss


def _activations(model: PreTrainedModel, shape: Shape, windows: Tensor, sums: Units) -> Tensor:
    family, norms = shape.family, _input_norms(shape)

    def summed(values: Tensor) -> Tensor:
        """[..., units] over all tokens."""
        return values.flatten(0, -2).sum(0)

    def heads(before: Tensor, after: Any) -> Tensor:
        return summed(before.float().unflatten(-1, (shape.kv_heads, -1)).norm(dim=-1))

    def neurons(before: Tensor, after: Any) -> Tensor:
        return summed(before.float().abs())

    def hidden(before: Tensor, after: Any) -> Tensor:
        return summed(after.float().abs())

    def influence(before: Tensor, after: Any) -> Tensor:
        after = after[0] if isinstance(after, tuple) else after
        return (1 - functional.cosine_similarity(before.float(), after.float(), dim=-1)).sum()

    with ExitStack() as hooks:

        def measure(module: nn.Module, how: Callable[[Tensor, Any], Tensor], total: Tensor) -> None:
            def add(module: nn.Module, inputs: tuple[Tensor], output: Any) -> None:
                total.add_(how(inputs[0], output))

            hooks.enter_context(module.register_forward_hook(add))

        for index, layer in enumerate(model.get_submodule(family.layers).children()):
            measure(layer.get_submodule(family.head_inputs), heads, sums["heads"][index])
            measure(layer.get_submodule(family.neuron_inputs), neurons, sums["neurons"][index])
            for row, name in enumerate(norms, index * len(norms)):
                measure(layer.get_submodule(name), hidden, sums["hidden"][row])
            measure(layer, influence, sums["layers"][index])
        with _measuring(model, weights=False), torch.no_grad():
            return Parts(model)(windows[:, :-1]).sum()


_READERS = {"first_order": _first_order, "weights": _weights, "activation": _activations}


def _input_norms(shape: Shape) -> list[str]:
    """A layer's norms that read the stream, or those that write into it where it has no others: the
    last ones of Gemma 3 write hundreds of times what others read."""
    norms, writes = shape.family.layer_norms, shape.family.writes
    return [name for name in norms if name not in writes] or list(norms)


def _zeros(shape: Shape, device: torch.device, norms: int = 1) -> Units:
    sizes = unit_sizes(shape) | {"hidden": (norms, shape.hidden)}
    return {unit: torch.zeros(size, device=device) for unit, size in sizes.items()}


def _add_by_unit(scores: Units, shape: Shape, layer: int, values: Tensor, axes: Axes) -> None:
    """Adds what a tensor's weights are worth to the units that own its rows, and to its layer."""
    scores["layers"][layer] += values.sum()
    for axis, kind in enumerate(axes):
        owners = unit_of_rows(kind, shape)
        if owners is not None:
            unit, rows = owners
            total = scores[unit][0 if unit == "hidden" else layer]
            by_row = values if values.ndim == 1 else values.sum(1 - axis)
            total += torch.zeros_like(total).index_add_(0, rows.to(total.device), by_row)


@contextmanager
def _measuring(model: PreTrainedModel, *, weights: bool) -> Iterator[None]:
    """Without dropout, with gradients of the weights or without; then as it was.

    Where activations are checkpointed the layers stay in training, because transformers does it
    only there; what lies inside them does not, so that nothing is dropped.
    """
    was_training = [module.training for module in model.modules()]
    had_gradients = [weight.requires_grad for weight in model.parameters()]
    try:
        model.eval().requires_grad_(weights)
        for layer in Parts(model).layers:
            layer.training = getattr(layer, "gradient_checkpointing", False)
        with torch.enable_grad():
            yield
    finally:
        for module, training in zip(model.modules(), was_training, strict=True):
            module.training = training
        for weight, wanted in zip(model.parameters(), had_gradients, strict=True):
            weight.requires_grad_(wanted)


def _normalised(scores: Tensor) -> Tensor:
    """Scores over their L2 norm along the last axis; all-zero scores stay zero."""
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True)
    return (scores / norm.clamp_min(torch.finfo(scores.dtype).tiny)).float().cpu()


def save_importance(path: Path, importance: Importance) -> None:
    """Writes a safetensors file in one step, with the provenance of the scores in its metadata;
    `load_importance` reads it."""
    tensors = {name: getattr(importance, name) for name in UNITS}
    facts = {"tokens": importance.tokens, "flops": importance.flops}
    _save(path, tensors, {"schema": SCHEMA, **facts, "provenance": importance.provenance})


def load_importance(path: Path) -> Importance:
    """What `save_importance` wrote; UserError where there is none or it is no such file."""
    tensors, facts = _load(path)
    if set(tensors) != set(UNITS) or facts.get("schema") != SCHEMA:
        raise UserError(f"{path} holds no scores of units of this version: make it anew")
    return Importance(
        **tensors,
        tokens=facts["tokens"],
        flops=facts["flops"],
        provenance=facts["provenance"],
    )


def save_state(path: Path, state: ScoringState, provenance: dict[str, Any]) -> None:
    """A scoring that is not finished, in one step."""
    tensors = {
        f"{method}.{name}": sums[name].cpu()
        for method, sums in state.sums.items()
        for name in UNITS
    }
    counts = {"batches": state.batches, "tokens": state.tokens}
    _save(path, tensors, {"schema": SCHEMA, **counts, "provenance": provenance})


def load_state(path: Path, provenance: dict[str, Any], device: torch.device) -> ScoringState | None:
    """The scoring to go on from; None where there is none, or one of something else."""
    if not path.exists():
        return None
    tensors, facts = _load(path)
    if facts.get("schema") != SCHEMA or facts["provenance"] != provenance:
        return None
    state = ScoringState(batches=facts["batches"], tokens=facts["tokens"])
    for key, tensor in tensors.items():
        method, _, name = key.partition(".")
        state.sums.setdefault(method, {})[name] = tensor.to(device)
    return state


def _save(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    text = json.dumps(facts, sort_keys=True)
    with file_written(path) as aside:
        save_file(tensors, aside, metadata={"capgap": text, "sha256": _hash(tensors, text)})


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"no file of scores {path}: make one with `capgap score`")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            # copies: what is mapped would keep the file open
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        text = metadata.get("capgap", "{}")
        facts = json.loads(text)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is no file of scores ({error}): make it anew") from None
    if metadata.get("sha256", "") not in ("", _hash(tensors, text)):
        raise UserError(f"{path} is damaged (another sha256 than when it was written): delete it")
    return tensors, facts


def _hash(tensors: dict[str, Tensor], facts: str) -> str:
    whole = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        whole.update(name.encode() + tensors[name].contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()
