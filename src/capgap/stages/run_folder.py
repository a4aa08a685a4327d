"""The record of a stage that several processes share."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.artifact import begin as begin
from capgap.artifact import find_run as find_run
from capgap.errors import UserError

if TYPE_CHECKING:
    from capgap.models.parallel import Ranks


def begin_together(record: Path, asked: dict[str, Any], ranks: "Ranks") -> dict[str, Any]:
    """What the first rank finds, on all; its UserError too."""
    outcome: dict[str, Any] | UserError = {}
    if ranks.is_first:
        try:
            outcome = begin(record, asked)
        except UserError as error:
            outcome = error
    outcome = ranks.told(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome
