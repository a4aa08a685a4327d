"""The shape of a pruned model: an exact size inside a teacher. Imports no torch."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from capgap.errors import UserError
from capgap.models.shape import (
    Shape,
    ladder_shape,
    power_of_two_within,
    smallest_ladder_size,
    why_no_cut,
)
from capgap.sizes import format_count, parse_size

# Non-embedding parameters from which on a student is made for the kernels of GPUs
LARGE = 500_000_000
# Of widths, the first that meets the size; a small model has the last four
MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)

_EXACT = 0.005
_TOLERATED = 0.01

# How far a shape is from what is wished for; smaller is better
Distance = Callable[[Shape], float]


@dataclass(frozen=True)
class Target:
    """The parameters that a cut should have: non-embedding, or with `total` all of them. Of a share
    of a teacher's `keep_target` makes one.

    Hidden and FFN width are multiples of `multiple`; None takes what the size allows: hidden
    widths step by a power of two of about 1/64 of the teacher's, FFN widths of the student's.
    """

    parameters: int
    total: bool = False
    multiple: int | None = None

    def count(self, shape: Shape) -> int:
        """The parameters of `shape` that this target speaks of."""
        counts = shape.parameters()
        return counts.total if self.total else counts.non_embedding

    def error(self, shape: Shape) -> float:
        """How much `shape` misses, as a share of what is wanted."""
        return self.count(shape) / self.parameters - 1


@functools.cache
def pruned_shape(
    teacher: Shape,
    size: int | str,
    *,
    vocabulary: int | None = None,
    layers: int | None = None,
) -> Shape:
    """The shape inside `teacher` of a size, "300M" without embeddings or "360M total" with them,
    nearest to the ladder's.

    `vocabulary`: so many rows of its table stay, all by default, where others only pad it.
    `layers`: of so many. The ladder's own model of that size is taken where it fits into the
    teacher, else the first of `search` that other software loads. UserError as that raises.
    """
    if vocabulary is not None:
        teacher = replace(teacher, vocabulary=min(vocabulary, teacher.vocabulary))
    target = Target(*parse_size(size))
    if target.count(teacher) > target.parameters >= smallest_ladder_size(layers):
        model = _ladder_model(teacher, target, layers)
        if why_no_cut(teacher, model) is None and _suits(teacher, model, target):
            return model
    shapes = search(teacher, target, layers=layers)
    return next((shape for shape in shapes if _suits(teacher, shape, target)), shapes[0])


def search(
    teacher: Shape, target: Target, distance: Distance | None = None, *, layers: int | None = None
) -> list[Shape]:
    """Shapes inside `teacher` that meet the target within 1%, the best first.

    Hidden width, heads (whole key-value groups), FFN width and layers are cut, the same in every
    layer; head size, positions and tying stay. The FFN width is solved for the wanted count, for
    every hidden width, number of heads and of layers (or `layers` alone). Shapes within 0.5% come
    first, ordered by `distance`: `from_ladder` by default, else `from_axes` or
    `capgap.prune.surgery.score_lost`; equal ones by the larger hidden width, then by fewer layers;
    then those within 1%, ordered by their error. The teacher's own count gives the teacher's own
    shape alone.

    UserError: the target is above the teacher, below the smallest cut, or no shape of the asked
    multiples comes near enough.
    """
    own = target.count(teacher)
    if target.parameters == own:
        return [teacher]
    counted = "parameters" if target.total else "non-embedding parameters"
    wanted = f"{target.parameters} ({format_count(target.parameters)}) {counted}"
    if target.parameters > own:
        why = f"the teacher has {own} ({format_count(own)})"
        raise UserError(
            f"cannot prune to {wanted}: {why}; take a larger teacher or a smaller student"
        )
    smallest = _smallest(teacher, target)
    if target.parameters < smallest:
        why = f"the smallest cut of this teacher has {smallest} ({format_count(smallest)})"
        raise UserError(f"cannot prune to {wanted}: {why}")
    shapes = {shape: abs(target.error(shape)) for shape in _candidates(teacher, target, layers)}
    near = [shape for shape, error in shapes.items() if error <= _TOLERATED]
    if not near:
        nearest = target.count(min(shapes, key=shapes.__getitem__)) if shapes else "none"
        widths = f" with widths in multiples of {target.multiple}" if target.multiple else ""
        raise UserError(
            f"no cut of this teacher ({format_count(own)}){widths} comes within {_TOLERATED:.0%} "
            f"of {wanted} (the nearest: {nearest}): take another size"
            f"{', or a smaller multiple' if widths else ''}"
        )
    distance = distance or from_ladder(teacher, target)

    def rank(shape: Shape) -> tuple[float, float, int, int]:
        error = shapes[shape]
        return (0.0 if error <= _EXACT else error, distance(shape), -shape.hidden, shape.layers)

    return sorted(near, key=rank)


def suited(
    teacher: Shape,
    target: Target,
    distance: Distance | None = None,
    *,
    layers: int | None = None,
    multiple: int | None = None,
) -> list[Shape]:
    """`search`, with widths in multiples that suit the kernels of such a size: from `LARGE`
    parameters on 128, below 8; smaller ones where no shape meets those. `multiple` says another.

    Where there are some, only shapes that other software loads: as the teacher's hidden = heads x
    head_size in families for which that is taken for granted elsewhere, and from `LARGE` on an even
    number of key-value heads. Raises UserError as `search`.
    """
    multiples = MULTIPLES if target.parameters >= LARGE else MULTIPLES[-4:]
    problems: list[UserError] = []
    others: list[Shape] = []
    for width in (multiple,) if multiple else multiples:
        try:
            shapes = search(teacher, replace(target, multiple=width), distance, layers=layers)
        except UserError as error:
            problems.append(error)
            continue
        loads = [shape for shape in shapes if _suits(teacher, shape, target)]
        if loads:
            return loads
        others = others or shapes
    if not others:
        raise problems[0]
    return others


def _suits(teacher: Shape, shape: Shape, target: Target) -> bool:
    """Whether other software loads it, or would not load the teacher either."""

    def is_square(one: Shape) -> bool:
        return one.hidden == one.heads * one.head_size

    if teacher.family.square and is_square(teacher) and not is_square(shape):
        return False
    return target.parameters < LARGE or teacher.kv_heads % 2 >= shape.kv_heads % 2


def from_ladder(teacher: Shape, target: Target) -> Distance:
    """Distance from the proportions of the ladder's model of that size: the sum of the squared
    logarithms of the ratios of hidden/layers, ffn/hidden and heads x head_size / hidden."""

    def proportions(shape: Shape) -> tuple[float, ...]:
        hidden, attended = shape.hidden, shape.heads * shape.head_size
        return hidden / shape.layers, shape.ffn / hidden, attended / hidden

    return _squared_logarithms(proportions, proportions(_ladder_model(teacher, target)))


def from_axes(teacher: Shape, keep: float) -> Distance:
    """Distance from two axes cut alike (arXiv 2311.07052): hidden width, and heads with FFN width,
    each to sqrt(keep) of the teacher's, so that their product is `keep`."""

    def axes(shape: Shape) -> tuple[float, ...]:
        return shape.hidden, shape.kv_heads, shape.ffn

    return _squared_logarithms(axes, [math.sqrt(keep) * size for size in axes(teacher)])


