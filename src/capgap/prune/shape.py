"""The shape of a pruned model: an exact size inside a teacher. Imports no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from capgap.errors import UserError
from capgap.models.shape import (
    Shape,
    ffn_for,
    ladder_shape,
    power_of_two_within,
    smallest_ladder_size,
)
from capgap.sizes import format_count

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
    """The parameters that a cut should have: non-embedding, or with `total` all of them.

    Hidden and FFN width are multiples of `multiple`; None takes what the size allows: hidden
    widths step by a power of two of about 1/64 of the teacher's, FFN widths of the student's.
    """

    parameters: int
    total: bool = False
    multiple: int | None = None

    @property
    def counted(self) -> str:
        return "parameters" if self.total else "non-embedding parameters"

    def count(self, shape: Shape) -> int:
        """The parameters of `shape` that this target speaks of."""
        counts = shape.parameters()
        return counts.total if self.total else counts.non_embedding

    def error(self, shape: Shape) -> float:
        """How much `shape` misses, as a share of what is wanted."""
        return self.count(shape) / self.parameters - 1


def pruned_shape(
    teacher: Shape,
    non_embedding: int,
    *,
    vocabulary: int | None = None,
    layers: int | None = None,
) -> Shape:
    """The shape inside `teacher` that has `non_embedding` parameters, nearest to the ladder's; of
    so many layers, if they are given.

    Of the vocabulary's table the first `vocabulary` rows stay, all by default: rows that pad it
    have no token. The ladder's own model of that size is taken where it fits into the teacher, else
    the first of `search` that other software loads. Raises UserError as that does.
    """
    teacher = _with_words(teacher, vocabulary)
    target = Target(non_embedding)
    if target.count(teacher) > non_embedding >= smallest_ladder_size(layers):
        model = _ladder_model(teacher, target, layers)
        if why_no_cut(teacher, model) is None and _suits(teacher, model, target):
            return model
    found = search(teacher, target, layers=layers)
    return next((shape for shape in found if _suits(teacher, shape, target)), found[0])


def search(
    teacher: Shape, target: Target, distance: Distance | None = None, *, layers: int | None = None
) -> list[Shape]:
    """Shapes inside `teacher` that meet the target within 1%, the best first.

    Hidden width, heads (whole key-value groups), FFN width and layers are cut, the same in every
    layer; head size, positions and tying stay; nothing exceeds the teacher. The FFN width is solved
    for the wanted count, for every hidden width, number of heads and of layers (or `layers` alone).
    Shapes within 0.5% come first, ordered by `distance`, by default `from_ladder`; equal ones by
    the larger hidden width, then by fewer layers; then those within 1%, ordered by their error. The
    teacher's own count gives the teacher's own shape alone.

    Raises UserError if the target is above the teacher, below the smallest cut, or if no shape of
    the asked multiples comes near enough.
    """
    own = target.count(teacher)
    if target.parameters == own:
        return [teacher]
    wanted = f"{target.parameters} ({format_count(target.parameters)}) {target.counted}"
    if target.parameters > own:
        raise UserError(
            f"cannot prune to {wanted}: the teacher has {own} ({format_count(own)}); take a "
            "larger teacher or a smaller student"
        )
    smallest = _smallest(teacher, target)
    if target.parameters < smallest:
        raise UserError(
            f"cannot prune to {wanted}: the smallest cut of this teacher has {smallest} "
            f"({format_count(smallest)})"
        )
    found = list(_candidates(teacher, target, layers))
    near = [shape for shape in found if abs(target.error(shape)) <= _TOLERATED]
    if not near:
        raise UserError(_why_none(teacher, target, found))
    distance = distance or from_ladder(teacher, target)
    return sorted(near, key=lambda shape: _rank(shape, target, distance))


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

    Of the shapes those that other software loads come alone, where there are some: hidden = heads x
    head_size in families for which that is taken for granted elsewhere; from `LARGE` on an even
    number of key-value heads. Both only where the teacher's are so. Raises UserError as `search`.
    """
    is_large = target.parameters >= LARGE
    tried = (multiple,) if multiple else MULTIPLES if is_large else MULTIPLES[-4:]
    problem: UserError | None = None
    others: list[Shape] = []
    for one in tried:
        try:
            found = search(teacher, replace(target, multiple=one), distance, layers=layers)
        except UserError as error:
            problem = problem or error
            continue
        loads = [shape for shape in found if _suits(teacher, shape, target)]
        if loads:
            return loads
        others = others or found
    if not others:
        assert problem is not None
        raise problem
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
    model = _ladder_model(teacher, target)

    def distance(shape: Shape) -> float:
        return _squared_logarithms(_proportions(shape), _proportions(model))

    return distance


def from_axes(teacher: Shape, keep: float) -> Distance:
    """Distance from two axes cut alike (arXiv 2311.07052): hidden width, and heads with FFN width,
    each to sqrt(keep) of the teacher's, so that their product is `keep`."""
    axis = math.sqrt(keep)

    def distance(shape: Shape) -> float:
        wanted = [axis * size for size in (teacher.hidden, teacher.kv_heads, teacher.ffn)]
        return _squared_logarithms((shape.hidden, shape.kv_heads, shape.ffn), wanted)

    return distance


