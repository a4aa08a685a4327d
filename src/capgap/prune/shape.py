"""The shape of a pruned model: an exact size inside a teacher. Imports no torch."""

import math
from collections.abc import Iterator
from dataclasses import replace

from capgap.errors import UserError
from capgap.models.shape import (
    Shape,
    ffn_for,
    ladder_shape,
    power_of_two_within,
    smallest_ladder_size,
)
from capgap.sizes import format_count

_EXACT = 0.005
_TOLERATED = 0.02


def pruned_shape(teacher: Shape, non_embedding: int, *, vocabulary: int | None = None) -> Shape:
    """The shape inside `teacher` that has `non_embedding` parameters.

    Hidden width, heads (whole key-value groups), FFN width and layers are cut, the same in every
    layer; head size, positions and tying stay; nothing exceeds the teacher. Of the vocabulary's
    table the first `vocabulary` rows stay, all by default: rows that pad it have no token. The FFN
    width is solved for the wanted count (any integer for a small model; a multiple of a power of
    two of at most hidden/64 for a large one). The ladder's own model of that size is taken where
    it fits into the teacher. Otherwise, of all shapes within 0.5% of the count, the one whose
    proportions are nearest to those of the ladder's model is taken: nearest in the sum of squared
    logarithms of the ratios of hidden/layers, ffn/hidden and heads x head_size / hidden; equal
    ones by the larger hidden width, then by fewer layers. If none is that exact, the one closest
    in count, within 2%. The teacher's own count gives the teacher's own shape.

    Raises UserError if the count is above the teacher's, or below the smallest possible.
    """
    if vocabulary is not None:
        teacher = replace(teacher, vocabulary=min(vocabulary, teacher.vocabulary))
    own = teacher.parameters().non_embedding
    if non_embedding == own:
        return teacher
    if non_embedding > own:
        raise UserError(
            f"cannot prune to {non_embedding} ({format_count(non_embedding)}) non-embedding "
            f"parameters: the teacher has {own} ({format_count(own)}); take a larger teacher "
            "or a smaller student"
        )
    smallest = max(_smallest(teacher).parameters().non_embedding, smallest_ladder_size())
    if non_embedding < smallest:
        raise UserError(
            f"cannot prune to {non_embedding} ({format_count(non_embedding)}) non-embedding "
            f"parameters: the smallest cut of this teacher has {smallest} "
            f"({format_count(smallest)})"
        )
    model = ladder_shape(
        teacher.architecture,
        non_embedding,
        vocabulary=teacher.vocabulary,
        positions=teacher.positions,
    )
    if why_no_cut(teacher, model) is None:
        return model
    best = min(
        _candidates(teacher, non_embedding),
        key=lambda shape: _rank(shape, model, non_embedding),
        default=None,
    )
    if best is None or _error(best, non_embedding) > _TOLERATED:
        raise UserError(
            f"no cut of this teacher ({own} non-embedding parameters) comes within "
            f"{_TOLERATED:.0%} of {non_embedding}; take another student size"
        )
    return best


def why_no_cut(own: Shape, shape: Shape) -> str | None:
    """Why a model of shape `own` cannot be cut to `shape`; None if it can."""
    for name in ("architecture", "head_size", "positions", "tied"):
        if getattr(shape, name) != getattr(own, name):
            return (
                f"cannot cut to {name} {getattr(shape, name)}: pruning keeps the model's "
                f"{name} {getattr(own, name)}"
            )
    for name in ("hidden", "layers", "kv_heads", "ffn", "vocabulary"):
        if getattr(shape, name) > getattr(own, name):
            return (
                f"cannot cut to {name} {getattr(shape, name)}: the model has only "
                f"{getattr(own, name)}"
            )
    if shape.heads * own.kv_heads != own.heads * shape.kv_heads:
        return (
            f"cannot cut to {shape.heads} heads on {shape.kv_heads} kv_heads: the model has "
            f"{own.heads // own.kv_heads} heads on each"
        )
    return None


def _error(shape: Shape, non_embedding: int) -> float:
    return abs(shape.parameters().non_embedding / non_embedding - 1)


def _rank(shape: Shape, model: Shape, non_embedding: int) -> tuple[float, float, int, int]:
    """What makes a candidate better, most important first; smaller is better."""
    error = _error(shape, non_embedding)
    distance = sum(
        math.log(own / wanted) ** 2
        for own, wanted in zip(_proportions(shape), _proportions(model), strict=True)
    )
    return (0.0 if error <= _EXACT else error, distance, -shape.hidden, shape.layers)


def _proportions(shape: Shape) -> tuple[float, float, float]:
    return (
        shape.hidden / shape.layers,
        shape.ffn / shape.hidden,
        shape.heads * shape.head_size / shape.hidden,
    )


def _widths(teacher: Shape) -> Iterator[tuple[int, int, int]]:
    """Every (hidden, heads, kv_heads) inside the teacher that its architecture allows."""
    group = teacher.heads // teacher.kv_heads
    # hidden widths step by about 1/64 of the teacher's, in powers of two for the hardware
    grain = max(2, power_of_two_within(teacher.hidden / 64))
    for kv_heads in range(1, teacher.kv_heads + 1):
        heads = kv_heads * group
        if not teacher.family.free_width:
            yield heads * teacher.head_size, heads, kv_heads
            continue
        step = math.lcm(heads, grain)
        widths = set(range(step, teacher.hidden + 1, step))
        if teacher.hidden % heads == 0:
            widths.add(teacher.hidden)
        for hidden in sorted(widths):
            yield hidden, heads, kv_heads


def _candidates(teacher: Shape, non_embedding: int) -> Iterator[Shape]:
    """Every shape inside the teacher, its FFN solved for the wanted count."""
    for hidden, heads, kv_heads in _widths(teacher):
        for layers in range(1, teacher.layers + 1):
            width = ffn_for(
                teacher.architecture,
                non_embedding,
                hidden=hidden,
                layers=layers,
                heads=heads,
                kv_heads=kv_heads,
                head_size=teacher.head_size,
            )
            grain = power_of_two_within(hidden / 64)
            ffn = grain * round(width / grain) or round(width)
            if 1 <= ffn <= teacher.ffn:
                yield replace(
                    teacher, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads, ffn=ffn
                )


def _smallest(teacher: Shape) -> Shape:
    """The cut with the fewest parameters: one layer, one key-value group, one neuron."""
    shapes = (
        replace(teacher, hidden=hidden, layers=1, heads=heads, kv_heads=kv_heads, ffn=1)
        for hidden, heads, kv_heads in _widths(teacher)
    )
    return min(shapes, key=lambda shape: shape.parameters().non_embedding)