def _squared_logarithms(
    sizes: Callable[[Shape], Sequence[float]], wanted: Sequence[float]
) -> Distance:
    def distance(shape: Shape) -> float:
        pairs = zip(sizes(shape), wanted, strict=True)
        return sum(math.log(size / other) ** 2 for size, other in pairs)

    return distance


def keep_target(teacher: Shape, keep: float) -> Target:
    """The target that leaves the fraction `keep` of the non-embedding parameters.

    Raises UserError for a fraction that is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep:g} is no fraction: give one above 0 and at most 1, like 0.4")
    own = teacher.parameters().non_embedding
    return Target(round(keep * own))


def changed_shape(teacher: Shape, sizes: dict[str, int]) -> Shape:
    """`teacher` with other sizes: hidden, layers, heads, kv_heads, ffn, vocabulary.

    Heads bring their key-value heads along. Raises UserError if it is no cut of the teacher.
    """
    known = ("hidden", "layers", "heads", "kv_heads", "ffn", "vocabulary")
    for name in sizes:
        if name not in known:
            raise UserError(f"no size {name!r}: a cut changes {', '.join(known)}")
    group = teacher.heads // teacher.kv_heads
    heads = sizes.get("heads", group * sizes.get("kv_heads", teacher.kv_heads))
    if heads % group:
        raise UserError(
            f"{heads} heads do not divide into the model's groups of {group} heads on a key-value "
            f"head: take a multiple of {group}"
        )
    changes: dict[str, Any] = {"kv_heads": heads // group} | sizes | {"heads": heads}
    shape = replace(teacher, **changes)
    problem = why_no_cut(teacher, shape)
    if problem:
        raise UserError(problem)
    return shape


def _ladder_model(teacher: Shape, target: Target, layers: int | None = None) -> Shape:
    """The ladder's model of the target's size."""
    size = target.parameters
    if target.total:
        # close enough for proportions: the tables shrink as the width does
        counts = teacher.parameters()
        size = round(size * counts.non_embedding / counts.total)
    return ladder_shape(
        teacher.architecture,
        max(size, smallest_ladder_size(layers)),
        vocabulary=teacher.vocabulary,
        positions=teacher.positions,
        layers=layers,
    )


def _widths(teacher: Shape, multiple: int | None) -> Iterator[Shape]:
    """The teacher with every hidden width and number of heads that its architecture allows."""
    group = teacher.heads // teacher.kv_heads
    grain = multiple or max(2, power_of_two_within(teacher.hidden / 64))
    for kv_heads in range(1, teacher.kv_heads + 1):
        heads = kv_heads * group
        if teacher.family.free_width:
            step = math.lcm(heads, grain)
            widths = set(range(step, teacher.hidden + 1, step))
            # the teacher's own width stays, whatever it divides by
            if teacher.hidden % heads == 0:
                widths.add(teacher.hidden)
        else:
            width = heads * teacher.head_size
            widths = {width} if width % (multiple or 1) == 0 else set()
        for hidden in sorted(widths):
            yield replace(teacher, hidden=hidden, heads=heads, kv_heads=kv_heads)


def _candidates(teacher: Shape, target: Target, layers: int | None) -> Iterator[Shape]:
    """Every shape inside the teacher, its FFN solved for the wanted count."""
    depths = range(1, teacher.layers + 1) if layers is None else (layers,)
    for shape in _widths(teacher, target.multiple):
        wanted = target.parameters
        if target.total:
            counts = shape.parameters()
            wanted -= counts.embedding + counts.head
        # FFN widths as the hardware likes them
        grain = target.multiple or power_of_two_within(shape.hidden / 64)
        for depth in depths:
            width = shape.ffn_for(wanted, depth)
            ffn = grain * round(width / grain)
            if ffn == 0 and target.multiple is None:
                ffn = round(width)
            if 1 <= ffn <= teacher.ffn:
                yield replace(shape, layers=depth, ffn=ffn)


def _smallest(teacher: Shape, target: Target) -> int:
    """The parameters of the smallest cut: one layer, one key-value group, the narrowest FFN."""
    ffn = min(target.multiple or 1, teacher.ffn)
    widths = _widths(teacher, target.multiple)
    counts = (target.count(replace(shape, layers=1, ffn=ffn)) for shape in widths)
    smallest = min(counts, default=target.count(teacher))
    return smallest if target.total else max(smallest, smallest_ladder_size())
