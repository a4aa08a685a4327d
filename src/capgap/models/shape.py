"""The shape of a model: its sizes, its parameters by part, and the ladder. Imports no torch."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any

from capgap.errors import UserError
from capgap.models.families import FAMILIES, HEAD, Family, Tensors
from capgap.sizes import ParameterCounts, format_count, parse_size

ARCHITECTURES = tuple(FAMILIES)

_SMALLEST_HIDDEN = 16
_SMALLEST_LAYERS = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal language model whose layers are all alike.

    `heads` query heads share `kv_heads` key-value heads; `head_size` is the width of one head;
    `positions` is the longest sequence; `tied` says that the head is the token table.
    Raises UserError if transformers could not build it.
    """

    architecture: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    vocabulary: int
    positions: int
    tied: bool

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise UserError(f"impossible {self.architecture} shape: {problem}")

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @property
    def axis_sizes(self) -> dict[str, int]:
        """The sizes of the axes of tensors, as `capgap.models.families` names them."""
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "hidden": self.hidden,
            "neurons": self.ffn,
            "gate_up": 2 * self.ffn,
            "query": query,
            "key": key,
            "head_qkv": 3 * query,
            "qkv": query + 2 * key,
            "head": self.head_size,
            "vocabulary": self.vocabulary,
            "positions": self.positions,
        }

    def parameters(self) -> ParameterCounts:
        """Parameters by part, exactly those of the built model."""
        family, sizes = self.family, self.axis_sizes
        head = _count({HEAD: family.tables[HEAD]}, sizes)
        return ParameterCounts(
            embedding=_count(family.tables, sizes) - head,
            attention=self.layers * _count(family.attention, sizes),
            ffn=self.layers * _count(family.ffn, sizes),
            norms=self.layers * _count(family.norms(*family.layer_norms), sizes)
            + _count(family.norms(family.final_norm), sizes),
            head=0 if self.tied else head,
        )

    def ffn_for(self, non_embedding: int, layers: int) -> float:
        """The FFN width that gives so many layers of this shape `non_embedding` parameters; not
        rounded, may be negative."""
        family, sizes = self.family, self.axis_sizes

        def layer(neurons: int) -> int:
            widths = sizes | {"neurons": neurons, "gate_up": 2 * neurons}
            return _count(family.layer_tensors, widths)

        bare, final_norm = layer(0), _count(family.norms(family.final_norm), sizes)
        return (non_embedding - layers * bare - final_norm) / (layers * (layer(1) - bare))


def _problem(shape: Shape) -> str | None:
    if shape.architecture not in ARCHITECTURES:
        return f"the architecture must be one of {', '.join(ARCHITECTURES)}"
    for name, size in vars(shape).items():
        if name not in ("architecture", "tied") and size < 1:
            return f"{name} is {size}, it must be at least 1"
    family, hidden, size = shape.family, shape.hidden, shape.head_size
    heads, kv_heads = shape.heads, shape.kv_heads
    if not family.learns_positions and size % 2:
        return f"head_size {size} is odd, rotary positions need an even one"
    if not family.grouped_heads and heads != kv_heads:
        return f"kv_heads {kv_heads} must equal heads {heads}"
    if heads % kv_heads:
        return f"{heads} heads do not share {kv_heads} kv_heads evenly"
    if not family.free_width and hidden != heads * size:
        return f"hidden {hidden} must be heads x head_size = {heads} x {size}"
    if hidden % heads:
        # transformers refuses it, although the head size is a field of its own
        return f"hidden {hidden} is no multiple of {heads} heads"
    return None


def why_no_cut(own: Shape, shape: Shape) -> str | None:
    """Why a model of shape `own` cannot be cut to `shape`; None if it can."""
    for name in ("architecture", "head_size", "positions", "tied"):
        wanted, size = getattr(shape, name), getattr(own, name)
        if wanted != size:
            return f"cannot cut to {name} {wanted}: pruning keeps the model's {name} {size}"
    for name in ("hidden", "layers", "kv_heads", "ffn", "vocabulary"):
        wanted, size = getattr(shape, name), getattr(own, name)
        if wanted > size:
            return f"cannot cut to {name} {wanted}: the model has only {size}"
    if shape.heads * own.kv_heads != own.heads * shape.kv_heads:
        return (
            f"cannot cut to {shape.heads} heads on {shape.kv_heads} kv_heads: the model has "
            f"{own.heads // own.kv_heads} heads on each"
        )
    return None