def keep_target(teacher: Shape, keep: float, *, multiple: int | None = None) -> Target:
    """The target that leaves the fraction `keep` of the non-embedding parameters.

    Raises UserError for a fraction that is not above 0 and at most 1.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep {keep:g} is no fraction: give one above 0 and at most 1, like 0.4")
    own = teacher.parameters().non_embedding
    return Target(own if keep == 1 else round(keep * own), multiple=multiple)


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


def _with_words(teacher: Shape, vocabulary: int | None) -> Shape:
    if vocabulary is None:
        return teacher
    return replace(teacher, vocabulary=min(vocabulary, teacher.vocabulary))


def _ladder_model(teacher: Shape, target: Target, layers: int | None = None) -> Shape:
    """The ladder's model of the target's size; in balance with it is in balance with the family."""
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


def _rank(shape: Shape, target: Target, distance: Distance) -> tuple[float, float, int, int]:
    """What makes a candidate better, most important first; smaller is better."""
    error = abs(target.error(shape))
    return (0.0 if error <= _EXACT else error, distance(shape), -shape.hidden, shape.layers)


def _proportions(shape: Shape) -> tuple[float, float, float]:
    return (
        shape.hidden / shape.layers,
        shape.ffn / shape.hidden,
        shape.heads * shape.head_size / shape.hidden,
    )


def _squared_logarithms(
    found: "tuple[float, ...]", wanted: "tuple[float, ...] | list[float]"
) -> float:
    return sum(math.log(one / other) ** 2 for one, other in zip(found, wanted, strict=True))


def _widths(teacher: Shape, multiple: int | None) -> Iterator[tuple[int, int, int]]:
    """Every (hidden, heads, kv_heads) inside the teacher that its architecture allows."""
    group = teacher.heads // teacher.kv_heads
    grain = multiple or max(2, power_of_two_within(teacher.hidden / 64))
    for kv_heads in range(1, teacher.kv_heads + 1):
        heads = kv_heads * group
        if not teacher.family.free_width:
            if multiple is None or heads * teacher.head_size % multiple == 0:
                yield heads * teacher.head_size, heads, kv_heads
            continue
        step = math.lcm(heads, grain)
        widths = set(range(step, teacher.hidden + 1, step))
        # the teacher's own width stays, whatever it divides by
        if teacher.hidden % heads == 0:
            widths.add(teacher.hidden)
        for hidden in sorted(widths):
            yield hidden, heads, kv_heads


def _candidates(teacher: Shape, target: Target, layers: int | None) -> Iterator[Shape]:
    """Every shape inside the teacher, its FFN solved for the wanted count."""
    depths = range(1, teacher.layers + 1) if layers is None else (layers,)
    for hidden, heads, kv_heads in _widths(teacher, target.multiple):
        wanted = target.parameters
        if target.total:
            counts = replace(teacher, hidden=hidden, heads=heads, kv_heads=kv_heads).parameters()
            wanted -= counts.embedding + counts.head
        for depth in depths:
            width = ffn_for(
                teacher.architecture,
                wanted,
                hidden=hidden,
                layers=depth,
                heads=heads,
                kv_heads=kv_heads,
                head_size=teacher.head_size,
            )
            ffn = _rounded(width, hidden, target.multiple)
            if 1 <= ffn <= teacher.ffn:
                yield replace(
                    teacher, hidden=hidden, layers=depth, heads=heads, kv_heads=kv_heads, ffn=ffn
                )


def _rounded(width: float, hidden: int, multiple: int | None) -> int:
    """An FFN width as the hardware likes it."""
    if multiple is not None:
        return multiple * round(width / multiple)
    grain = power_of_two_within(hidden / 64)
    return grain * round(width / grain) or round(width)


def _smallest(teacher: Shape, target: Target) -> int:
    """The parameters of the smallest cut: one layer, one key-value group, the narrowest FFN."""
    ffn = min(target.multiple or 1, teacher.ffn)
    shapes = (
        replace(teacher, hidden=hidden, layers=1, heads=heads, kv_heads=kv_heads, ffn=ffn)
        for hidden, heads, kv_heads in _widths(teacher, target.multiple)
    )
    smallest = min((target.count(shape) for shape in shapes), default=target.count(teacher))
    return smallest if target.total else max(smallest, smallest_ladder_size())


def _why_none(teacher: Shape, target: Target, found: list[Shape]) -> str:
    own = format_count(target.count(teacher))
    line = (
        f"no cut of this teacher ({own} {target.counted}) comes within {_TOLERATED:.0%} of "
        f"{target.parameters} ({format_count(target.parameters)})"
    )
    if target.multiple is not None and target.multiple > 1:
        line += f" with widths in multiples of {target.multiple}"
    if found:
        nearest = min(found, key=lambda shape: abs(target.error(shape)))
        line += f"; the nearest has {target.count(nearest)}"
    finer = ", or a smaller multiple" if (target.multiple or 1) > 1 else ""
    return f"{line}: take another size{finer}"
