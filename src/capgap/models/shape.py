"""The shape of a model: its sizes, its parameters by part, and the ladder. Imports no torch."""

import math
from dataclasses import dataclass

from capgap.errors import UserError
from capgap.models.families import FAMILIES, HEAD, Family, Tensors
from capgap.sizes import ParameterCounts, format_count

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

    def parameters(self) -> ParameterCounts:
        """Parameters by part, exactly those of the built model."""
        attention, ffn, norms, final_norm = layer_parameters(
            self.architecture, self.hidden, self.heads, self.kv_heads, self.head_size, self.ffn
        )
        tables = dict(self.family.tables)
        head = tables.pop(HEAD)
        sizes = {"words": self.vocabulary, "positions": self.positions, "hidden": self.hidden}
        return ParameterCounts(
            embedding=_count(tables, sizes),
            attention=self.layers * attention,
            ffn=self.layers * ffn,
            norms=self.layers * norms + final_norm,
            head=0 if self.tied else _count({HEAD: head}, sizes),
        )


def _problem(shape: Shape) -> str | None:
    if shape.architecture not in ARCHITECTURES:
        return f"the architecture must be one of {', '.join(ARCHITECTURES)}"
    for name in ("hidden", "layers", "heads", "kv_heads", "head_size", "ffn", "vocabulary"):
        if getattr(shape, name) < 1:
            return f"{name} is {getattr(shape, name)}, it must be at least 1"
    if shape.positions < 1:
        return f"positions is {shape.positions}, it must be at least 1"
    family = shape.family
    if not family.learns_positions and shape.head_size % 2:
        return f"head_size {shape.head_size} is odd, rotary positions need an even one"
    if not family.grouped_heads and shape.heads != shape.kv_heads:
        return f"kv_heads {shape.kv_heads} must equal heads {shape.heads}"
    if shape.heads % shape.kv_heads:
        return f"{shape.heads} heads do not share {shape.kv_heads} kv_heads evenly"
    if not family.free_width and shape.hidden != shape.heads * shape.head_size:
        return (
            f"hidden {shape.hidden} must be heads x head_size = {shape.heads} x {shape.head_size}"
        )
    if shape.hidden % shape.heads:
        # transformers refuses it, although the head size is a field of its own
        return f"hidden {shape.hidden} is no multiple of {shape.heads} heads"
    return None


def axis_sizes(hidden: int, heads: int, kv_heads: int, head_size: int, ffn: int) -> dict[str, int]:
    """Of the axes of a layer's tensors, as `capgap.models.families` names them."""
    return {
        "hidden": hidden,
        "neurons": ffn,
        "gate_up": 2 * ffn,
        "query": heads * head_size,
        "key": kv_heads * head_size,
        "head_qkv": 3 * heads * head_size,
        "qkv": (heads + 2 * kv_heads) * head_size,
        "head": head_size,
    }


def layer_parameters(
    architecture: str, hidden: int, heads: int, kv_heads: int, head_size: int, ffn: int
) -> tuple[int, int, int, int]:
    """Parameters of one layer: attention, FFN, norms; and of the norm behind all layers."""
    family = FAMILIES[architecture]
    sizes = axis_sizes(hidden, heads, kv_heads, head_size, ffn)
    norm = (2 if family.norm_bias else 1) * hidden
    return (
        _count(family.attention, sizes),
        _count(family.ffn, sizes),
        len(family.layer_norms) * norm,
        norm,
    )


def _count(tensors: Tensors, sizes: dict[str, int]) -> int:
    return sum(math.prod(sizes[axis] for axis in axes) for axes in tensors.values())


def ffn_for(
    architecture: str,
    non_embedding: int,
    *,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_size: int,
) -> float:
    """The FFN width that gives a model `non_embedding` parameters; not rounded, may be negative."""
    attention, bias, norms, final_norm = layer_parameters(
        architecture, hidden, heads, kv_heads, head_size, ffn=0
    )
    _, one_neuron, *_ = layer_parameters(architecture, hidden, heads, kv_heads, head_size, ffn=1)
    without = layers * (attention + bias + norms) + final_norm
    return (non_embedding - without) / (layers * (one_neuron - bias))


def power_of_two_within(limit: float) -> int:
    """The largest power of two that is not above `limit`; 1 for a limit below 2."""
    return int(2 ** math.floor(math.log2(limit))) if limit >= 2 else 1


def smallest_ladder_size(layers: int | None = None) -> int:
    """The smallest non-embedding count that has a ladder shape, of so many layers."""
    return 12 * (layers or _SMALLEST_LAYERS) * _SMALLEST_HIDDEN**2


def ladder_shape(
    architecture: str,
    non_embedding: int,
    *,
    vocabulary: int,
    positions: int,
    layers: int | None = None,
) -> Shape:
    """The model of a ladder with `non_embedding` parameters and tied embeddings.

    The count is met within 0.5% (1% below 20k). `layers` takes the place of the rule's.

    The rule, with S the wanted count:
    - layers = 12 (S / 85M)^0.23, at least 2: 2 at 50k, 4 at 1M, 12 at 85M (GPT-2 small),
      33 at 7B. Depth grows slowly, since few wide layers are quicker on a CPU;
    - a layer has about 12 hidden^2 parameters, so hidden* = sqrt(S / (12 layers));
    - heads of size 16 up to hidden* 192, 32 up to 512, 64 up to 2048, then 128. Their number is
      hidden* / size rounded, at least 2;
    - families whose head size is a field of its own take the multiple of heads nearest to hidden*.
      A student cut out of any teacher of the same head size then has the ladder's own shape;
    - for the others hidden = heads x size, and the size is moved in eighths of itself, so that
      hidden stays close to hidden* and neighbours on the ladder look alike;
    - the FFN takes what is left: about 8/3 hidden where it has a gate, or 4 hidden, rounded to a
      power of two of at most hidden/32.
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
    width = ffn_for(
        architecture,
        non_embedding,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
    )
    grain = power_of_two_within(hidden / 32)
    return Shape(
        architecture=architecture,
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_size=head_size,
        ffn=max(grain, grain * round(width / grain)),
        vocabulary=vocabulary,
        positions=positions,
        tied=True,
    )