def _count(tensors: Tensors, sizes: dict[str, int]) -> int:
    return sum(math.prod(sizes[axis] for axis in axes) for axes in tensors.values())


def power_of_two_within(limit: float) -> int:
    """The largest power of two that is not above `limit`; 1 for a limit below 2."""
    return int(2 ** math.floor(math.log2(limit))) if limit >= 2 else 1


def smallest_ladder_size(layers: int | None = None) -> int:
    """The smallest non-embedding count that has a ladder shape, of so many layers."""
    return 12 * (layers or _SMALLEST_LAYERS) * _SMALLEST_HIDDEN**2


def ladder_size(architecture: str, size: int | str, **rows: Any) -> int:
    """Non-embedding parameters of a ladder's model of a size: these, or all, as "360M total".

    rows as in `ladder_shape`. Raises UserError where not even the smallest has so few.
    """
    parameters, is_total = parse_size(size)
    if not is_total:
        return parameters
    sizes = range(smallest_ladder_size(rows.get("layers")), parameters)
    found = bisect_left(
        sizes,
        parameters,
        key=lambda one: ladder_shape(architecture, one, **rows).parameters().total,
    )
    if not found:
        least = ladder_shape(architecture, sizes.start, **rows).parameters().total
        raise UserError(
            f"{size} is too few for {rows['vocabulary']:,} tokens: the smallest {architecture} "
            f"model has {least} ({format_count(least)})"
        )
    return sizes[found - 1]


def ladder_shape(
    architecture: str,
    non_embedding: int,
    *,
    vocabulary: int,
    positions: int,
    layers: int | None = None,
) -> Shape:
    """The model of a ladder with `non_embedding` parameters and tied embeddings.

    The count is met within 0.5% (1% below 20k). The rule, with S the wanted count:
    - layers = 12 (S / 85M)^0.23, at least 2, unless `layers` says it: 2 at 50k, 12 at 85M (GPT-2
      small), 33 at 7B. Depth grows slowly, since few wide layers are quicker on a CPU;
    - a layer has about 12 hidden^2 parameters, so hidden* = sqrt(S / (12 layers));
    - heads of size 16 up to hidden* 192, 32 up to 512, 64 up to 2048, then 128. Their number is
      hidden* / size rounded, at least 2;
    - families whose head size is a field of its own take the multiple of heads nearest to hidden*.
      A student cut out of any teacher of the same head size then has the ladder's own shape;
    - for the others hidden = heads x size, and the size is moved in eighths of itself, so that
      neighbours on the ladder look alike;
    - the FFN takes what is left, in multiples of a power of two of at most hidden/32.
    Raises UserError if the architecture is unknown or the count too small.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"unknown architecture {architecture!r}: take one of {', '.join(ARCHITECTURES)}"
        )
    smallest = smallest_ladder_size(layers)
    if non_embedding < smallest:
        deep = "" if layers is None else f" of {layers} layers"
        raise UserError(
            f"{non_embedding} non-embedding parameters are too few for a {architecture} model"
            f"{deep}: the smallest has {smallest} ({format_count(smallest)})"
        )
    layers = layers or max(_SMALLEST_LAYERS, round(12 * (non_embedding / 85e6) ** 0.23))
    wanted_hidden = math.sqrt(non_embedding / (12 * layers))
    head_size = next(
        (size for size, limit in ((16, 192), (32, 512), (64, 2048)) if wanted_hidden < limit), 128
    )
    heads = max(2, round(wanted_hidden / head_size))
    if FAMILIES[architecture].free_width:
        step = math.lcm(heads, max(2, power_of_two_within(wanted_hidden / 64)))
        hidden = step * round(wanted_hidden / step)
    else:
        step = head_size // 8
        head_size = max(step, step * round(wanted_hidden / heads / step))
        hidden = heads * head_size
    grain = power_of_two_within(hidden / 32)
    shape = Shape(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
        ffn=grain,
        vocabulary=vocabulary,
        positions=positions,
        tied=True,
    )
    width = shape.ffn_for(non_embedding, layers)
    return replace(shape, ffn=max(grain, grain * round(width / grain)))
