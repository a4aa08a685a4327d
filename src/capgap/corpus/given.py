"""Which prepared corpora a stage reads, by their folders and weights. Light: no numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import BeforeValidator

from capgap.errors import UserError


@dataclass(frozen=True)
class Weighted:
    """A prepared corpus by its folder, and its weight among others; None: all weigh the same."""

    folder: Path
    weight: float | None = None


Given: TypeAlias = Path | tuple[Weighted, ...]


def parse_mixture(texts: Sequence[str]) -> Given:
    """What `--corpus FOLDER=WEIGHT` says, given once or several times; one alone is its folder.

    UserError: a weight that is no number above 0, some with a weight and some without, one twice.
    """
    given = tuple(_parse(text) for text in texts)
    if len({one.weight is None for one in given}) > 1:
        without = next(one.folder for one in given if one.weight is None)
        raise UserError(f"{without} has no weight: give every corpus one, or none")
    folders = [one.folder for one in given]
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is named twice: give it once, with its whole weight")
    return given[0].folder if len(given) == 1 else given


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


def unweighted(folders: Sequence[str]) -> Given:
    """The same where weights have no part: the signal of a teacher is kept of every window."""
    return parse_mixture([f"{folder}=1" for folder in folders])


def _text(given: Any) -> Any:
    """As it was typed, texts, or as it is."""
    if not isinstance(given, (list, tuple)) or not all(isinstance(one, str) for one in given):
        return given
    try:
        return parse_mixture(given) if given else None
    except UserError as error:
        raise ValueError(str(error)) from None


# one prepared corpus, or several by weight
Text = Annotated[Given, BeforeValidator(_text)]
