"""The folder of a stage that can be stopped: its record says what was asked for."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from capgap.errors import UserError
from capgap.records import write_json_atomically
from capgap.scrub import scrub

if TYPE_CHECKING:
    from capgap.models.parallel import Ranks


def find_run(record: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What the record says, None where nothing has begun; `record` is a file in the stage's output
    folder.

    UserError where the folder holds something else, or was asked for something else.
    """
    out = record.parent
    # as the record holds it, or a run whose source has a password could not be continued
    asked = scrub(asked)
    if record.exists():
        try:
            found: dict[str, Any] = json.loads(record.read_text())
        except ValueError as error:
            raise UserError(f"{record} is no JSON ({error}): choose another --out") from None
        for key, value in asked.items():
            if found["asked"].get(key) != value:
                raise UserError(
                    f"{out} holds a run with another {key} ({found['asked'].get(key)}, now "
                    f"{value}): choose another --out"
                )
        return found
    if out.exists() and not (out.is_dir() and _is_empty(out, record.name)):
        raise UserError(f"{out} is no empty folder and no run: choose another --out")
    return None


def begin(record: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The record that `find_run` finds, or else a new one, written."""
    found = find_run(record, asked)
    if found is None:
        found = {"schema": 1, "finished": False, "asked": asked}
        write_json_atomically(record, found)
    return found


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


def _is_empty(folder: Path, record: str) -> bool:
    """But for a record that a kill has left half written."""
    return all(path.name.startswith(f".{record}.") for path in folder.iterdir())
