"""What an earlier call of the same evaluation has measured: it is not measured again."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# Of a record: whether another call would measure the same
_SAME = ("schema", "model_hash", "tokenizer_hash", "dtype_asked", "limit")


class Earlier:
    """The record that lies at `out`, if it is of the same model, request and libraries as `now`.

    Sets that it lacks, that were missing, or of which `samples` has no lines, are not kept.
    """

    def __init__(self, out: Path | None, samples: Path | None, now: Mapping[str, Any]) -> None:
        found = {} if out is None else _read(out)
        versions = found.get("versions", {})
        # the harness has none where it was not asked for anything
        is_same = all(found.get(key) == now[key] for key in _SAME) and all(
            versions.get(name, number) == number for name, number in now["versions"].items()
        )
        self.record: dict[str, Any] = found if is_same else {}
        self._sampled = None if samples is None else {name for name, _ in _lines(samples)}

    def task(self, name: str, shots: int, source: Mapping[str, Any]) -> dict[str, Any] | None:
        """A set's scores, measured with these shots from the same source."""
        found: dict[str, Any] | None = self.record.get("tasks", {}).get(name)
        if found is None or found["missing"] is not None:
            return None
        if self._sampled is not None and name not in self._sampled:
            return None
        return found if (found["shots"], found["source"]) == (shots, source) else None

    def heldout(self, folder: str, corpus_hash: str, window: int) -> dict[str, Any] | None:
        """A corpus's loss, measured with the same window."""
        found: dict[str, Any] | None = (self.record.get("heldout") or {}).get(folder)
        if found is None or found["missing"] is not None:
            return None
        same = (found["corpus_hash"], found["window"]) == (corpus_hash, window)
        return found if same else None


def keep_samples(path: Path, names: Iterable[str]) -> None:
    """Leaves the lines of these sets; what a call that was stopped wrote of others goes."""
    names = set(names)
    aside = path.with_name(f".{path.name}")
    with aside.open("w") as file:
        file.writelines(line for name, line in _lines(path) if name in names)
    os.replace(aside, path)


def _read(path: Path) -> dict[str, Any]:
    """Empty for what is no record: it is written anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """(name of the set, line) of a file of samples; none of one that is not there."""
    if not path.exists():
        return
    with path.open() as file:
        for line in file:
            try:
                yield json.loads(line)["set"], line
            except (ValueError, LookupError, TypeError):
                # cut off by a kill, or no sample
                continue
