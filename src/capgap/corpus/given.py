"""Which prepared corpora a stage reads: folders, each with a weight or none. Light: no numpy."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, PlainSerializer

from capgap.errors import UserError


class Weighted(NamedTuple):
    """A prepared corpus by its folder, and its weight among others; None: all weigh the same."""

    folder: Path
    weight: float | None = None

    def __str__(self) -> str:
        """As it is typed."""
        return str(self.folder) + ("" if self.weight is None else f"={self.weight!r}")


def parse_mixture(texts: Sequence[str]) -> tuple[Weighted, ...]:
    """What `--corpus FOLDER=WEIGHT` says, given once or several times; UserError as
    `check_weights`."""
    return check_weights([_parse(text) for text in texts])


def check_weights(given: Sequence[Weighted]) -> tuple[Weighted, ...]:
    """UserError: a weight that is no number above 0, some with a weight and some without, one
    twice."""
    for folder, weight in given:
        if weight is not None and not 0 < weight < math.inf:
            raise UserError(f"{folder}: the weight {weight!r} is no number above 0")
    without = [folder for folder, weight in given if weight is None]
    if without and len(without) < len(given):
        raise UserError(f"{without[0]} has no weight: give every corpus one, or none")
    folders = [folder for folder, _ in given]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice: give it once, with its whole weight")
    return tuple(given)


def _parse(text: str) -> Weighted:
    folder, equals, weight = text.rpartition("=")
    # a folder's name may hold the sign
    if not equals or Path(text).exists():
        return Weighted(Path(text))
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not folder or not 0 < number < math.inf:
        raise UserError(f"{text!r}: the weight {weight!r} is no number above 0")
    return Weighted(Path(folder), number)


def _parsed(given: Any) -> Any:
    """One text or folder, or several, as pairs; anything else as it is."""
    texts = [given] if isinstance(given, str | Path) else given
    if not isinstance(texts, list | tuple):
        return given
    try:
        if texts and all(isinstance(one, tuple) for one in texts):
            return check_weights([Weighted(Path(folder), weight) for folder, weight in texts])
        if not all(isinstance(one, str | Path) for one in texts):
            return given
        return parse_mixture([str(one) for one in texts]) or None
    except UserError as error:
        raise ValueError(str(error)) from None


# The type of a stage's field: one prepared corpus, or several by weight
Given = Annotated[
    tuple[Weighted, ...],
    BeforeValidator(_parsed),
    PlainSerializer(lambda given: None if given is None else [str(one) for one in given]),
]
