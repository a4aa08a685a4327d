"""What the layers of a model keep in memory for the backward pass. Imports no torch.

Counted from transformers' models under sdpa, or eager attention where scores are capped (Gemma 2);
the tests compare every figure with what autograd really saves. Widths of a token:

    hidden     the residual stream, a norm's input and output, a linear layer's input
    query      of all query heads; the attention's output is as wide
    key        of all key-value heads
    attended   keys or values as the attention takes them: `key`, or with a mask `query`, since
               grouped heads are repeated then
    values     where queries, keys and values come out of one product, and values are a view of it:
               all three; with a mask and grouped heads `query`
    neurons    of the FFN
    heads      one number a query head (the attention's normaliser, a head norm's scale)
    kv_heads   one number a key-value head
    scores     heads x window, where the attention is not fused
    one        one number (a norm's mean or scale)
"""

from dataclasses import dataclass

from capgap.models.shape import Shape

FLOAT = 4
HALF = 2

Widths = dict[str, int]


@dataclass(frozen=True)
class Kept:
    """How many tensors of each width a layer keeps; two are added up.

    plain: in fp32, without autocast. wide, low: under bf16 autocast those in fp32, and in bf16.
    positions: numbers in fp32 a position, which all rows share unless documents are masked.
    """

    plain: Widths
    wide: Widths
    low: Widths
    positions: int = 0

    def __add__(self, other: "Kept") -> "Kept":
        def both(one: Widths, more: Widths) -> Widths:
            return {name: one.get(name, 0) + more.get(name, 0) for name in one | more}

        low, positions = both(self.low, other.low), self.positions + other.positions
        return Kept(both(self.plain, other.plain), both(self.wide, other.wide), low, positions)


_LLAMA = Kept(
    plain={"hidden": 6, "query": 2, "attended": 2, "neurons": 4, "heads": 1, "one": 2},
    wide={"hidden": 4, "heads": 1, "one": 2},
    # every linear layer keeps its own copy of its input in bf16
    low={"hidden": 5, "query": 2, "attended": 2, "neurons": 4},
)
# queries are scaled by their position
_SCALED_QUERIES = Kept({}, {}, {}, positions=1)
# queries and keys have norms, over all heads
_WHOLE_NORMS = Kept({"query": 2, "key": 2, "one": 2}, {"query": 2, "key": 2, "one": 2}, {})
# or over each
_HEAD_NORMS = Kept(
    plain={"query": 2, "key": 2, "heads": 1, "kv_heads": 1},
    wide={"query": 1, "key": 1, "heads": 1, "kv_heads": 1},
    low={"query": 1, "key": 1},
)
# norms behind attention and FFN as well
_FOUR_NORMS = Kept({"hidden": 4, "one": 2}, {"hidden": 4, "one": 2}, {})
# one product for queries, keys and values, and one for gate and neurons: fewer copies of inputs
_JOINED = Kept(
    plain={"query": 1, "attended": -1, "values": 1},
    wide={},
    low={"hidden": -3, "query": 1, "attended": -1, "values": 1},
)
_QWEN3 = _LLAMA + _HEAD_NORMS

KEPT: dict[str, Kept] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral3": _LLAMA + _SCALED_QUERIES,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "gemma2": Kept(
        plain={"hidden": 10, "query": 4, "scores": 2, "neurons": 4, "one": 4},
        wide={"hidden": 8, "scores": 1, "one": 4},
        low={"hidden": 5, "query": 4, "scores": 2, "neurons": 4},
    ),
    "gemma3_text": _QWEN3 + _FOUR_NORMS + Kept({}, {}, {"query": 1, "key": 1}),
    "olmo2": _LLAMA + _WHOLE_NORMS,
    "olmo3": _LLAMA + _WHOLE_NORMS,
    "phi3": _LLAMA + _JOINED,
    "gpt_neox": Kept(
        plain={"hidden": 3, "query": 4, "values": 1, "neurons": 2, "heads": 1, "one": 4},
        wide={"hidden": 1, "heads": 1, "one": 4},
        low={"hidden": 2, "query": 4, "values": 1, "neurons": 2},
    ),
    "gpt2": Kept(
        plain={"hidden": 4, "query": 1, "values": 1, "neurons": 5, "heads": 1, "one": 4},
        wide={"hidden": 2, "heads": 1, "one": 4},
        low={"hidden": 2, "query": 1, "values": 1, "neurons": 5},
    ),
}


def kept_bytes(
    shape: Shape,
    tokens: int,
    window: int,
    *,
    autocast: bool,
    document_mask: bool = False,
    checkpointed: bool = False,
) -> int:
    """Bytes that a model keeps of `tokens` in rows of `window` from its forward to its backward
    pass: those of its layers, and outside of them. `checkpointed`: of a layer its input alone."""
    layer = FLOAT * shape.hidden * tokens
    if not checkpointed:
        layer = layer_bytes(shape, tokens, window, autocast=autocast, document_mask=document_mask)
    return shape.layers * layer + _outside_bytes(shape, tokens, window, document_mask)


def layer_bytes(
    shape: Shape, tokens: int, window: int, *, autocast: bool, document_mask: bool = False
) -> int:
    """Bytes that one layer keeps, the bf16 copies of its matrices among them."""
    widths = _widths(shape, window, document_mask)
    kept = KEPT[shape.architecture]
    # every call of the attention makes numbers of its mask
    mask = window if document_mask and "scores" not in kept.plain else 0
    # a norm whose weight is added to 1 keeps the sum
    sums = 0
    if shape.family.norm_offset:
        of_heads = sum(axes == ("head",) for axes in shape.family.attention.values())
        sums = len(shape.family.layer_norms) * shape.hidden + of_heads * shape.head_size
    sums += kept.positions * (tokens if document_mask else window)
    if not autocast:
        return FLOAT * (tokens * (_total(kept.plain, widths) + mask) + sums)
    low = tokens * (_total(kept.low, widths) + mask)
    wide = tokens * _total(kept.wide, widths) + sums
    return FLOAT * wide + HALF * low + cast_bytes(shape)


def cast_bytes(shape: Shape) -> int:
    """Bytes of the bf16 copies of a layer's matrices, which autocast makes."""
    counts = shape.parameters()
    sizes = shape.axis_sizes
    tensors = [*shape.family.attention.values(), *shape.family.ffn.values()]
    vectors = sum(sizes[axes[0]] for axes in tensors if len(axes) == 1)
    return HALF * ((counts.attention + counts.ffn) // shape.layers - vectors)


def forward_transient(shape: Shape, window: int, value_bytes: int) -> int:
    """Bytes of a token that a layer of a model without gradient needs at once: what an FFN holds
    before its last product, or the attention; and the residual stream with a norm beside it."""
    widths = _widths(shape, window, document_mask=False)
    family = shape.family
    gated = "gate_up" in str(family.ffn) or "mlp.gate_proj.weight" in family.ffn
    ffn = (3 if gated else 2) * shape.ffn
    attention = 2 * widths["query"] + 4 * widths["key"]
    if "scores" in KEPT[shape.architecture].plain:
        attention += 3 * widths["scores"]
    return value_bytes * (3 * shape.hidden + max(ffn, attention))


def backward_transient(shape: Shape, *, autocast: bool) -> int:
    """Bytes of a token that the backward pass of an FFN needs beside what was kept: gradients of
    the factors of its last product, or of its one activation, and of the residual stream."""
    value = HALF if autocast else FLOAT
    factors = 2 if KEPT[shape.architecture].plain["neurons"] > 2 else 1
    return factors * value * shape.ffn + 2 * FLOAT * shape.hidden


def _outside_bytes(shape: Shape, tokens: int, window: int, document_mask: bool) -> int:
    """Token ids, positions, and what the final norm keeps: an RMS norm its scaled input too."""
    positions = tokens if document_mask else window
    place = 8 if shape.family.learns_positions else 2 * FLOAT * shape.head_size
    states, numbers = (1, 2) if shape.family.norm_bias else (2, 1)
    weight = FLOAT * shape.hidden if shape.family.norm_offset else 0
    norm = FLOAT * (states * shape.hidden + numbers)
    return tokens * (8 + norm) + positions * place + weight


def _widths(shape: Shape, window: int, document_mask: bool) -> Widths:
    query = shape.heads * shape.head_size
    key = shape.kv_heads * shape.head_size
    repeated = document_mask and shape.heads != shape.kv_heads
    return {
        "hidden": shape.hidden,
        "query": query,
        "key": key,
        "attended": query if repeated else key,
        "values": query if repeated else query + 2 * key,
        "neurons": shape.ffn,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "scores": shape.heads * window,
        "one": 1,
    }


def _total(kept: Widths, widths: Widths) -> int:
    return sum(number * widths[name] for name, number in kept.items())
