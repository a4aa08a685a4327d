"""The record of a run that can be stopped: found by the same request, kept from any other."""

import json
from pathlib import Path
from typing import Any

from capgap.errors import UserError
from capgap.records import write_json_atomically


def find_record(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a run that was asked for in the same way, None where nothing has begun.

    UserError where the folder holds a run that was asked for otherwise, or anything else.
    """
    folder = path.parent
    if path.exists():
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is no JSON ({error}): choose another --out") from None
        for key, value in asked.items():
            if found["asked"].get(key) != value:
                raise UserError(
                    f"{folder} holds a run with another {key} ({found['asked'].get(key)}, now "
                    f"{value}): choose another --out"
                )
        return found
    # but for a record that a kill has left half written
    if folder.exists() and not (
        folder.is_dir() and all(one.name.startswith(f".{path.name}.") for one in folder.iterdir())
    ):
        raise UserError(f"{folder} is no empty folder and no run: choose another --out")
    return None


def begin_record(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """The record that `find_record` finds, or else a new one, written."""
    found = find_record(path, asked)
    if found is None:
        found = {"schema": 1, "finished": False, "asked": asked}
        write_json_atomically(path, found)
    return found
